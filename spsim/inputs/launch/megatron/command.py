"""The command of a script that launches Megatron-LM: its arguments, and on how many GPUs it runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from spsim.errors import InputError
from spsim.inputs.configuration import read_value
from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.megatron.arguments import FLAGS, NUMBERS, SWITCHES
from spsim.inputs.launch.options import Item, Options
from spsim.inputs.launch.shell.expansion import Field
from spsim.inputs.launch.shell.script import Script

_OWN = {*NUMBERS, *FLAGS}
_NODES = ("nnodes", "nodes", "N")
_PER_NODE = ("nproc_per_node", "ntasks_per_node", "gpus_per_node", "gres")
_PROCESSES = ("np", "n", "ntasks", "num_processes")
_BATCH = re.compile(r"^#SBATCH\s+(--?[\w-]+)(?:[ =]+(\S+))?", re.MULTILINE)


def options_of(text: str, path: Path) -> tuple[Options, Options]:
    """The arguments of the one launch in a script, and what its launcher is told; `InputError` where there is none."""
    where = str(path)
    script = Script.of(text, where)
    launches = [found for command in script.commands if (found := _launch(command.fields)) is not None]
    best = [found for found in launches if _OWN & {_name(field.text) for field in found[1]}]
    if not best:
        reason = script.notes[-1] if script.notes else "no command has its arguments"
        raise InputError(
            f"{where}: no launch of Megatron-LM is found ({reason}); give a script that calls pretrain_gpt.py"
        )
    if len(best) > 1:
        lines = ", ".join(str(arguments[0].line) for _, arguments in best)
        raise InputError(f"{where}: launches Megatron-LM several times (lines {lines}); give a script with one of them")
    launcher, arguments = best[0]
    options = Options(where, _items(arguments, where))
    options.aside += script.notes
    batch = [Field(part, 0) for found in _BATCH.findall(text) for part in found if part]
    return options, Options(where, {**_items(batch, where), **_items(launcher, where)})


def _launch(fields: Sequence[Field]) -> tuple[Sequence[Field], Sequence[Field]] | None:
    """What stands before and behind the name of the Python file, or arguments alone."""
    if fields[0].text.startswith("--"):
        return [], fields
    place = next((n for n, field in enumerate(fields) if field.text.endswith(".py")), None)
    return None if place is None or place + 1 == len(fields) else (fields[:place], fields[place + 1 :])


def _name(text: str) -> str:
    return text.partition("=")[0].lstrip("-").replace("-", "_")


def _items(fields: Iterable[Field], where: str) -> dict[str, Item]:
    """Options with what follows them; the last of a name counts, as it does there."""
    found: dict[str, Item] = {}
    for name, values, line in _grouped(fields):
        at = f"{where}:{line}" if line else where
        unknown = next((value.unknown for value in values if value.unknown), "")
        texts = [value.text for value in values]
        shown = " ".join([name.split("=")[0], *texts])
        read = [read_value(text) for text in texts]
        found[_name(name)] = Item(True if not read else read[0] if len(read) == 1 else read, shown, at, unknown)
    return found


def _grouped(fields: Iterable[Field]) -> Iterator[tuple[str, list[Field], int]]:
    """(name, values, line) of each option; words before the first are options of their own."""
    name, values, line = "", list[Field](), 0
    for field in fields:
        ends = field.unknown == field.text and (bool(values) or _name(name) in SWITCHES)
        if re.match(r"--?[A-Za-z]", field.text) or ends:
            if name:
                yield name, values, line
            name, equals, value = field.text.partition("=")
            values, line = [Field(value, field.line, field.unknown)] if equals else [], field.line
        else:
            values.append(field)
    if name:
        yield name, values, line


def read_world(launcher: Options, draft: Draft) -> None:
    """Replicas: as many as the ranks of the launch leave, asked for where it does not say how many there are."""
    draft.nodes = _first(launcher, _NODES)
    per_node, processes = _first(launcher, _PER_NODE), _first(launcher, _PROCESSES)
    world = processes if per_node is None else per_node * (draft.nodes or 1)
    degrees = [draft.plan.get(name, 1) for name in ("tp", "pp", "ulysses", "ring")]
    asked = [path for path in draft.missing if path in ("plan.tp", "plan.pp")]
    if world is None or asked:
        unknown = next(
            (item for name, item in launcher.items.items() if item.unknown and name in (*_NODES, *_PER_NODE)), None
        )
        what = f"{unknown.shown}: {unknown.unknown} is not known" if unknown else "how many GPUs it runs on is not said"
        draft.ask("plan.dp", f"{launcher.where}: {what}", "the replicas: --set plan.dp=N")
        return
    size = degrees[0] * degrees[1] * degrees[2] * degrees[3]
    if world % size:
        draft.nodes = None
        text = f"{launcher.where}: {world} GPUs are not divisible by tp x pp x cp = {size}"
        draft.ask("plan.dp", text, "the replicas: --set plan.dp=N")
    elif world != size:
        draft.plan["dp"] = world // size


def _first(launcher: Options, names: Iterable[str]) -> int | None:
    """The number that the first known of some options says, such as 8 of `gpu:8`; None where none does."""
    for name in names:
        item = launcher.items.get(name)
        if item is not None and not item.unknown:
            value = item.value[0] if isinstance(item.value, list) else item.value
            found = re.search(r"(\d{1,7})$", str(value))
            if found:
                return int(found[1])
    return None
