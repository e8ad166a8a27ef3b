"""How often kept answers are wrong, and the bound on it."""
