"""`python -m loadtest.load`."""

from loadtest.load.command import main

if __name__ == "__main__":
    main()
