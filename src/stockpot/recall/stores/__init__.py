"""Where answers and evidence are kept."""
