"""The order of modules, the fences around heavy packages, and the size of functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import spsim
from spsim.cli.app import COMMANDS, EXPERIMENT

PACKAGE = Path(spsim.__file__).parent
ORDER = (
    "interrupts", "errors", "units", "lazy", "work", "files", "inputs", "engine", "program", "costs", "step",
    "results", "simulation", "studies", "export", "plots", "pytorch", "measuring", "report", "cli", "__main__",
)  # fmt: skip
"""Folders and the modules beside them; each imports only what stands before it."""
STRANGERS = (("inputs", "engine"), ("engine", "inputs"))
"""Folders that know nothing of each other, whatever their order."""
FENCES = {
    "simpy": {"engine"},
    "matplotlib": {"plots"},
    "rich": {"report", "studies", "cli"},
    "typer": {"cli"},
    "jinja2": {"report"},
    "torch": {"pytorch", "measuring"},
    "scipy": {"measuring"},
    "pandas": {"studies", "plots", "pytorch", "measuring"},
}
HEAVY = ("matplotlib", "jinja2", "scipy", "torch")
"""Never loaded with a module of the package, only by what needs them."""
LAZY = {
    "results": {"plots", "export", "report", "matplotlib", "pandas"},
    "studies": {"plots", "report", "matplotlib", "pandas"},
}
"""What may be imported inside a function or for types only, so that `import spsim` stays light."""


def modules() -> Iterator[tuple[str, Path]]:
    """(name of the top module, file) of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        name = relative.parts[0] if len(relative.parts) > 1 else path.stem
        if name not in ("__init__", "hardware_profiles", "data"):
            yield name, path


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a syntax tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "spsim":
                yield from (f"spsim.{alias.name}" for alias in node.names)
            else:
                yield node.module


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


@cache
def names_imported(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether at the top level of the module) of each import."""
    tree = tree_of(path)
    top = {
        name
        for node in tree.body
        for name in imports(node)
        if not isinstance(node, ast.If | ast.FunctionDef | ast.ClassDef)
    }
    return [(name, name in top) for name in set(imports(tree))]


def test_every_module_has_its_place() -> None:
    assert {name for name, _ in modules()} == set(ORDER)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: getattr(value, "name", value))
def test_a_module_imports_only_modules_above_it(name: str, path: Path) -> None:
    for imported, at_top in names_imported(path):
        if not imported.startswith("spsim."):
            continue
        target = imported.split(".")[1]
        if target == name or (not at_top and target in LAZY.get(name, ())):
            continue
        assert ORDER.index(target) < ORDER.index(name), f"{name} imports {target}, which stands below it"
        assert (name, target) not in STRANGERS, f"{name} imports {target}, of which it knows nothing"


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: getattr(value, "name", value))
def test_heavy_packages_stay_behind_their_fence(name: str, path: Path) -> None:
    for imported, at_top in names_imported(path):
        root = imported.split(".")[0]
        if root in FENCES and name not in FENCES[root]:
            assert not at_top
            assert root in LAZY.get(name, ()), f"{name} imports {root}"


@pytest.mark.slow
def test_no_modules_import_each_other_in_a_circle() -> None:
    """At the top level of modules, folders or not."""
    known = {_dotted(path) for _, path in modules()}
    imported = {_dotted(path): set(_modules_imported(path, known)) for _, path in modules()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in imported[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in imported:
        visit(name, ())


def _modules_imported(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of the package that a file imports as it is loaded."""
    for node in tree_of(path).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found = {f"{node.module}.{alias.name}" for alias in node.names} & known
            yield from found or {node.module} & known


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_package_reads_as_its_architecture() -> None:
    """At most nine modules beside the folders, and every folder says in a sentence what is in it."""
    assert len(list(PACKAGE.glob("*.py"))) <= 9
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(tree_of(path)), path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (("__main__",), ("numpy", "pandas", "pydantic", "typer")),  # it must answer interrupts before they are there
        (("simulation", "studies.comparison", "studies.sweeps"), ("pandas", *HEAVY)),
        (tuple(f"cli.commands.{name}" for name in (*COMMANDS, EXPERIMENT)), HEAVY),
    ],
)
def test_imports_are_light(names: tuple[str, ...], absent: tuple[str, ...]) -> None:
    """Of all together, and so of each."""
    assert not _loaded_by(f"import {', '.join(f'spsim.{name}' for name in names)}") & {*absent}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ("--help", ("numpy", "pandas", "rich", "simpy", *HEAVY)),
        ("list hardware", ("numpy", "pandas", "simpy", *HEAVY)),
        ("explain --model gpt-22b --plan tp=8", ("numpy", "pandas", "simpy", *HEAVY)),
        ("run --model gpt-22b --hardware dgx-h100 --plan tp=8 --seq-len 2048", ("pandas", *HEAVY)),
    ],
)
def test_a_short_command_loads_what_it_needs(arguments: str, absent: tuple[str, ...]) -> None:
    """Packages are most of the time that it takes."""
    assert not _loaded_by(f"from spsim.cli import main; main({arguments.split()})") & {*absent}


def _loaded_by(code: str) -> set[str]:
    """The modules of a process that runs some code."""
    say = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = subprocess.run([sys.executable, "-c", f"{say}; {code}"], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_no_function_shares_its_name_with_a_module() -> None:
    for name in spsim.__all__:
        assert name not in ORDER, f"spsim.{name} is also a module"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: getattr(value, "name", value))
def test_sizes(name: str, path: Path) -> None:
    """Files of at most 400 lines, functions of at most 50."""
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 50, f"{path.name}: {node.name} is too long"


def test_public_names_are_documented() -> None:
    for name in spsim.__all__:
        assert getattr(spsim, name).__doc__, name
