"""What is left of the exchanges with experts where another micro-batch runs beside them.

Under `overlap_moe_expert_parallel_comm` of Megatron-Core the forward pass of one micro-batch and the backward pass of
the one before it run layer by layer on one stream of kernels, the exchanges of both on another:

| exchange | kernels beside it, of the other micro-batch |
|---|---|
| dispatch, forward | experts, backward |
| combination, forward | all but the experts, backward |
| combination, backward: its gradient goes to experts | all but the experts, forward |
| dispatch, backward: its gradient comes back | experts, forward |

Unless one graph holds the iteration, or experts are padded to a capacity, the host waits for counts of tokens before
it launches a dispatch of the forward pass, which then has nothing beside it. With `delay_wgrad_compute` products for
the weights of experts run last, so that they stand beside either exchange of the first and the last line. Kernels
beside an exchange lose the share of the device that it holds: of an exchange of c seconds beside kernels of k is left
what they do not hide, or what they lose, max(c - k, share x c). A pass that has no other beside it, the first forward
and the last backward pass of each of the stages that fill and drain, has all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from spsim.engine.pieces import Pass
from spsim.inputs.plan import Plan
from spsim.program.instructions import Communication, Compute, Instruction
from spsim.program.mesh import EXPERT_AXES
from spsim.program.routing import HELD
from spsim.program.sizes import Index
from spsim.step.segments import BlockPass
from spsim.work import Gemm

PHASES: tuple[Pass, ...] = ("forward", "backward")

Slots = npt.NDArray[np.intp]


class Exchanges(NamedTuple):
    """Some of one layer, with the kernels of the other micro-batch that run beside them."""

    slots: Slots
    """Of their durations."""
    kernels: Slots
    share: float | None
    """Of the device that they hold; what the profile says of a collective unless given."""


class Hidden:
    """The exchanges of the layers of a step, and what is left of them."""

    def __init__(
        self,
        blocks: Mapping[str, Mapping[Pass, BlockPass]],
        indices: Mapping[str, Index],
        stages: int,
        *,
        delayed: bool,
        waits: bool = False,
    ) -> None:
        """`delayed` where weight gradients run behind what is sent next; `waits` where the host launches the way to
        experts only when it knows how many tokens go, behind all that was launched before.
        """
        self._stages = stages
        self._own = [found for name, own in blocks.items() for found in _of_layer(own, indices[name], delayed, waits)]

    def leave(self, seconds: npt.NDArray[np.float64], share: float, micro_batches: int) -> None:
        """Put what is left of exchanges in their place, a mean of those with and without another pass beside them; a
        collective holds a `share` of the device.
        """
        alone = min(1.0, self._stages / micro_batches)
        for own in self._own:
            sent, beside = float(seconds[own.slots].sum()), float(seconds[own.kernels].sum())
            left = max(sent - beside, sent * (share if own.share is None else own.share))
            seconds[own.slots] *= alone + (1 - alone) * left / sent


def hidden_by(plan: Plan) -> tuple[bool, bool]:
    """Whether exchanges with experts run beside passes of another micro-batch, and weight gradients behind them."""
    hides = plan.moe_a2a_overlap and plan.ep > 1
    return hides, hides and plan.delay_wgrad


def hidden(plan: Plan, blocks: Mapping[str, Mapping[Pass, BlockPass]], indices: Mapping[str, Index]) -> Hidden | None:
    """What a plan hides of exchanges, if it does."""
    hides, delayed = hidden_by(plan)
    waits = plan.cuda_graphs != "full_iteration" and plan.moe_capacity_factor is None
    return Hidden(blocks, indices, plan.pp, delayed=delayed, waits=waits) if hides else None


class _Pass(NamedTuple):
    """What a layer with experts does in one pass."""

    to: list[Communication]
    """Exchanges that bring tokens, or gradients, to experts;"""
    back: list[Communication]
    """from them;"""
    experts: list[Compute]
    """kernels between them,"""
    others: list[Compute]
    """and all others."""


def _of_layer(passes: Mapping[Pass, BlockPass], index: Index, delayed: bool, waits: bool) -> Iterator[Exchanges]:
    own = [_split(passes[phase]) for phase in PHASES if phase in passes]
    if len(own) < len(PHASES) or not own[0].to:
        return
    forward, backward = own
    tokens = [(forward.to, backward.experts), (backward.back, forward.experts)]
    if waits:
        tokens = tokens[1:]
    elif delayed:
        tokens = [(forward.to + backward.back, backward.experts + forward.experts)]
    for sent, beside in (*tokens, (forward.back, backward.others), (backward.to, forward.others)):
        library = sent[0].dispatch
        yield Exchanges(_slots(sent, index), _slots(beside, index), None if library is None else HELD[library.library])


def _split(own: BlockPass) -> _Pass:
    steps = [step for part in own.parts for step in part.segment.instructions]
    products = [place for place, step in enumerate(steps) if isinstance(step, Compute) and _is_grouped(step)]
    moved = [place for place, step in enumerate(steps) if isinstance(step, Communication) and step.axis in EXPERT_AXES]
    to = [place for place in moved if products and place < products[0]]
    back = [place for place in moved if products and place > products[-1]]
    if not to or not back:
        return _Pass([], [], [], [])
    kernels = [(place, step) for place, step in enumerate(steps) if isinstance(step, Compute)]
    inside = [step for place, step in kernels if to[-1] < place < back[0]]
    outside = [step for place, step in kernels if not to[-1] < place < back[0]]
    there, from_there = (
        [step for place in places if isinstance(step := steps[place], Communication)] for places in (to, back)
    )
    return _Pass(there, from_there, inside, outside)


def _is_grouped(step: Compute) -> bool:
    return any(isinstance(work, Gemm) and (work.launched or work.grouped) for work in step.work)


def _slots(steps: Sequence[Instruction], index: Index) -> Slots:
    return np.array([index.slots[step.id][0] for step in steps], dtype=np.intp)
