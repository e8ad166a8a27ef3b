"""Rules about what may go to a model and what may come back from it."""
