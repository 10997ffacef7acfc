"""Collectives of NCCL: what torch wrote about the call that a kernel belongs to."""

from __future__ import annotations

import re

from spsim.engine.recording import COMPUTE_LANE
from spsim.pytorch.kineto.events import Event
from spsim.pytorch.kineto.names import COMMUNICATION, ITEMSIZES, collective, short_name
from spsim.pytorch.kineto.profile import Enclosing, ProfiledRank
from spsim.results.measured import COPY_LANE, MeasuredSpan

UNNAMED = ("", "undefined")
ANNOTATION = re.compile("(n|r|x|one|h|u)cc(l)?:")
"""How the annotation of a call of a backend of c10d begins: `nccl:all_to_all`."""
C10D = "c10d::"


class Calls:
    """The calls of one rank.

    torch 2.3 and later write collective, sizes and group on the kernel or on `record_param_comms`. Before, the launch
    lies in an annotation named after the collective, which has the inputs, inside an operator of c10d, which has inputs
    and outputs; both with `record_shapes` only. The group is not named there: an all-gather whose output is not
    recorded is taken to be of the only group that the file lists, or of all ranks.
    """

    def __init__(self, profile: ProfiledRank) -> None:
        host = profile.of("cpu_op", "user_annotation")
        self.rank = profile.rank
        self.described = {
            event.identifier("External id"): event
            for event in host
            if event.name == "record_param_comms" and "Collective name" in event.arguments
        }
        self.annotations = Enclosing([event for event in host if ANNOTATION.match(event.name)])
        self.operators = Enclosing([event for event in host if event.name.startswith(C10D)])
        groups = set(profile.groups)
        self.ranks = len(groups.pop()) if len(groups) == 1 else 0 if groups else profile.world

    def span(self, kernel: Event, launch: Event | None) -> MeasuredSpan:
        """A kernel as the collective that it is, if anything says so."""
        call = kernel if "Collective name" in kernel.arguments else self.described.get(kernel.identifier("External id"))
        if call is not None:
            return self._described(kernel, call)
        annotation = launch and self.annotations.at(launch.thread, launch.start)
        operator = launch and self.operators.at(launch.thread, launch.start)
        kind = next((kind for event in (annotation, operator) if event and (kind := collective(event.name))), "")
        kind = kind or collective(kernel.name)
        return self._span(kernel, kind, "nccl", self._bytes(kind, annotation, operator))

    def _described(self, kernel: Event, call: Event) -> MeasuredSpan:
        """With what torch wrote of the call."""
        description, name = call.text("Process Group Description"), call.text("Process Group Name")
        named = description not in (*UNNAMED, COMPUTE_LANE, COPY_LANE)
        lane = description if named else f"group {name}" if name else "nccl"
        elements = max(call.count(f"{side} msg nelems") for side in ("In", "Out"))
        kind = collective(call.text("Collective name")) or collective(kernel.name)
        return self._span(kernel, kind, lane, elements * ITEMSIZES.get(call.text("dtype"), 0), call.ranks())

    def _bytes(self, kind: str, annotation: Event | None, operator: Event | None) -> int:
        """Bytes of the message by the shapes of its tensors, as nccl-tests count; 0 where they are not recorded."""
        itemsize = next((size for event in (annotation, operator) if event and (size := event.itemsize())), 0)
        inputs = sum(annotation.elements()) if annotation else 0
        either = max(operator.elements(), default=0) if operator else 0
        if kind == "all_gather" and either <= inputs:
            return itemsize * inputs * self.ranks
        return itemsize * max(inputs, either)

    def _span(
        self, kernel: Event, kind: str, lane: str, message_bytes: int, group: tuple[int, ...] = ()
    ) -> MeasuredSpan:
        return MeasuredSpan(
            self.rank, lane, kind or short_name(kernel.name), COMMUNICATION, kernel.start, kernel.end, collective=kind,
            message_bytes=message_bytes, group=group,
        )  # fmt: skip
