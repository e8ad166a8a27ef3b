"""Prompts built to be cached: `from stockpot import context`. No server is needed."""
