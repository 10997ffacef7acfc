"""Records what pinned libraries send and keep: `experiments/data/libraries.csv`, of the cases in `cases.toml`.

    python experiments/libraries/record.py [--environments FOLDER] [--library NAME …]

installs the libraries into virtual environments of their own, in a temporary folder unless FOLDER is given (and then
left there for the next time), and runs each case on the CPU under as many gloo processes as it names. It takes about
ten minutes, and needs neither a GPU nor spsim. Libraries that are not named keep their rows.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import read_cases

HERE = Path(__file__).parent
FILE = HERE.parent / "data" / "libraries.csv"
COLUMNS = (
    "library", "version", "case", "ranks", "pass", "order", "collective", "count", "message_bytes", "dtype",
    "kept_bytes",
)  # fmt: skip
REQUIREMENTS = {"ring-flash-attn": "requirements-ring-flash-attn.txt"}
"""Of libraries that need an environment of their own."""


def main() -> None:
    """Record, and write what was there of other libraries again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="folder for the virtual environments, kept")
    parser.add_argument("--library", action="append", help="of this library alone; may be given several times")
    options = parser.parse_args()
    libraries = list(dict.fromkeys(case.library for case in read_cases()))
    chosen = options.library or libraries
    with tempfile.TemporaryDirectory() as folder:
        environments = options.environments or Path(folder)
        found = {library: list(_recorded(library, environments, Path(folder))) for library in chosen}
    before = list(csv.DictReader(FILE.open())) if FILE.exists() else []
    rows = [row for name in libraries for row in found.get(name, [row for row in before if row["library"] == name])]
    with FILE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _recorded(library: str, environments: Path, folder: Path) -> Iterator[dict[str, Any]]:
    python = _environment(REQUIREMENTS.get(library, "requirements.txt"), environments)
    for ranks in sorted({case.ranks for case in read_cases() if case.library == library}):
        print(f"{library} on {ranks} ranks", flush=True)
        file = folder / f"{library}-{ranks}.json"
        subprocess.run([python, "-W", "ignore", HERE / "ranks.py", library, str(ranks), file], check=True)
        yield from json.loads(file.read_text())


def _environment(requirements: str, environments: Path) -> Path:
    """The interpreter of a virtual environment with these requirements, made unless it is there."""
    folder = environments / Path(requirements).stem
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", HERE / requirements], check=True)
        (folder / "complete").touch()
    return python


if __name__ == "__main__":
    sys.exit(main())
