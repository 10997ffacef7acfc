"""One collective by itself, as nccl-tests measure it: its time, algorithm and bus bandwidth on some GPUs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, cast, get_args

from spsim.costs.algorithms import ALGORITHMS
from spsim.costs.collectives import CommCost
from spsim.costs.curves import algorithm_steps
from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.profiles import load_profile
from spsim.program.placement import Collective, sent_bytes
from spsim.units import GB, GIB, KIB, KILO, MEGA, MIB, US_PER_S

AUTO = "auto"
"""The algorithm that the library picks."""
LARGEST_MESSAGE = 2**50
LARGEST_GROUP = 2**20
CURVE = tuple(2**power for power in range(10, 35))
"""Messages of a curve: 1 KiB to 16 GiB."""

_UNITS = {"": 1, "b": 1, "kib": KIB, "mib": MIB, "gib": GIB, "kb": KILO, "mb": MEGA, "gb": GB}
_BYTES = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CollectiveTime:
    """A collective among some GPUs, once all of them are there and nothing else moves."""

    collective: Collective
    hardware: str
    gpus: int
    nodes: int
    message_bytes: int
    """As nccl-tests name it: the whole array; of all-to-all and send-receive what one GPU sends in all."""
    time_us: float
    """Of the library alone, as a benchmark measures it back to back."""
    algorithm: str
    bus_bandwidth_gb_per_s: float
    """Bytes that one GPU sends by a ring over the time, as nccl-tests define it."""
    alpha_us: float
    """Of the smallest message, by what the library picks for that, or by the algorithm that was asked for."""
    steps: int
    """In a row, of which each waits for the one before."""
    protocol: str | None
    """Of NCCL; None where it is not known."""
    channels: int | None
    """Of NCCL, an SM each; None where they are not known, or the algorithm is not what NCCL picks."""

    def to_json(self) -> dict[str, Any]:
        """For documents."""
        return asdict(self)


def collective(
    name: str,
    message: int | str,
    hardware: str | Path | HardwareProfile,
    gpus: int,
    *,
    algorithm: str = AUTO,
    nodes: int | None = None,
) -> CollectiveTime:
    """The time of one collective.

    Args:
        name: all_reduce, all_gather, reduce_scatter, all_to_all or send_receive.
        message: bytes as nccl-tests name them, a number or text such as "64MiB" (2**20) or "1GB" (1e9).
        hardware: a profile, its name or path.
        gpus: in the group; up to a node's they stay in it, more are spread evenly over the fewest nodes.
        algorithm: what the library picks (auto), or one of `spsim.costs.algorithms.ALGORITHMS`.
        nodes: over which the GPUs are spread instead.

    Raises:
        InputError: a value that cannot be, an algorithm that cannot serve (with the reason), or a missing curve.
    """
    return timed(group(name, hardware, gpus, algorithm=algorithm, nodes=nodes), message_bytes(message))


@dataclass(frozen=True, slots=True)
class Group:
    """GPUs that run a collective, by an algorithm or as the library does."""

    collective: Collective
    profile: HardwareProfile
    gpus: int
    nodes: int
    algorithm: str | None


def group(
    name: str, hardware: str | Path | HardwareProfile, gpus: int, *, algorithm: str = AUTO, nodes: int | None = None
) -> Group:
    """The checked group of a collective; arguments and errors as of `collective`."""
    if name not in get_args(Collective):
        raise InputError(f"collective {name!r} is none of {', '.join(get_args(Collective))}; give one of them")
    if algorithm not in (AUTO, *ALGORITHMS):
        raise InputError(f"algorithm {algorithm!r} is none of {', '.join((AUTO, *ALGORITHMS))}; give one of them")
    profile = hardware if isinstance(hardware, HardwareProfile) else load_profile(hardware)
    if isinstance(gpus, bool) or not isinstance(gpus, int) or not 2 <= gpus <= LARGEST_GROUP:
        raise InputError(f"gpus {gpus!r}: a collective needs 2 or more, up to {LARGEST_GROUP}; give such a number")
    spread = ceil(gpus / profile.gpus_per_node) if nodes is None else nodes
    if spread < 1 or gpus % spread or gpus // spread > profile.gpus_per_node:
        raise InputError(
            f"gpus {gpus}: they do not fill {spread} nodes of {profile.gpus_per_node} GPUs evenly on {profile.name}; "
            "give a multiple of the nodes"
        )
    found = Group(cast("Collective", name), profile, gpus, spread, None if algorithm == AUTO else algorithm)
    _costs(profile).forms(found.collective, gpus, spread, found.algorithm)
    return found


def timed(found: Group, message: int) -> CollectiveTime:
    """The time of a message of so many bytes."""
    costs, name, ranks, nodes = _costs(found.profile), found.collective, found.gpus, found.nodes
    forms = costs.forms(name, ranks, nodes, found.algorithm)
    form = forms.at(message)
    if found.algorithm is None:
        time = costs.time(name, message, ranks, nodes)
        algorithm, protocol = costs.choice(name, message, ranks, nodes)
        channels = costs.channels(name, message, ranks, nodes)
    else:
        time, algorithm, protocol, channels = forms(message), form.algorithm, form.protocol, None
    steps = form.steps if algorithm == form.algorithm else algorithm_steps(algorithm, name, ranks)
    start = costs.time(name, 0, ranks, nodes) if found.algorithm is None else forms(0)
    return CollectiveTime(
        collective=name, hardware=found.profile.name, gpus=ranks, nodes=nodes, message_bytes=message,
        time_us=US_PER_S * float(time), algorithm=algorithm,
        bus_bandwidth_gb_per_s=float(sent_bytes(name, message, ranks) / time / GB), alpha_us=US_PER_S * float(start),
        steps=steps, protocol=protocol, channels=channels,
    )  # fmt: skip


def curves(found: Group, sizes: Sequence[int] = CURVE) -> dict[str, list[CollectiveTime]]:
    """Times by rising message: what the library picks, or the algorithm asked for, then all others that serve."""
    own = found.algorithm or AUTO
    made = {own: [timed(found, size) for size in sizes]}
    for name in ALGORITHMS:
        if name != own:
            try:
                other = group(found.collective, found.profile, found.gpus, algorithm=name, nodes=found.nodes)
            except InputError:
                continue
            made[name] = [timed(other, size) for size in sizes]
    return made


def message_bytes(text: int | str) -> int:
    """Bytes of a text such as 64MiB, 1.5GiB, 1GB (1e9) or 4096; `InputError` where it is none."""
    match = _BYTES.fullmatch(text) if isinstance(text, str) else None
    unit = _UNITS.get(match[2].lower()) if match else None
    size = text if isinstance(text, int) and not isinstance(text, bool) else None
    if match and unit:
        scaled = float(match[1]) * unit if "." in match[1] else int(match[1]) * int(unit)
        size = int(scaled) if scaled == int(scaled) else None
    if size is None or not 1 <= size <= LARGEST_MESSAGE:
        raise InputError(
            f"bytes {text!r}: a message has 1 byte to 1024 TiB; write for instance 4096, 64KiB, 64MiB or 1GB (1e9)"
        )
    return size


@lru_cache(maxsize=64)
def _costs(profile: HardwareProfile) -> CommCost:
    return CommCost(profile)
