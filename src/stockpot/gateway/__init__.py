"""The numbered path of a request through limits, guards and backends."""
