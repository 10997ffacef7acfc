"""A step of inference, prepared: the passes of a prompt one after another, or of one token; forward only."""

from __future__ import annotations

from itertools import groupby

from spsim.engine.pieces import Pass
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.workload import Workload
from spsim.lazy import Cache
from spsim.program.assembly import EMBEDDING, HEAD
from spsim.program.instructions import LAYER
from spsim.program.recipes import in_precision
from spsim.program.serving import block_of, serving_programs
from spsim.program.sizes import Numbers
from spsim.program.templates import serving_key, serving_template
from spsim.step.itinerary import Chunk, Item, Loop, Run, Runs, chunk_pass
from spsim.step.preparation import PreparedStep
from spsim.units import MIB

FORWARD: Pass = "forward"
_steps: Cache[PreparedServing] = Cache(32 * MIB, lambda step: step.nbytes)


class PreparedServing(PreparedStep):
    """All ranks wait for the slowest of them, and weights are those of one pass, however many there are."""

    @property
    def whole_step(self) -> bool:
        """It has no optimizer."""
        return True

    def itinerary(self, chunk: Chunk, micro_batches: Runs) -> tuple[Item, ...]:
        """The passes of the blocks, each from its embedding on."""
        body: list[Loop] = []
        starts = [place for place, run in enumerate(chunk) if run.block.startswith(EMBEDDING)]
        for place, (start, end) in enumerate(zip(starts, (*starts[1:], len(chunk)), strict=True)):
            # Chunks of a prompt are numbered as micro-batches: they are what passes one after another.
            body += chunk_pass(self.blocks, chunk[start:end], FORWARD, micro_batch=place)
        return (Loop(tuple(body), micro_batches, micro_batches=1),)

    def parameters(self, numbers: Numbers, chunk: Chunk) -> int:
        """Of all blocks of a rank."""
        return super().parameters(numbers, _once(chunk))

    def weight_bytes(self, chunk: Chunk) -> int:
        """Of these, with all copies that products read cast."""
        return super().weight_bytes(_once(chunk))


def _once(chunk: Chunk) -> Chunk:
    """The blocks of one pass, which all share their weights."""
    return [run for run in chunk if " " not in run.block]


def serving_chunk(model: Model, workload: Workload) -> Chunk:
    """What a rank runs of a step."""
    found: list[Run] = []
    kinds = {own: kind for kind, own in enumerate(model.types)}
    alike = [(kinds[own], sum(1 for _ in some)) for own, some in groupby(map(model.type_of, range(model.layers)))]
    for place, _ in enumerate(workload.passages):
        found.append(Run(block_of(EMBEDDING, place), numbered=False))
        found += [Run(block_of(LAYER, place, kind), count) for kind, count in alike]
    return (*found, *([Run(HEAD, numbered=False)] if model.head_rows else []))


def caches(model: Model, step: PreparedStep) -> list[tuple[int, int | None]]:
    """Bytes of a token of a sequence on a rank, of the layers of each type together, and the window that keeps it."""
    types = enumerate(model.types.items())
    own = [(block_of(LAYER, 0, kind), count, model.of_type(type_).sliding_window) for kind, (type_, count) in types]
    return [(count * step.template.programs[name].cache_token_bytes, window) for name, count, window in own]


def prepared_serving(model: Model, plan: Plan, fold: bool, workload: Workload) -> PreparedServing:
    """A step of inference under a plan; `fold` simulates identical ranks once."""
    return _steps.get(
        (*serving_key(model, plan, workload), fold),
        lambda: PreparedServing(
            serving_template(model, plan, workload),
            plan,
            lambda own: serving_programs(model, plan, in_precision(own, workload.precision)),
            fold=fold,
        ),
    )
