"""The application: what it says of its commands, and what it is asked without one."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import spsim
from spsim.cli import app, main
from spsim.cli.app import COMMANDS, EXPERIMENT

MODULES = {path.stem for path in (Path(app.__file__).parent / "commands").glob("*.py")}


def test_every_module_is_a_command_and_is_listed():
    assert {*COMMANDS, EXPERIMENT, "__init__"} == MODULES


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_of_a_command_what_its_help_begins_with(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert text.startswith(f"Usage: spsim {name} ")
    assert re.search(rf"[]}}](\.\.\.)? {re.escape(COMMANDS[name])} ", text)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_help_lists_all_commands(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert text.endswith("Commands: " + " ".join(f"{name} {line}" for name, line in COMMANDS.items()))


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"spsim {spsim.__version__}\n")
    assert spsim.__version__ == version("spsim")


def test_names_of_the_package():
    assert {"simulate", "Plan"} <= set(dir(spsim))
    with pytest.raises(AttributeError, match="nothing"):
        _ = spsim.nothing


def test_threads_are_left_as_they_were_set():
    """What numpy is told while a command is imported does not reach what the command starts."""
    code = (
        "import os\nfrom spsim.cli import main\n"
        "try:\n    main(['run', '--help'])\nfinally:\n    print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    kept = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    for environment, expected in ((kept, "None"), ({**kept, "OPENBLAS_NUM_THREADS": "3"}, "3")):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
