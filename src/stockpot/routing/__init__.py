"""Which model and which backend a request goes to."""
