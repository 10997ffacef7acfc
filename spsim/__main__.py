"""The process of `spsim` and of `python -m spsim`."""

from spsim.interrupts import ending_at_once


def main() -> None:
    """Load the command line, which takes most of a second, and run it."""
    with ending_at_once():
        from spsim.cli import main as run
    run()


if __name__ == "__main__":
    main()
