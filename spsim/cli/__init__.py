"""The command line: `spsim` and `python -m spsim`."""

from spsim.cli.entry import main

__all__ = ["main"]
