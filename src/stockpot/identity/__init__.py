"""Virtual keys: what they look like, where they are kept, whose they are."""
