"""The processes of a calibration: what they know of each other, and their process groups.

Rank 0 leads. It publishes what all ranks measure together as numbered commands in torch's key-value store;
the others wait in the store, without using a CPU, and execute them in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from spsim.errors import InputError
from spsim.measuring.calibrate.catalogue import Group
from spsim.measuring.calibrate.records import Measurement

PATIENCE = timedelta(days=1)
"""How long a rank waits for a command, and a process group for its ranks: time limits end both earlier."""
END = "end"
ALIKE = "alike"
_distributed: Any = dist
"""The same, where torch does not say what it exports."""


def open_store(port: int, *, master: bool = False) -> Any:
    """torch's key-value store of the processes of this machine; the master holds it, at a free port for 0."""
    return _distributed.TCPStore("127.0.0.1", port, is_master=master, wait_for_workers=False)


def store_of_launcher() -> Any:
    """The store of the processes that torchrun, or another launcher with its variables, has started."""
    store, _, _ = next(_distributed.rendezvous("env://"))
    return store


@dataclass
class Ranks:
    """One rank's view."""

    rank: int
    local_rank: int
    world: int
    per_node: int
    store: Any
    groups: dict[Group, Any] = field(default_factory=dict)
    _commands: int = 0

    @property
    def nodes(self) -> int:
        """Nodes hold equally many ranks."""
        return self.world // self.per_node

    def connect(self, backend: str) -> None:
        """Join all ranks in torch's default process group."""
        if self.world > 1:
            store = _distributed.PrefixStore("default_group", self.store)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=PATIENCE)

    def check_alike(self, device: str, uuid: str = "") -> None:
        """Tell rank 0 this rank's device, and wait until it has found all ranks and nodes alike.

        It alone says what differs; the others wait for its end, since a launcher ends all ranks with the first.
        """
        self.store.set(f"rank/{self.rank}", json.dumps([device, uuid, self.per_node]))
        if self.rank:
            self.store.wait([ALIKE], PATIENCE)
            return
        told = [json.loads(self.store.get(f"rank/{rank}")) for rank in range(self.world)]
        users: dict[str, int] = {}
        for rank, (other, its_uuid, size) in enumerate(told):
            if other != device:
                raise InputError(
                    f"calibrate: rank 0 has the device {device!r}, rank {rank} has {other!r}; "
                    "a profile describes one sort, so start ranks on equal devices"
                )
            if size != self.per_node or self.world % size:
                raise InputError(
                    f"calibrate: rank {rank} is one of {size} on its node, rank 0 of {self.per_node}; "
                    "start equally many ranks on each node"
                )
            if its_uuid and users.setdefault(its_uuid, rank) != rank:
                raise InputError(
                    f"calibrate: ranks {users[its_uuid]} and {rank} have the same GPU ({its_uuid}); "
                    "start one process a GPU"
                )
        self.store.set(ALIKE, "")

    def command(self, row: Measurement | None) -> None:
        """Rank 0: have all ranks measure a row, or end."""
        self.store.set(f"command/{self._commands}", END if row is None else row.model_dump_json())
        self._commands += 1

    def commands(self) -> Iterator[Measurement]:
        """The other ranks: rows to measure together with rank 0, until the end."""
        while True:
            key = f"command/{self._commands}"
            self.store.wait([key], PATIENCE)
            text = self.store.get(key).decode()
            self._commands += 1
            if text == END:
                return
            yield Measurement.model_validate_json(text)

    def agree(self, problem: str, members: list[int]) -> str:
        """The first problem that any member has with the present command; empty where none has."""
        prefix = f"agreement/{self._commands}"
        self.store.set(f"{prefix}/{self.rank}", problem)
        keys = [f"{prefix}/{rank}" for rank in members]
        self.store.wait(keys, PATIENCE)
        return next(filter(None, (self.store.get(key).decode() for key in keys)), "")

    def members(self, row: Measurement) -> list[int]:
        """Ranks of the group that a row is measured on."""
        return self._group_of(row).members(self.per_node)

    def group(self, row: Measurement) -> Any:
        """The process group of a row; every rank asks for it at the same time."""
        wanted = self._group_of(row)
        if wanted not in self.groups:
            self.groups[wanted] = self.new_group(row)
        return self.groups[wanted]

    def new_group(self, row: Measurement) -> Any:
        """A new process group of the same ranks."""
        return dist.new_group(self.members(row), timeout=PATIENCE)

    @staticmethod
    def _group_of(row: Measurement) -> Group:
        nodes = row.nodes or 1
        return Group(row.level, nodes, (row.ranks or 1) // nodes)
