"""`python -m spsim`."""

from spsim.cli import main

if __name__ == "__main__":
    main()
