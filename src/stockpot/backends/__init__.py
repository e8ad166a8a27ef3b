"""Whatever generates, behind one seam."""
