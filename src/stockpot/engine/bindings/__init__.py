"""The llama.cpp libraries Stockpot can run on, one thin file each, behind one class."""
