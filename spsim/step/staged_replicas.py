"""What follows the last micro-batch on each of several pipeline stages, as a library synchronises their weights.

To a library each chunk of a stage is a model, with buckets or units of its own. What is reduced behind passes, or
gathered before them, is laid over the passes by `pipelined`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from spsim.engine.recording import BufferUse
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.step_rules import sends
from spsim.inputs.workload import ELEMENT_BYTES, Precision
from spsim.lazy import Cache, lazy
from spsim.program.assembly import ProgramsAt, one_replica, programs_at
from spsim.program.blocks.embedding import TABLE
from spsim.program.blocks.optimizer import parameter_state, shard_ranks
from spsim.program.instructions import Buffer, Program
from spsim.program.sizes import Template
from spsim.program.templates import step_template
from spsim.step.buckets import Parameter
from spsim.step.closing import Optimizer, StageClosings, replica_closings
from spsim.step.gradients import gradient_syncs, sums_beside
from spsim.step.groups import Groups, meets, replica_groups
from spsim.step.itinerary import Blocks, Chunk
from spsim.step.messages import Message, Synchronisation
from spsim.step.preparation import PreparedStep
from spsim.step.ranks import Groups as Communicators
from spsim.step.ranks import groups_of
from spsim.step.replicas import parameters_of, synchronisation
from spsim.step.replicated import root_of
from spsim.step.segments import BlockPass
from spsim.step.stages import Passes, PlacedChunk, Stages
from spsim.units import KIB, MIB


class StagedStep(PreparedStep):
    """The step of a plan of several stages."""

    def __init__(
        self, template: Template, plan: Plan, programs_at: ProgramsAt, optimizer: Optimizer, stages: Stages, *,
        fold: bool,
    ) -> None:  # fmt: skip
        state = parameter_state(plan, ELEMENT_BYTES[optimizer.precision])
        super().__init__(template, plan, programs_at, fold=fold, gradient_bytes=state.gradient, optimizer=optimizer)
        self.segments, self.closings = self.segments[: -len(self.closings)], ()  # each stage has its own
        self.of_stages = closings_of_stages(template, plan, optimizer, stages)
        if keeps_outputs(plan):
            self._keep()

    def _keep(self) -> None:
        """What is sent stays: torch's stages have it in their cache (`fwd_cache` of `pipelining/stage.py`)."""
        outputs = {name: own.outputs[0] for name, own in self.template.programs.items() if own.outputs}

        def freeing(blocks: Blocks) -> Blocks:
            return {name: {"backward": _freeing(own["backward"], outputs[name])}
                    for name, own in blocks.items() if name in outputs}  # fmt: skip

        made = {"backward": freeing(self.blocks), "weight gradients": freeing(self.halves.weights)}
        self.chunk_passes = Passes(self.blocks, self.halves, made)
        passes = [own["backward"] for blocks in made.values() for own in blocks.values()]
        variants = [made.parts[-1].segment for made in passes]
        self.segments = (*self.segments, *variants)
        self.owners |= {segment.name: self.owners[segment.variant_of] for segment in variants}

    @lazy
    def groups(self) -> Communicators:
        """Those of what closes the stages, too."""
        return groups_of(self.world, (*self.segments, *(made.segment for made in self.every_closing)))


def closings_of_stages(
    template: Template, plan: Plan, optimizer: Optimizer, stages: Stages
) -> dict[Chunk, StageClosings]:
    """What closes a step on the stages of each kind, by what they run."""
    made = StageSync(template, plan, optimizer, stages)
    firsts = [stages.kind_of.index(kind) for kind in range(len(stages.kinds))]
    return {runs: made.closings(first, runs, stages[first]) for runs, first in zip(stages.kinds, firsts, strict=True)}


def shares_embedding(template: Template, stages: Stages) -> bool:
    """Whether two stages hold the same table."""
    copies = {name for name, program in template.programs.items() if any(w.name == TABLE for w in program.weights)}
    own = [{run.block for run in runs} for runs in stages.kinds]
    return len(copies) > 1 and not any(copies <= blocks for blocks in own)


class StageSync:
    """How a library synchronises the weights of stages."""

    def __init__(self, template: Template, plan: Plan, optimizer: Optimizer, stages: Stages) -> None:
        self._template, self._plan, self._optimizer = template, plan, optimizer
        self._gradient_bytes = parameter_state(plan, ELEMENT_BYTES[optimizer.precision]).gradient
        self._groups: Groups = replica_groups(plan)
        self._shared = shares_embedding(template, stages)

    def closings(self, number: int, runs: Chunk, chunks: Sequence[PlacedChunk]) -> StageClosings:
        """Of the stages that run what the stage `number` does."""
        syncs = [self._synchronisation(number, place, chunk.runs) for place, chunk in enumerate(chunks)]
        whole = self._synchronisation(number, 0, runs)
        behind = any(sync.behind_backward for sync in syncs)
        ahead = any(sync.forward for sync in syncs)
        gathers = [sync.forward if ahead else sync.after_update for sync in syncs]
        merged = Synchronisation(
            reductions=tuple(own for sync in syncs[::-1] for own in sync.reductions),
            behind_backward=False,
            before_update=whole.before_update,
            after_update=tuple(message for own in gathers for message in own),
        )
        programs = {run.block: self._template.programs[run.block] for run in runs}
        syncs_of_tp = gradient_syncs(programs, self._plan, self._gradient_bytes)
        others = sums_beside(syncs_of_tp, whole.summed_over_tp, programs)
        reductions = [[message for own in sync.reductions for message in own.messages] for sync in syncs[::-1]]
        return StageClosings(
            replica_closings(merged, self._groups, programs, others, self._optimizer),
            self._meeting(reductions) if behind else (),
            self._meeting(gathers) if ahead else (),
        )

    def messages(
        self, number: int, runs: Chunk, chunks: Sequence[PlacedChunk]
    ) -> tuple[list[tuple[int, Message]], list[tuple[int, Message]], list[Message]]:
        """Those that close the step where none runs behind passes: buckets of gradients and of updated weights, with
        the chunk that each is of, and what is agreed on in between.
        """
        syncs = [(place, self._synchronisation(number, place, chunk.runs)) for place, chunk in enumerate(chunks)]
        reduced = [(place, sync.reductions) for place, sync in syncs[::-1]]
        return (
            [(place, own) for place, rows in reduced for row in rows for own in self._meet(row.messages)],
            [(place, own) for place, sync in syncs for own in self._meet(sync.after_update)],
            self._meet(self._synchronisation(number, 0, runs).before_update),
        )

    def _meet(self, messages: Sequence[Message]) -> list[Message]:
        return [message for message in messages if meets(message, self._groups)]

    def _meeting(self, messages: Sequence[Sequence[Message]]) -> tuple[int, ...]:
        """How many of the messages of each chunk have ranks to meet; empty where none has."""
        counts = [len(self._meet(own)) for own in messages]
        return tuple(counts) if any(counts) else ()

    def _synchronisation(self, stage: int, chunk: int, runs: Chunk) -> Synchronisation:
        """Of the blocks of a chunk, kept: many plans have the same weights."""
        key = self._weights(runs), self._options, self._shared, (stage, chunk) == (0, 0)
        return _known.get(key, lambda: self._found(stage, chunk, runs))

    def _parameters(self, runs: Chunk) -> tuple[Parameter, ...]:
        """Of the blocks of a chunk, kept for other plans."""

        def found() -> tuple[Parameter, ...]:
            own = parameters_of(self._template.programs[run.block] for run in runs for _ in range(run.count))
            return tuple([p._replace(shared=True) if self._shared and p.name == TABLE else p for p in own])

        return _parameters.get((self._weights(runs), self._shared), found)

    def _weights(self, runs: Chunk) -> tuple[object, ...]:
        """What stands for those of a chunk."""
        numbers = weight_numbers(self._template)
        return tuple([(numbers[run.block], run.count, run.numbered) for run in runs])

    @lazy
    def _options(self) -> tuple[object, ...]:
        """What `synchronisation` reads of a plan."""
        plan = self._plan
        return (
            plan.dp_library, plan.zero, plan.zero_stage, plan.dp_overlap, plan.bucket_elements, plan.grad_dtype,
            plan.norm_gradients, plan.fsdp_ends, plan.tp > 1, plan.pp > 1, shard_ranks(plan),
            plan.shard_group in (None, plan.dp), self._optimizer.precision,
        )  # fmt: skip

    def _found(self, stage: int, chunk: int, runs: Chunk) -> Synchronisation:
        return synchronisation(
            self._parameters(runs), self._plan, self._optimizer.precision, stage=stage, chunk=chunk, root=root_of(runs)
        )


_parameters: Cache[tuple[Parameter, ...]] = Cache(16 * MIB, lambda own: KIB * len(own) // 8)
_known: Cache[Synchronisation] = Cache(16 * MIB, lambda made: KIB * len(made.reductions))
_numbers: Cache[object] = Cache(1024, lambda _: 1)


@lru_cache(maxsize=256)
def weight_numbers(template: Template) -> Mapping[str, object]:
    """What stands for the weights of each block and the sums over tp of their gradients, the same for equal ones: a key
    of them all takes long to compare.
    """

    def number(own: Program) -> object:
        sums = tuple([(at, sync) for at, sync in enumerate(own.weight_sync) if sync.axes == ("tp",)])
        return _numbers.get((own.weights, sums, own.weight_casts), object)

    return {name: number(own) for name, own in template.programs.items()}


def keeps_outputs(plan: Plan) -> bool:
    """Whether a stage keeps what it has sent."""
    return not plan.pp_deallocate or sends(plan) == "torch"


def _freeing(own: BlockPass, output: Buffer) -> BlockPass:
    """The pass with a buffer more, there before, that goes with its last kernel."""
    *before, last = own.parts
    segment = last.segment
    freed = BufferUse(output.tensor, "activations", None, (segment.outline.last_kernel or 0,), outlives=False)
    made = replace(
        segment,
        name=f"{segment.name}, output freed",
        buffers=(*segment.buffers, freed),
        buffer_ids=(*segment.buffer_ids, output.id),
        variant_of=segment.name,
    )
    return replace(own, parts=(*before, replace(last, segment=made)))


_steps: Cache[StagedStep] = Cache(64 * MIB, lambda step: step.nbytes)


def staged_step(
    model: Model, plan: Plan, fold: bool, precision: Precision, stages: Stages, *, single: bool = False
) -> StagedStep:
    """The whole of a model on several stages, which are its own and its plan's."""
    return _steps.get(
        (stages, fold, precision, single),
        lambda: StagedStep(
            step_template(model, one_replica(plan), precision, single=single),
            plan,
            programs_at(model, plan, precision),
            Optimizer(plan, precision),
            stages,
            fold=fold,
        ),
    )
