"""Reads what nccl-tests print: times of collectives by message size, and who took part.

A log has a header that names every rank with its host and device, and a table; several tests may follow each other. The
out-of-place columns are read. Messages are counted as spsim counts them, for it counts as nccl-tests do. Time and both
bandwidths are held against each other, so that a log that was cut or joined wrongly is not believed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spsim.errors import InputError
from spsim.inputs.collective_curves import CollectiveName
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.inheritance import bus_factor
from spsim.inputs.resources import read_text
from spsim.measuring.calibrate.records import Measurement
from spsim.units import GB, US_PER_S

TESTS: Mapping[str, CollectiveName] = {
    "all_reduce": "all_reduce", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all", "sendrecv": "send_receive",
}  # fmt: skip
"""What nccl-tests call the collectives of spsim."""
OTHERS = ("broadcast", "reduce", "gather", "scatter", "hypercube", "alltoallv")
"""Tests of what spsim does not time."""
_TEST = re.compile(rf"(?<![a-z_])({'|'.join([*TESTS, *OTHERS])})(?:_perf|(?=[._-]))")
_TAG = re.compile(r"\[\d+(?:,\d+)*\](?:<\w+>)?:?|^\s*\d+: ")
"""With which mpirun and srun begin, or fill, the lines of a rank."""
_DEVICES = "Using devices"
_RANK = re.compile(r"Rank\s+\d+\s+(?:Group\s+(\d+)\s+)?Pid\s+\d+\s+on\s+(\S+)\s+device\s+\d+\s+\[[^\]]*\]\s+(.+?)\s*$")
_END = "Avg bus bandwidth"
_VERSION = re.compile(r"NCCL version ([\w.+]+)|nccl-library=(\d+)")
_ROW = re.compile(
    r"^\s*(?P<size>\d+)\s+\d+\s+[a-z]\w*\s+\w+\s+(?P<root>-?\d+\s+)?"
    r"(?P<time>\d[\d.]*(?:e[+-]?\d+)?)\s+(?P<algorithm>\d[\d.]*)\s+(?P<bus>\d[\d.]*)\s+"
    r"(?:(?P<wrong>\d+)(?!\S))?"
)
_ROW_WITHOUT_ROOT = re.compile(_ROW.pattern.replace(r"(?P<root>-?\d+\s+)?", ""))
_BEGUN = re.compile(r"\s*\d+\s+\d+(?!\S)")
"""How a row begins, whole or not."""
WITHIN, BETWEEN = "within", "between"
SLACK = 0.02
"""Relative gap between figures of a row that rounding explains; GB/s are printed with two decimals."""


@dataclass
class _Test:
    """The header of a test."""

    collective: CollectiveName
    hosts: list[str] = field(default_factory=list)
    """Of each rank."""
    devices: list[str] = field(default_factory=list)
    row: re.Pattern[str] = _ROW

    @property
    def ranks(self) -> int:
        """That take part."""
        return len(self.hosts)

    @property
    def nodes(self) -> int:
        """Hosts that they are on."""
        return len(set(self.hosts))


@dataclass(frozen=True)
class Logs:
    """What some logs say."""

    device: str
    nccl: str
    """Versions, joined by commas."""
    rows: tuple[Measurement, ...]
    """Their level is `WITHIN` or `BETWEEN` nodes."""

    def on(self, profile: HardwareProfile) -> list[Measurement]:
        """The rows at the levels of a profile: within a node, or else between nodes."""
        inner, *outer = profile.datasheet.topology
        for row in self.rows:
            if row.level == BETWEEN and not outer:
                raise InputError(
                    f"{row.text}: {row.ranks} ranks on {row.nodes} nodes, but {profile.name} has no level beyond "
                    f"{inner.name!r}; give a --base with one"
                )
        return [
            row.model_copy(update={"level": inner.name if row.level == WITHIN else outer[0].name}) for row in self.rows
        ]


def read_logs(paths: Sequence[Path]) -> Logs:
    """The rows of some logs; `InputError` names file and line of what cannot be true, and logs of several devices."""
    rows: list[Measurement] = []
    devices: dict[str, Path] = {}
    versions: dict[str, None] = {}
    for path in paths:
        text = read_text(path)
        versions |= dict.fromkeys(found for pair in _VERSION.findall(text) for found in pair if found)
        before = len(rows)
        for test, row in _rows(path, text):
            rows.append(row)
            devices |= dict.fromkeys(test.devices, path)
        if len(rows) == before:
            raise InputError(f"{path}: has no table of nccl-tests; give what all_reduce_perf and its like print, whole")
    if len(devices) > 1:
        listed = ", ".join(f"{device} ({path})" for device, path in devices.items())
        raise InputError(f"calibrate: the logs are of several devices: {listed}; give those of one")
    return Logs(next(iter(devices)), ", ".join(versions), tuple(rows))


def _rows(path: Path, text: str) -> Iterator[tuple[_Test, Measurement]]:
    """Each row that has a size, with its test."""
    name: str | None = None
    test: _Test | None = None
    for number, line in enumerate(_TAG.sub("", line) for line in text.splitlines()):
        where = f"{path}: line {number + 1}"
        if found := _TEST.search(line.removesuffix(path.name)):
            name = found[1]
        if _DEVICES in line:
            test = _Test(_collective(name, path))
        elif rank := _RANK.search(line):
            _add_rank(test, rank, where)
        elif line.lstrip("# ").startswith("size ") and test:
            test.row = _ROW if " root " in line else _ROW_WITHOUT_ROOT
        elif _END in line:
            name = test = None
        elif test and (row := test.row.match(line)):
            if (size := int(row["size"])) >= max(test.ranks, 1):
                yield test, _measurement(test, size, row, where)
        elif test and _BEGUN.match(line):
            raise InputError(f"{where}: is no whole row of a size; give it as it was printed, or leave it out")


def _collective(name: str | None, path: Path) -> CollectiveName:
    found = _TEST.search(path.name)
    name = name or (found[1] if found else None)
    if name is None:
        raise InputError(
            f"{path}: does not say which test it is of; keep the line of the command, or call it all_reduce.log or so"
        )
    if name not in TESTS:
        raise InputError(f"{path}: {name}_perf is no test of a collective that spsim times: {', '.join(TESTS)}")
    return TESTS[name]


def _add_rank(test: _Test | None, found: re.Match[str], where: str) -> None:
    if test is None:
        raise InputError(f"{where}: a rank before the line '# {_DEVICES}'; keep the header whole")
    if (found[1] or "0") == "0":  # each group is a communicator of its own
        test.hosts.append(found[2])
        test.devices.append(found[3])


def _measurement(test: _Test, size: int, row: re.Match[str], where: str) -> Measurement:
    """One row; `InputError` where its time, bandwidths and the ranks of the header do not fit each other."""
    if test.ranks < 2:
        raise InputError(f"{where}: the header names {test.ranks} ranks; keep it whole, a collective takes at least 2")
    if len(set(Counter(test.hosts).values())) > 1:
        raise InputError(f"{where}: {test.ranks} ranks on {test.nodes} hosts, not equally many on each; leave it out")
    if int(row["wrong"] or 0):
        raise InputError(f"{where}: {row['wrong']} wrong values; times of what did not work say nothing, leave it out")
    time_us, algorithm, bus = (float(row[name]) for name in ("time", "algorithm", "bus"))
    factor = bus_factor(test.collective, test.ranks)
    for what, stated, due in (
        ("algbw", algorithm, size / time_us * US_PER_S / GB if time_us else 0.0), ("busbw", bus, factor * algorithm)
    ):  # fmt: skip
        if abs(stated - due) > SLACK * due + 0.02:
            raise InputError(
                f"{where}: {what} {stated:g} GB/s, but {due:.4g} follow for {test.collective} of {test.ranks} ranks; "
                "give the log as it was printed"
            )
    return Measurement(
        level=WITHIN if test.nodes == 1 else BETWEEN,
        kind="collective", name=test.collective, ranks=test.ranks, nodes=test.nodes, message_bytes=size,
        time_us=time_us, text=where.partition(": line")[0],
    )  # fmt: skip
