"""What questions ask, read from their words; and whether answers agree."""
