"""What a cache would do on a recorded workload, without a model."""
