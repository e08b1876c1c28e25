"""`python -m semid`: the command line."""

from semid.cli import main

if __name__ == "__main__":
    main()
