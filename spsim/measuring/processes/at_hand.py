"""What this process finds: a launcher's other ranks, devices, packages, and why torch fails on them."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from spsim.errors import InputError

CPU_RANKS = 2
"""Processes of a machine without a GPU: as few as communicate."""
REASON_LENGTH = 160


class Position(NamedTuple):
    """One rank among all."""

    rank: int
    local_rank: int
    world: int
    per_node: int


def torchrun_position() -> Position | None:
    """Where torchrun, or another launcher with its variables, has placed this process; None without one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    local_rank, per_node = os.environ.get("LOCAL_RANK", "0"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    return Position(int(os.environ["RANK"]), int(local_rank), int(os.environ["WORLD_SIZE"]), int(per_node))


def is_leader() -> bool:
    """Whether this process writes and prints."""
    position = torchrun_position()
    return position is None or position.rank == 0


def check_installed(command: str, *packages: str) -> None:
    """`InputError` where one of the packages that only some commands need is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f'{command}: {package} is not installed; pip install "spsim[calibrate]"')


def count_gpus() -> int:
    """Devices of this machine that torch calls `cuda`; `InputError` where torch is there but does not load."""
    try:
        import torch
    except (ImportError, OSError) as error:  # an OSError where a library of it is missing
        cause = " ".join(str(error).split())[:REASON_LENGTH]
        raise InputError(f"torch cannot be loaded ({cause}); install it again") from None
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def gpu_index(local_rank: int, per_node: int) -> int:
    """The device of a local rank: that of its number, or the only one, where a launcher shows each rank its own."""
    gpus = count_gpus()
    if gpus == 0 or max(local_rank + 1, per_node) > gpus > 1:
        raise InputError(f"{per_node} ranks were started on a node where torch sees {gpus} GPUs; start one a GPU")
    return local_rank if gpus > 1 else 0


def cpu_info(key: str) -> str:
    """What Linux says of the first CPU, empty where it says nothing."""
    path = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*:\s*(.*)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found.group(1).strip() if found else ""


NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What the messages of a CPU, of CUDA beside torch's allocator (NCCL's buffers, a context) and of cuBLAS say."""
LAST_ERROR = "Last error:"
"""After this, torch's message of a failed collective has what NCCL itself says."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or a CPU could not allocate; all but torch's allocator raise a plain `RuntimeError`."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in NO_MEMORY)


def reason(error: BaseException) -> str:
    """Why torch could not, in a few words: its message may go on with a stack."""
    if out_of_memory(error):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if LAST_ERROR in lines[:-1]:
        return f"NCCL: {lines[lines.index(LAST_ERROR) + 1]}"[:REASON_LENGTH]
    return lines[0][:REASON_LENGTH] if lines else type(error).__name__
