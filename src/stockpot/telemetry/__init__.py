"""What the outside sees of the inside: metrics and logs. The core imports none of it."""
