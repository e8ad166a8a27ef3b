"""Answers already given: kept, found by the same or an equal question, and never given where in doubt."""
