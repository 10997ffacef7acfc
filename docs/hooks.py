"""What the site shows that is not a page: the help of each command, and the recorded rows that pages link to."""

import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

RECORDED = "experiments/data/libraries.csv"
HELP = re.compile(r"<!-- help: (.*?) -->")


def on_files(files: Files, config) -> Files:
    """Beside the pages, the file whose rows `libraries.md` links to."""
    files.append(File.generated(config, RECORDED, abs_src_path=str(Path(config.config_file_path).parent / RECORDED)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links that leave the folder of pages lead into the site, and the help of commands is what they print."""
    return HELP.sub(_help, markdown.replace(f"../{RECORDED}", RECORDED))


def _help(asked: re.Match) -> str:
    command = [sys.executable, "-m", "spsim", *asked[1].split(), "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env={"COLUMNS": "100"}).stdout
    return f"```text\n{printed.strip()}\n```"
