"""What the ranks of each pipeline stage do, written out: instructions, passes as visits, and what closes the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spsim.inputs.schedules import Schedule
from spsim.step.closing import Closing
from spsim.step.folding import Step
from spsim.step.itinerary import Visit, visits
from spsim.step.perturbed import Perturbed, Ran
from spsim.step.pipeline.messages import Instruction, Message, Run
from spsim.step.pipeline.orders import Action
from spsim.step.pipeline.tape import Score
from spsim.step.pipelined import Closed, Messages
from spsim.step.preparation import PreparedStep
from spsim.step.ranks import Ranks
from spsim.step.segments import Segment
from spsim.step.stages import Passes, Stages, work_of


@dataclass(frozen=True)
class WrittenStage:
    """What the ranks of a stage do: the instructions, and then what closes the step."""

    number: int
    row: Sequence[Instruction]
    passes: Mapping[Action, Sequence[Visit]]
    closing: Sequence[Visit]
    step: Step


def written_stages(
    passes: Passes,
    stages: Stages,
    score: Score,
    step: Step,
    closed: Closed,
    ranks: Ranks,
    perturbed: PerturbedStages | None,
) -> list[WrittenStage]:
    """All stages; the step is without what closes it."""
    steps = [_with_closing(step, own, ranks) for own in closed.segments]
    if perturbed is not None:
        steps = [perturbed.step(stage, own) for stage, own in enumerate(steps)]
    return [
        _written(passes, stages, stage, row, score.stages.schedule, steps[stage], closed)
        for stage, row in enumerate(score.rows())
    ]


def _written(
    passes: Passes,
    stages: Stages,
    stage: int,
    row: Sequence[Instruction],
    schedule: Schedule,
    step: Step,
    closed: Closed,
) -> WrittenStage:
    found = {}
    for action in (instruction.action for instruction in row if isinstance(instruction, Run)):
        runs, first = stages[stage][action.chunk]
        work = work_of(schedule, len(stages), stage, action)
        found[action] = [*visits(passes.items(runs, work, first=first, micro_batch=action.micro_batch))]
    return WrittenStage(stage, row, found, [Visit(made.segment) for made, _ in closed.segments[stage]], step)


def _with_closing(step: Step, closing: Sequence[tuple[Closing, Sequence[int]]], ranks: Ranks) -> Step:
    """With what follows the last micro-batch on a stage."""
    own = [(made.segment, ps) for made, ps in closing]
    return Step(
        (),
        {**step.programs, **{segment.name: ranks.programs(segment) for segment, _ in own}},
        {**step.durations, **{segment.name: dict.fromkeys(ranks.copies, ps) for segment, ps in own}},
        {**step.sizes, **{segment.name: () for segment, _ in own}},
        step.slowdown,
    )


class PerturbedStages(NamedTuple):
    """What perturbations do to the ranks of each stage."""

    perturbed: Perturbed
    prepared: PreparedStep
    empty: tuple[Step, Messages, Closed]
    """The step with empty messages: what it takes are latencies."""

    def step(self, stage: int, step: Step) -> Step:
        """That of a stage, with its closing."""
        own, _, closed = self.empty
        closing = closed.segments[stage]
        segments = {s.name: s for s in (*self.prepared.segments, *(made.segment for made, _ in closing))}
        return self.perturbed.step(step, _with_closing(own, closing, self.prepared.ranks), segments.values(), stage)

    def transfer_ps(self, rank: int, messages: Messages) -> Mapping[tuple[int, int], int]:
        """Picoseconds of a message of a rank of a stage and its counterpart on another."""
        on_stage, latencies = self.prepared.ranks.on_stage, self.empty[1].transfer_ps
        return {
            (one, other): self.perturbed.message_ps(
                on_stage(one, rank), on_stage(other, rank), ps, latencies[one, other]
            )
            for (one, other), ps in messages.transfer_ps.items()
        }

    def ran(self, rank: int, every: Iterable[Segment | Message]) -> Sequence[Ran]:
        """What a rank of a stage and its counterparts run, by ranks of the world."""
        on_stage = self.prepared.ranks.on_stage
        return [
            (on_stage(made.sender, rank), on_stage(made.receiver, rank)) if isinstance(made, Message) else made
            for made in every
        ]
