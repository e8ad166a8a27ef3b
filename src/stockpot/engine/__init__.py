"""The embedded engine: scheduler, sequences, sampling, drivers."""
