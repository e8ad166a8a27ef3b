"""Limits of keys and teams: reserved before a request runs, settled with what it used."""
