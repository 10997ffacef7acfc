"""Which part of a training step the host works on, and where one pass ends and the next begins."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from spsim.engine.pieces import Pass
from spsim.pytorch.kineto.events import Event, Thread, intervals
from spsim.results.measured import MeasuredSpan

GRADIENT = re.compile(r"autograd::engine::|torch::autograd::|torch\.distributed\.ddp\.reducer::|\w+Backward\d*$")
"""How operators begin that compute gradients or reduce them; before torch 1.10 nothing encloses a `MmBackward`."""
OPTIMIZER, CLEARS = "Optimizer.step", "Optimizer.zero_grad"
USERS = ("Optimizer.", "ProfilerStep", "enumerate(DataLoader)")
"""How annotations begin that stand on threads of the user's program."""

Interval = tuple[float, float]


class Phases:
    """What each thread of the host works on, from the operators and annotations of a rank in order of their starts."""

    def __init__(self, events: Sequence[Event]) -> None:
        gradients: dict[Thread, list[Event]] = defaultdict(list)
        for event in events:
            if event.category == "cpu_op" and GRADIENT.match(event.name):
                gradients[event.thread].append(event)
        self._gradients = {thread: intervals(own) for thread, own in gradients.items()}
        self._engines = self._gradients.keys() - _users_threads(events, self._gradients)
        self._steps = intervals(event for event in events if event.name.startswith(OPTIMIZER))
        self._clears = intervals(event for event in events if event.name.startswith(CLEARS))

    def at(self, thread: Thread, time: float) -> Pass:
        """Gradients on a thread of autograd's engine, and inside its operators elsewhere; else forward."""
        if thread in self._engines or _inside(self._gradients.get(thread, ()), time):
            return "backward"
        return "optimizer" if _inside(self._steps, time) else "forward"

    def clears(self, time: float) -> bool:
        """Whether gradients are set to zero, which is no part of any pass."""
        return _inside(self._clears, time)


def _users_threads(events: Sequence[Event], gradients: dict[Thread, list[Interval]]) -> set[Thread]:
    """Threads of the user's program: those with its annotations, else the one with most operators beside gradients.

    Autograd's engine has threads of its own for devices, on which nothing but gradients is computed, hooks included.
    """
    annotated = {event.thread for event in events if event.name.startswith(USERS)}
    if annotated:
        return annotated
    beside: Counter[Thread] = Counter()
    covered: dict[Thread, float] = {}
    for event in events:
        if event.category == "cpu_op" and event.start >= covered.get(event.thread, event.start):
            covered[event.thread] = event.end
            beside[event.thread] += not _inside(gradients.get(event.thread, ()), event.start)
    return {thread for thread, count in beside.most_common(1) if count}


def _inside(found: Sequence[Interval], time: float) -> bool:
    index = bisect_right(found, (time, float("inf"))) - 1
    return index >= 0 and time <= found[index][1]


# Passes


@dataclass(frozen=True, slots=True)
class Issued:
    """A span, and what is known of the pass that it belongs to."""

    span: MeasuredSpan
    phase: Pass | None
    """None where the host's call is not in the file."""
    aside: bool = False
    """Whether it alone makes no pass: a copy, or gradients that are set to zero."""


def in_passes(issued: Sequence[Issued]) -> list[MeasuredSpan]:
    """The spans, in the order in which they were issued, with the pass that each belongs to.

    A pass is what is issued until the phase changes. What alone makes no pass, or is of an unknown one, belongs to the
    one under way. What follows a backward pass until an optimizer's step, gradient clipping for instance, belongs to
    the step.
    """
    begun: Counter[Pass] = Counter()
    found = []
    for phase, own in _joined(_steps_whole(_joined(_runs(issued)))):
        found += [replace(one.span, phase=phase, micro_batch=begun[phase]) for one in own]
        begun[phase] += 1
    return found


_Run = tuple[Pass, list[Issued]]


def _runs(issued: Sequence[Issued]) -> list[_Run]:
    """Rows of one phase; what alone makes none goes to the row before it, or else to the one after."""
    runs: list[_Run] = []
    waiting: list[Issued] = []
    for phase, rows in groupby(zip(_known(issued), issued, strict=True), key=lambda pair: pair[0]):
        own = [one for _, one in rows]
        if phase == "forward" and all(one.aside or one.phase is None for one in own):
            (runs[-1][1] if runs else waiting).extend(own)
        else:
            runs.append((phase, waiting + own))
            waiting = []
    if waiting:
        runs.append(("forward", waiting))
    return runs


def _known(issued: Sequence[Issued]) -> Iterator[Pass]:
    """The phase of each; where it is not known, that of the one before, or else of the first that is."""
    phase: Pass = next((one.phase for one in issued if one.phase is not None), "forward")
    for one in issued:
        phase = one.phase or phase
        yield phase


def _steps_whole(runs: Sequence[_Run]) -> Iterator[_Run]:
    """What stands between a backward pass and an optimizer's step becomes a part of the step."""
    for index, (phase, own) in enumerate(runs):
        around = [run[0] for run in (*runs[max(0, index - 1) : index], *runs[index + 1 : index + 2])]
        yield ("optimizer" if around == ["backward", "optimizer"] else phase), own


def _joined(runs: Iterable[_Run]) -> list[_Run]:
    """Neighbours of one phase as one."""
    return [
        (phase, [one for _, own in rows for one in own]) for phase, rows in groupby(runs, key=lambda run: run[0])
    ]  # fmt: skip
