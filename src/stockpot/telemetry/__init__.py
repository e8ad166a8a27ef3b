"""Observers of events: metrics."""
