"""Texts as vectors, and the search for what is near."""
