"""Reads recorded requests, finds where prompts that could have been cached were not, and says why."""
