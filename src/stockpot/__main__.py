"""`python -m stockpot`: the command line."""

from stockpot.cli.main import main

if __name__ == "__main__":
    main()
