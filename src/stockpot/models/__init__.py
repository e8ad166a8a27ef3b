"""Model files: where from, what is in them, which encoding."""
