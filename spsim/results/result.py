"""What one simulation found."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spsim.costs.models import cost_models
from spsim.costs.static_memory import StaticMemory
from spsim.engine.pieces import Pass
from spsim.engine.trace import Trace
from spsim.lazy import lazy
from spsim.program.instructions import Communication, Compute, Program
from spsim.program.mesh import nodes_of
from spsim.program.operators import TensorKind
from spsim.program.placement import sent_bytes
from spsim.program.sizes import Numbers
from spsim.results import metrics, tables
from spsim.results.derived import STATIC, Amounts, Derived, Simulated, operator_name
from spsim.results.figures import documented
from spsim.results.selection import Selection, select
from spsim.results.uncertainty import Account, ErrorBand, has_flags, is_calibrated
from spsim.step.preparation import PreparedBlock
from spsim.units import seconds
from spsim.work import FlashAttention

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2
"""Of the documents of `run --json` and `compare --json`; 1 had no number."""


@dataclass(frozen=True)
class Result(Derived):
    """What one simulation found; times in seconds, memory in GiB, tables as pandas frames."""

    scope: str
    """What a step contains: `layers` of one pipeline stage, or a `module`."""
    scenario: Simulated
    block: PreparedBlock
    numbers: Numbers
    amounts: Amounts
    trace: Trace
    static: StaticMemory
    events: int
    """Tasks that went through the engine."""
    folded: bool
    reasons: tuple[str, ...]

    @property
    def unknown(self) -> frozenset[str]:
        """Figures that it does not have."""
        return frozenset({"tokens_per_s_per_gpu"}) if self.amounts.tokens is None else frozenset()

    @lazy
    def program(self) -> Program:
        """One layer under the plan."""
        return self.block.program_at(self.scenario.workload)

    @lazy
    def attention(self) -> str | None:
        """The fused kernel of core attention by its name, or `unfused`; none where nothing is known to attend."""
        steps = (step for segment in self.block.segments for step in segment.instructions if isinstance(step, Compute))
        works = (work for step in steps for work in step.work if isinstance(work, FlashAttention))
        names = sorted({self.scenario.hardware.attention_kernel(work.kernel) for work in works})
        return ", ".join(names) or ("unfused" if self.scope != "module" else None)

    @lazy
    def assumed(self) -> tuple[str, ...]:
        """Assumed coefficients that a duration of this run came from."""
        return _assumed_inputs(self.scenario, self.block)

    @lazy
    def notes(self) -> tuple[str, ...]:
        """Settings without effect, and what durations hang on beyond the bytes."""
        return (*self.scenario.notes, *_remarks(self))

    @lazy
    def _account(self) -> Account:
        return Account(
            self.scenario.hardware,
            self.scenario.workload.precision,
            self.scenario.gpus_per_node,
            self.block,
            self.trace,
        )

    @lazy
    def flagged(self) -> tuple[str, ...]:
        """Classes of coefficients in use whose calibration missed its error limit."""
        return self._account.flagged() if has_flags(self.scenario.hardware) else ()

    @lazy
    def error_band(self) -> ErrorBand | None:
        """Errors of the times from those of the coefficients, see `uncertainty`; None without a calibration."""
        return self._account.band() if is_calibrated(self.scenario.hardware) else None

    # Times

    @lazy
    def step_ps(self) -> int:
        """See `Derived`."""
        return self.trace.end_ps

    @lazy
    def pass_ps(self) -> Mapping[str, int]:
        """See `Derived`."""
        phases: tuple[Pass, ...] = ("forward", "backward")
        return {phase: metrics.layer_window(self.trace, phase) for phase in phases}

    @lazy
    def _idle(self) -> dict[int, metrics.Idle]:
        return metrics.idle(self.trace)

    @lazy
    def exposed_ps(self) -> int:
        """See `Derived`."""
        return max(own.communication for own in self._idle.values())

    @property
    def idle_s(self) -> dict[str, float]:
        """What kernels wait for beyond that, each on the rank with most of it: a peer that comes later to a
        collective, a message of another stage, or a dependency without any communication.
        """
        names = ("peer", "stage", "dependency")
        return {name: seconds(max(getattr(own, name) for own in self._idle.values())) for name in names}

    @lazy
    def weight_sync_ps(self) -> int:
        """See `Derived`."""
        return metrics.weight_sync(self.trace)

    @lazy
    def compute_ps(self) -> Mapping[str, int]:
        """See `Derived`."""
        return metrics.compute_by_class(self.trace, next(iter(self.trace.copies)))

    # Memory

    @lazy
    def peak(self) -> metrics.Peak:
        """The fullest rank, when, and by which task."""
        return metrics.peak_memory(self.trace, self.static.total)

    @lazy
    def peak_bytes(self) -> int:
        """See `Derived`."""
        return self.peak.bytes

    @property
    def peak_operator(self) -> str:
        """The operator whose allocation makes the peak."""
        return self._task_name(self.peak.task)

    def _task_name(self, task: int | None) -> str:
        if task is None:
            return STATIC
        piece = self.trace.piece_of(task)
        return operator_name(piece.recording.outline.labels[task - piece.first_task], piece.layer)

    @property
    def out_of_memory_at(self) -> str | None:
        """The operator at which memory runs out, if it does."""
        if self.fits:
            return None
        if self.static.total > self.limit:
            return self._task_name(None)
        return self._task_name(metrics.first_above(self.trace, self.peak.rank, self.static.total, self.limit))

    def saved_bytes(self, *categories: TensorKind) -> int:
        """See `Derived`."""
        kept = zip(self.numbers.template.program.saved, self.numbers.saved, strict=True)
        return sum(size for saved, size in kept if saved.category in categories)

    # Communication

    @lazy
    def collectives_per_layer(self) -> dict[str, dict[str, int]]:
        """Number of collectives of one layer and micro-batch, by pass and kind."""
        found: dict[str, dict[str, int]] = {"forward": {}, "backward": {}}
        for phase, own in self.block.passes.items():
            counts: Counter[str] = Counter()
            for part in own.parts:
                steps = (step for step in part.segment.instructions if isinstance(step, Communication))
                for step in steps:
                    counts[step.collective] += part.runs
            found[phase] = dict(sorted(counts.items()))
        return found

    @lazy
    def comm_bytes_per_gpu_by_op(self) -> dict[str, int]:
        """Bytes that one GPU sends in a step, by kind of collective."""
        total: dict[str, int] = defaultdict(int)
        layers = self.scenario.model.layers
        messages, instances = self.block.template.index.messages, layers * self.scenario.num_micro_batches
        for own in self.block.passes.values():
            for part in own.parts:
                for step in part.segment.instructions:
                    if isinstance(step, Communication):
                        message = int(self.numbers.values[messages[step.id]])
                        sent = sent_bytes(step.collective, message, step.ranks)
                        total[step.collective] += instances * part.runs * sent
        for sync, message in zip(self.block.syncs, self.block.sync_messages(self.numbers, layers), strict=True):
            total[sync.collective] += sent_bytes(sync.collective, message, sync.ranks)
        return dict(sorted(total.items()))

    # Tables and pictures

    @lazy
    def spans(self) -> pd.DataFrame:
        """One row per span and rank; see `tables.spans_frame`."""
        return tables.spans_frame(self.trace)

    @lazy
    def memory_curve(self) -> pd.DataFrame:
        """Memory by category over time; see `tables.memory_frame`."""
        return tables.memory_frame(self.trace, self.static.by_category())

    @lazy
    def operators(self) -> pd.DataFrame:
        """Time of the first rank by operator; see `tables.operators_frame`."""
        return tables.operators_frame(self.trace)

    def plot_timeline(self, path: str | Path, **options: Any) -> None:
        """Draw the lanes of the ranks; see `plots.plot_timeline`."""
        from spsim import plots

        plots.save(plots.plot_timeline(self, **options), Path(path))

    def plot_memory(self, path: str | Path, **options: Any) -> None:
        """Draw memory by category over time; see `plots.plot_memory`."""
        from spsim import plots

        plots.save(plots.plot_memory(self, **options), Path(path))

    def select(self, *, ranks: Sequence[int] | None = None, layers: Sequence[int] | None = None) -> Selection:
        """What is written out, the ranks and layers named or what says all; see `results.selection`."""
        scenario = self.scenario
        return select(
            self.trace, scenario.model.layers, scenario.num_micro_batches, ranks=ranks, of_layers=layers
        )  # fmt: skip

    def to_chrome_trace(
        self, path: str | Path, *, ranks: Sequence[int] | None = None, layers: Sequence[int] | None = None
    ) -> None:
        """Write a trace for Perfetto or chrome://tracing, compressed if the name ends in `.gz`; of one rank of each
        class unless ranks are named; see `export.chrome_trace`.
        """
        from spsim.export import chrome_trace

        chrome_trace.write_chrome_trace(self, Path(path), self.select(ranks=ranks, layers=layers))

    def to_kineto_traces(
        self, directory: str | Path, *, ranks: Sequence[int] | None = None, layers: Sequence[int] | None = None
    ) -> None:
        """Write a file a rank as torch.profiler does, `rank_0.json.gz` and so on; see `export.kineto`."""
        from spsim.export import kineto

        kineto.write_kineto_traces(self, Path(directory), self.select(ranks=ranks, layers=layers))

    def to_json(self) -> dict[str, Any]:
        """The document of `run --json`."""
        scenario = self.scenario
        return {
            "schema_version": SCHEMA_VERSION,
            "scope": self.scope,
            "hardware": scenario.hardware.name,
            "model": scenario.model.name,
            "plan": scenario.plan.model_dump(),
            "workload": scenario.workload.model_dump(),
            "gpus": scenario.plan.gpus,
            "attention": self.attention,
            **dict(documented(self)),
            "engine": {"events": self.events, "folded": self.folded, "reasons": list(self.reasons)},
            "assumed": list(self.assumed),
            "flagged": list(self.flagged),
            "error_band": None if self.error_band is None else asdict(self.error_band),
            "notes": list(self.notes),
        }


def _assumed_inputs(scenario: Simulated, block: PreparedBlock) -> tuple[str, ...]:
    hardware = scenario.hardware
    compute, comm = cost_models(hardware, scenario.workload.precision)
    used = {"memory"}
    for segment in block.segments:
        for step in segment.instructions:
            if isinstance(step, Compute):
                used |= {path for work in step.work if work for path in compute.coefficients_of(work)}
            else:
                nodes = nodes_of(block.mesh, (step.axis,), scenario.gpus_per_node, step.ranks)
                used |= {*comm.coefficients_of(step.collective, nodes), "overlap_slowdown"}
    return tuple(sorted(p for p in hardware.assumed if any(p == u or p.startswith(f"{u}.") for u in used)))


def _remarks(result: Result) -> tuple[str, ...]:
    scenario = result.scenario
    _, comm = cost_models(scenario.hardware, scenario.workload.precision)
    found: dict[str | None, None] = {}
    for step in (step for section in result.program.sections for step in section.instructions):
        if isinstance(step, Communication):
            nodes = nodes_of(result.block.mesh, (step.axis,), scenario.gpus_per_node, step.ranks)
            found[comm.remark(step.collective, step.message_bytes, step.ranks, nodes)] = None
    return tuple(remark for remark in found if remark)
