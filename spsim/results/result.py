"""What one simulation found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spsim.costs.static_memory import StaticMemory
from spsim.engine.trace import Trace
from spsim.lazy import lazy
from spsim.program.instructions import LAYER, Compute, Instruction, Program
from spsim.program.operators import TensorKind
from spsim.program.sizes import Numbers
from spsim.results import accounts, bands, metrics, tables
from spsim.results.added import Added
from spsim.results.bands import Band
from spsim.results.calls import Call, calls, per_layer, remarks, sent_by_kind
from spsim.results.derived import Amounts, Simulated, operator_name
from spsim.results.document import brief, document
from spsim.results.figures import unknown_in
from spsim.results.selection import Selection, select
from spsim.results.sensitivity import Effect, known_effects, unmeasured_in_use
from spsim.results.served import Served
from spsim.results.stage_peaks import running_out, stage_peaks
from spsim.results.staged import Spot, Staged
from spsim.results.uncertainty import Account, ErrorBand, has_flags, is_calibrated
from spsim.results.waterfall import waterfall
from spsim.step.itinerary import Chunk
from spsim.step.preparation import PreparedStep
from spsim.step.segments import Segment
from spsim.step.sums import PASSES
from spsim.units import seconds
from spsim.work import FlashAttention

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class Result(Served):
    """What one simulation found; times in seconds, memory in GiB, tables as pandas frames."""

    scope: str
    """What a step contains: all of the training `step`, its `layers`, all of a `module`'s step, or its `passes`."""
    scenario: Simulated
    prepared: PreparedStep
    chunk: Chunk
    """What a rank runs of a micro-batch."""
    numbers: Numbers
    amounts: Amounts
    trace: Trace
    statics: Mapping[int, StaticMemory]
    """Of each simulated rank."""
    events: int
    """Tasks that went through the engine."""
    folded: bool
    reasons: tuple[str, ...]
    staged: Staged | None = None
    """Where the step has several pipeline stages."""
    added: Added | None = None
    """Where pieces of the trace are written when they are read."""
    sends: Sequence[int] = (0, 0)
    """Messages of the first of them to others in a step, and bytes of each."""
    perturbations: Sequence[str] = ()
    """What perturbs the step, in words."""

    @property
    def unknown(self) -> frozenset[str]:
        """Figures that it does not have."""
        of_tokens = {"tokens_per_s_per_gpu"} if self.amounts.tokens is None else set()
        return unknown_in(self.scope) | of_tokens

    @lazy
    def program(self) -> Program:
        """One layer under the plan."""
        return self.programs[LAYER]

    @lazy
    def programs(self) -> Mapping[str, Program]:
        """Each block under the plan, with the sizes of the workload."""
        return self.prepared.programs_at(self.scenario.workload)

    def instructions_of(self, segment: Segment) -> list[Instruction]:
        """What the tasks of a segment carry out, with the sizes of the workload."""
        own = self._by_id[self.prepared.owners[segment.name]] if segment.instructions else {}
        return [own[step.id] for step in segment.instructions]

    @lazy
    def _by_id(self) -> dict[str, dict[int, Instruction]]:
        return {
            name: {step.id: step for section in program.sections for step in section.instructions}
            for name, program in self.programs.items()
        }

    @lazy
    def attention(self) -> str | None:
        """The fused kernel of core attention by its name, or `unfused`; none where nothing is known to attend."""
        steps = (step for segment in self.prepared.segments for step in segment.instructions)
        every = (work for step in steps if isinstance(step, Compute) for work in step.work)
        works = (work for work in every if isinstance(work, FlashAttention))
        names = sorted({self.scenario.hardware.attention_kernel(work.kernel) for work in works})
        return ", ".join(names) or ("unfused" if self.scope in ("step", "layers") else None)

    @lazy
    def assumed_effects(self) -> Mapping[str, Effect | None] | None:
        """What coefficients that nobody measured on the device do to the result: see `results.sensitivity`."""
        return known_effects(self)

    @property
    def assumed(self) -> tuple[str, ...]:
        """Assumed coefficients that the result hangs on; where their effects are unknown, those that it came from."""
        return unmeasured_in_use(self, inherited=False)

    @property
    def inherited(self) -> tuple[str, ...]:
        """The same of coefficients that were measured on, or assumed of, another card."""
        return unmeasured_in_use(self, inherited=True)

    @lazy
    def notes(self) -> tuple[str, ...]:
        """Settings without effect, what durations hang on beyond the bytes, and layers that overlap."""
        return (*self.scenario.notes, *remarks(self), *([self.overlap] if self.overlap else []))

    @lazy
    def _account(self) -> Account:
        own = self.scenario
        return Account(own.hardware, own.workload.precision, own.gpus_per_node, self.prepared, self.trace)

    @lazy
    def flagged(self) -> tuple[str, ...]:
        """Classes of coefficients in use whose calibration missed its error limit."""
        return self._account.flagged() if has_flags(self.scenario.hardware) else ()

    @lazy
    def error_band(self) -> ErrorBand | None:
        """Errors of the times from those of the coefficients, see `uncertainty`; None without a calibration."""
        return self._account.band() if is_calibrated(self.scenario.hardware) else None

    @property
    def prior_band(self) -> Band | None:
        """How far published measurements are off, see `bands`; None where a calibration has errors of its own, and
        of inference, of which none is measured.
        """
        known = not is_calibrated(self.scenario.hardware) and not self.is_served
        return bands.of_time(self.scenario.hardware, bands.family_of(self.scenario.model)) if known else None

    @lazy
    def far_off(self) -> tuple[Band, ...]:
        """Parts of the result whose published measurements are known to be far from predictions."""
        return bands.far_off(self)

    # Times

    @property
    def known(self) -> Staged | Added | None:
        """What has its figures without a trace."""
        return self.staged or self.added

    @lazy
    def step_ps(self) -> int:
        """See `Derived`."""
        return known.end_ps if (known := self.known) else self.trace.end_ps

    @lazy
    def pass_ps(self) -> Mapping[str, int]:
        """See `Derived`."""
        window = known.layer_window if (known := self.known) else partial(metrics.layer_window, self.trace)
        return {phase: window(phase) for phase in PASSES}

    @lazy
    def _idle(self) -> dict[int, metrics.Idle]:
        return known.idle if (known := self.known) else metrics.idle(self.trace)

    @lazy
    def exposed_ps(self) -> int:
        """See `Derived`."""
        return max(own.communication for own in self._idle.values())

    @lazy
    def account(self) -> accounts.Account:
        """Where the time of the rank that ends last goes; all of the step."""
        return self.staged.account if self.staged else accounts.of_step(self.trace)

    @lazy
    def waterfall(self) -> dict[str, float]:
        """Seconds from the ideal time of its FLOPs to the step; see `waterfall`."""
        return waterfall(self)

    @property
    def idle_s(self) -> dict[str, float]:
        """Other waits of kernels, each on the rank with most: a late peer, another stage, or a dependency alone."""
        names = ("peer", "stage", "dependency")
        return {name: seconds(max(getattr(own, name) for own in self._idle.values())) for name in names}

    @lazy
    def weight_sync_ps(self) -> int:
        """See `Derived`."""
        return known.weight_sync_ps if (known := self.known) else metrics.weight_sync(self.trace)

    @lazy
    def optimizer_ps(self) -> int:
        """See `Derived`."""
        return known.optimizer_ps if (known := self.known) else metrics.optimizer(self.trace)

    @property
    def bubble(self) -> float:
        """See `Derived`."""
        if self.scenario.plan.pp == 1:
            return 0.0
        ends = self.staged.pass_ends if self.staged else metrics.pass_ends(self.trace)
        waits = sum(own.stage + own.dependency + max(ends.values()) - ends[rank] for rank, own in self._idle.items())
        return waits / len(ends) / self.step_ps

    @lazy
    def compute_ps(self) -> Mapping[str, int]:
        """See `Derived`."""
        own = self.trace
        return (
            known.compute_by_class() if (known := self.known) else metrics.compute_by_class(own, next(iter(own.copies)))
        )

    # Memory

    @lazy
    def peak(self) -> metrics.Peak:
        """The fullest rank, when, and by which task."""
        return metrics.peak_memory(self.trace, {rank: own.total for rank, own in self.statics.items()})

    @property
    def static(self) -> StaticMemory:
        """Of the fullest rank."""
        return self.statics[self.spot.rank if self.spot else self.peak.rank]

    @lazy
    def stage_peaks(self) -> list[Spot]:
        """Where memory is fullest on each of several stages; empty without."""
        return stage_peaks(self)

    @lazy
    def spot(self) -> Spot | None:
        """Where memory is fullest, as far as it is known without a trace, and of several stages."""
        if self.added:
            return self.added.spot(self.statics)
        return max(self.stage_peaks, key=lambda spot: spot.bytes, default=None)

    @lazy
    def peak_bytes(self) -> int:
        """See `Derived`."""
        return known.peak_bytes(self.statics) if (known := self.known) else self.peak.bytes

    @property
    def peak_operator(self) -> str:
        """The operator whose allocation makes the peak."""
        return (self.spot.operator or self.always) if self.spot else self.task_name(self.peak.task)

    def task_name(self, task: int | None) -> str:
        """The operator of a task of the trace; of none, what is there all the time."""
        if task is None:
            return self.always
        piece = self.trace.piece_of(task)
        return operator_name(piece.recording.outline.labels[task - piece.first_task], piece.layer)

    @property
    def out_of_memory_at(self) -> str | None:
        """The operator at which memory runs out, if it does."""
        return None if self.fits else running_out(self)

    def saved_bytes(self, *categories: TensorKind) -> int:
        """See `Derived`."""
        kept = zip(self.numbers.template.program.saved, self.numbers.saved, strict=True)
        return sum(size for saved, size in kept if saved.category in categories)

    # Communication

    @lazy
    def collectives_per_layer(self) -> dict[str, dict[str, int]]:
        """Number of collectives of one layer and micro-batch, by pass and kind."""
        return per_layer(self)

    @lazy
    def comm_bytes_per_gpu_by_op(self) -> dict[str, int]:
        """Bytes that one GPU sends in a step, by kind of collective."""
        return sent_by_kind(self.collectives)

    @lazy
    def collectives(self) -> tuple[Call, ...]:
        """The collectives of a step with algorithm and rate; see `calls`."""
        return calls(self)

    # Tables and pictures

    @lazy
    def spans(self) -> pd.DataFrame:
        """One row per span and rank; see `tables.spans_frame`."""
        return tables.spans_frame(self.trace)

    @lazy
    def memory_curve(self) -> pd.DataFrame:
        """Memory by category over time; see `tables.memory_frame`."""
        return tables.memory_frame(self.trace, self.statics)

    @lazy
    def operators(self) -> pd.DataFrame:
        """Time of the first rank by operator; see `tables.operator_rows`."""
        return tables.operators_frame(self.trace, self._calls)

    @lazy
    def operator_rows(self) -> list[dict[str, Any]]:
        """The same without pandas."""
        return tables.operator_rows(self.trace, self._calls)

    @property
    def _calls(self) -> Mapping[tuple[str, str, int], Call]:
        return {(call.collective, call.axis, call.message_bytes): call for call in self.collectives}

    def __repr__(self) -> str:
        return brief(self)

    def _repr_html_(self) -> str:
        from spsim.report.page import result_fragment

        return result_fragment(self)

    def plot_timeline(self, path: str | Path | None = None, **options: Any) -> Figure:
        """The lanes of the ranks, written where a path is given; see `plots.plot_timeline`."""
        from spsim import plots

        return plots.saved(plots.plot_timeline(self, **options), path)

    def plot_memory(self, path: str | Path | None = None, **options: Any) -> Figure:
        """Memory by category over time, written where a path is given; see `plots.plot_memory`."""
        from spsim import plots

        return plots.saved(plots.plot_memory(self, **options), path)

    def plot_step(self, path: str | Path | None = None) -> Figure:
        """From the ideal time of its FLOPs to the step, written where a path is given; see `plots.plot_steps`."""
        from spsim import plots

        return plots.saved(plots.plot_steps({self.scenario.plan.label: self}), path)

    def plot_mapping(self, path: str | Path | None = None) -> Figure:
        """Which ranks share which links, written where a path is given; see `plots.plot_mapping`. Of a `Scenario`."""
        from spsim import plots

        return plots.saved(plots.plot_mapping(self.scenario), path)  # type: ignore[arg-type]

    def plot_pipeline(self, path: str | Path | None = None) -> Figure:
        """Passes of the stages, written where a path is given; see `plots.plot_pipeline`."""
        from spsim import plots

        return plots.saved(plots.plot_pipeline(self), path)

    def to_html(self, path: str | Path) -> None:
        """Write a page that a browser opens without a network: times, memory, timeline, assumptions."""
        from spsim.report.page import write_result

        write_result(self, Path(path))

    def select(self, *, ranks: Sequence[int] | None = None, layers: Sequence[int] | None = None) -> Selection:
        """What is written out, the ranks and layers named or what says all; see `results.selection`."""
        own = self.scenario
        return select(self.trace, own.model.layers, own.num_micro_batches, ranks=ranks, of_layers=layers)

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
        return document(self)
