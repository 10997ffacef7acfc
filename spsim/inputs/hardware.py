"""Hardware profiles: what a GPU, its node and its fabric can do, each number with its source.

A profile is a TOML file of three blocks. `datasheet` holds the vendor's figures (dense peaks, reported
memory, links). `calibrated`, `assumed` and `inherited` (from the profile of another card) hold coefficients
of one schema, `Coefficients`: a coefficient stands in exactly one of them, so that a result can list which
assumed and inherited values it used. Units are in the names. A GB is 1e9 bytes, a GiB 2**30; peaks are dense.

Collective curves store what was measured, in the convention of nccl-tests: the message is the whole array
(the per-rank buffer for all-to-all and send-receive), the bus bandwidth is the bytes one rank sends over
the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, model_validator

from spsim.errors import InputError
from spsim.inputs.collective_curves import CollectiveCurve, CollectiveName
from spsim.inputs.configuration import Name
from spsim.inputs.dispatch_coefficients import DispatcherCoefficients, DispatchLibrary
from spsim.inputs.kernel_coefficients import (
    AttentionCoefficients,
    DataType,
    GemmCoefficients,
    KernelPass,
    KernelRates,
    MemoryBoundFractions,
    NodeCoefficients,
    PickedKernel,
    RowLength,
    SendCoefficients,
)
from spsim.inputs.plausible import check_profile
from spsim.inputs.quantities import Bandwidth, Fraction, Microseconds, NonNegative, Provenance, Quantity, Table
from spsim.inputs.uplinks import Uplinks
from spsim.work import AttentionKernel, Decoding, Framework

PEAK_IDENTITY_TOLERANCE = 0.01
"""Largest relative gap between a 16-bit peak and units x FLOP per clock x clock; a sparse peak is off by 2."""


CAST_PEAKS = {"fp8": 2, "mxfp8": 2, "fp8_blockwise": 2, "nvfp4": 6}
"""Times the 16-bit peak that a dense one is at most; 4 of B200 and 6 of GB300 in 4 bits."""


class Level(Table):
    """One level of the topology, inner to outer."""

    name: Name
    kind: Literal["switch", "full_mesh", "ring", "pcie_tree", "shared_memory", "fat_tree"]
    gpus: Annotated[int, Field(ge=1)] | None = None
    """GPUs that the level joins; none for a fabric without a limit."""
    links_per_gpu: Quantity
    link_gb_per_s: Bandwidth
    """Per link and direction."""
    in_network_reduction: Annotated[tuple[CollectiveName, ...], Field(strict=False)] = ()
    uplinks: Uplinks | None = None
    """Between its switches; none where one joins all, or where they never block. `network = "flows"` reads them."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second and direction of one GPU at this level."""
        return self.links_per_gpu.value * self.link_gb_per_s.value * 1e9

    @property
    def share(self) -> float:
        """Of a network adapter that one GPU has: 0.5 where two share one (`links_per_gpu = 0.5`)."""
        return min(1.0, self.links_per_gpu.value)

    @property
    def adapter_bandwidth(self) -> float:
        """The same of a GPU that has its adapter to itself, as benchmarks of one GPU per node do."""
        return self.bandwidth / self.share


class DeviceMemory(Table):
    """Memory of one device. The capacity that counts is what the driver reports, not the label."""

    label_gb: Quantity
    reported_mib: Quantity
    bandwidth_gb_per_s: Bandwidth
    l2_mib: Quantity


class OperandLayouts(Provenance):
    """Which operands tensor cores multiply: whose rows are summed over, or any."""

    value: Literal["rows", "any"]


class Datasheet(Table):
    """The vendor's figures of one device and its topology."""

    device: Name
    compute_units: Quantity
    flop_per_clock_per_unit: Quantity
    """16-bit dense matrix FLOP; for a CPU, of its widest type."""
    compute_capability: Quantity | None = None
    """By which NCCL picks algorithms; unless given, the fastest curve is taken."""
    clock_tensor_mhz: Quantity
    clock_vector_mhz: Quantity
    peak_tflops: dict[str, Quantity]
    """Dense matrix peak by data type; `fp32` is the vector peak, types with scales have that of their bits."""
    fp8_layouts: OperandLayouts | None = None
    """Of 8-bit products; rows of both operands are summed over unless given, so that transposes are made."""
    memory: DeviceMemory
    host_link_gb_per_s: Bandwidth | None = None
    """Of one GPU to the memory of its host, per direction, while all GPUs of the host copy; none for a CPU."""
    topology: Annotated[tuple[Level, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _peak_is_dense(self) -> Self:
        """Peak = units x FLOP per clock and unit x clock; catches sparse peaks and wrong clocks."""
        peaks = self.peak_tflops
        peak = peaks.get("bf16") or peaks.get("fp16") or peaks.get("fp32")
        if peak is None:
            raise ValueError("peak_tflops names none of bf16, fp16, fp32; give the dense peak of one")
        for dtype, times in CAST_PEAKS.items():
            if dtype in peaks and peaks[dtype].value > times * peak.value * (1 + PEAK_IDENTITY_TOLERANCE):
                raise ValueError(
                    f"{dtype} peak {peaks[dtype].value:g} is over {times} times the 16-bit peak; give the dense peak"
                )
        product = self.compute_units.value * self.flop_per_clock_per_unit.value * self.clock_tensor_mhz.value / 1e6
        highest = max(value.value for name, value in peaks.items() if name in ("fp32", "tf32", "fp16", "bf16"))
        if abs(peak.value / product - 1) > PEAK_IDENTITY_TOLERANCE or highest > product * (1 + PEAK_IDENTITY_TOLERANCE):
            raise ValueError(
                f"peak {max(peak.value, highest):g} TFLOP/s is not "
                f"compute units x FLOP per clock x clock = {product:.1f}; "
                "give the dense peak and the clock it is stated for"
            )
        return self


class MemoryCoefficients(Table):
    """Memory that the framework takes beside tensors."""

    context_mib: NonNegative
    communicator_mib: NonNegative
    """Buffers of one communicator (process group)."""
    reserve_mib: NonNegative
    """Reported memory that a process cannot allocate, and allocator slack."""


class Coefficients(Table):
    """Everything that a calibration fits; one value per profile."""

    gemm: GemmCoefficients
    attention: Annotated[dict[AttentionKernel, AttentionCoefficients], Field(min_length=1)]
    """Fused kernels, in 16 bits."""
    attention_picked: dict[Framework, PickedKernel]
    """Which of them a framework runs if it is not told."""
    attention_by_dtype: dict[DataType, dict[AttentionKernel, AttentionCoefficients]] = Field(default_factory=dict)
    """Of a data type that runs at other rates."""
    memory_bound: MemoryBoundFractions
    kernel_rates: dict[DataType, dict[KernelPass, KernelRates]] = Field(default_factory=dict)
    """By data type and kernel_direction, such as gelu_backward, where more than the traffic matters; others have
    `memory_bound`. Types without rates take those of `bf16`: tensors between products are of 16 bits."""
    row_rates: dict[DataType, dict[KernelPass, dict[RowLength, KernelRates]]] = Field(default_factory=dict)
    """The same of kernels that take other times for other row lengths, by the measured ones; they go first."""
    fused_rates: dict[DataType, dict[KernelPass, KernelRates]] = Field(default_factory=dict)
    """Rates of kernels as Megatron-Core and Transformer Engine fuse them, which layers run and torch by itself does
    not; before all others."""
    l2_bandwidth_gb_per_s: Bandwidth
    """Rate of kernels whose tensors stay in the last-level cache."""
    accesses_per_ns: Quantity | None = None
    """Elements a nanosecond that elementwise kernels read and write one by one, where operands are strided or
    broadcast; no limit unless given."""
    power_share: Fraction | None = None
    """Share of compute-bound kernels in the time of a step, up to which the board stays below its power limit."""
    straggler: Fraction | None = None
    """Standard deviation of the sustained rate among GPUs of a kind, over its mean: see `costs.power`."""
    kernel_overhead_us: Microseconds
    """Start of one kernel in a busy stream."""
    graph_overhead_us: Microseconds | None = None
    """The same in a CUDA graph; plans with `cuda_graphs` need it."""
    collectives: dict[
        str, dict[CollectiveName, Annotated[tuple[CollectiveCurve, ...], Field(min_length=1, strict=False)]]
    ]
    """Curves by topology level and collective."""
    sends: dict[str, SendCoefficients] = Field(default_factory=dict)
    """By topology level, in the place of a curve of `send_receive`: its time depends on the communicator."""
    between_nodes: dict[str, NodeCoefficients] = Field(default_factory=dict)
    """By topology level, how long NCCL's rings and trees over nodes take; without it curves of both levels say."""
    dispatchers: dict[DispatchLibrary, DispatcherCoefficients] = Field(default_factory=dict)
    """Libraries that send tokens to experts by kernels of their own, where the device was measured with them."""
    collective_overhead_us: Microseconds
    """Start of a collective from a framework beyond what back-to-back benchmarks see: the hand-over between
    the compute stream and the communication stream, both ways."""
    adapter_chunk_mib: Quantity | None = None
    """Data that the channels of one network adapter pass on at a time, for a topology of several levels."""
    overlap_slowdown: NonNegative
    """Share of its rate that compute loses while a collective holds units of the device."""
    memory: MemoryCoefficients

    @model_validator(mode="after")
    def _picked_kernels_exist(self) -> Self:
        for framework in get_args(Framework):
            if framework not in self.attention_picked:
                raise ValueError(f"attention_picked has no {framework}; say which kernel it runs")
        for framework, picked in self.attention_picked.items():
            if picked.kernel not in self.attention:
                raise ValueError(
                    f"attention_picked.{framework} is {picked.kernel!r}, which attention does not have; "
                    f"use one of {', '.join(self.attention)}"
                )
        return self

    @model_validator(mode="after")
    def _slowdown_below_one(self) -> Self:
        if self.overlap_slowdown.value >= 1:
            raise ValueError(f"overlap_slowdown {self.overlap_slowdown.value:g} must be below 1; it is a lost share")
        return self


class HardwareProfile(Table):
    """A profile as the simulator uses it: the datasheet and one merged set of coefficients."""

    schema_version: Literal[1]
    name: Annotated[Name, Field(min_length=1)]
    description: Name
    as_of: Name
    provenance: dict[str, str] = Field(default_factory=dict)
    """Versions, clocks, dates and hosts of a calibration."""
    sources: dict[str, str]
    datasheet: Datasheet
    coefficients: Coefficients
    assumed: frozenset[str] = frozenset()
    """Dotted paths of the coefficients that come from the `assumed` block."""
    inherited: frozenset[str] = frozenset()
    """Dotted paths of the coefficients that were measured on, or assumed of, another card; and, from `datasheet.` on,
    of figures of its data sheet."""
    fitted_on: frozenset[str] = frozenset()
    """Ids of the measured cases that any coefficient was fitted on."""

    @model_validator(mode="after")
    def _curves_belong_to_levels(self) -> Self:
        levels = {level.name: level for level in self.datasheet.topology}
        if len(levels) < len(self.datasheet.topology):
            raise ValueError("topology: two levels have the same name; rename one")
        if len(levels) > 1 and self.coefficients.adapter_chunk_mib is None:
            raise ValueError("a topology of several levels needs adapter_chunk_mib; add it to calibrated or assumed")
        for name, table in self.coefficients.collectives.items():
            if name not in levels:
                raise ValueError(f"collectives name the level {name!r}, which the topology does not have")
            for collective, curves in table.items():
                for curve in curves:
                    _check_curve(levels[name], collective, curve)
        for name in self.coefficients.sends:
            if name not in levels:
                raise ValueError(f"sends name the level {name!r}, which the topology does not have")
            if "send_receive" in self.coefficients.collectives.get(name, {}):
                raise ValueError(f"sends.{name} and collectives.{name}.send_receive say the same; keep one")
        return self

    @model_validator(mode="after")
    def _dispatchers_belong_to_levels(self) -> Self:
        levels = {level.name for level in self.datasheet.topology}
        for name in (name for own in self.coefficients.dispatchers.values() for name in own.levels):
            if name not in levels:
                raise ValueError(f"dispatchers name the level {name!r}, which the topology does not have")
        return self

    @model_validator(mode="after")
    def _is_plausible(self) -> Self:
        check_profile(self)
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> Self:
        for table in (self.datasheet, self.coefficients):
            for source in _sources(table.model_dump()):
                if source not in self.sources:
                    raise ValueError(f"source {source!r} is not in [sources]; add the citation there")
        return self

    def __repr__(self) -> str:
        return f"HardwareProfile({self.name!r})"

    def __hash__(self) -> int:
        """By identity: profiles are loaded once and never change."""
        return id(self)

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second of the device memory."""
        return self.datasheet.memory.bandwidth_gb_per_s.value * 1e9

    @property
    def graph_overhead_us(self) -> float:
        """Start of a kernel in a CUDA graph; `InputError` where the profile does not know it."""
        known = self.coefficients.graph_overhead_us
        if known is None:
            raise InputError(
                f"plan: cuda_graphs: {self.name} has no graph_overhead_us, the start of a kernel in a graph; "
                "add it to the profile, or leave cuda_graphs at none"
            )
        return known.value

    @property
    def fp8_any_layout(self) -> bool:
        """8-bit products read operands in any layout."""
        layouts = self.datasheet.fp8_layouts
        return layouts is not None and layouts.value == "any"

    @property
    def gpus_per_node(self) -> int:
        """GPUs joined by the innermost level."""
        return self.datasheet.topology[0].gpus or 1

    @cached_property
    def eager(self) -> HardwareProfile:
        """The profile with every kernel as torch runs it by itself: without `fused_rates`."""
        if not self.coefficients.fused_rates:
            return self
        coefficients = self.coefficients.model_copy(update={"fused_rates": {}})
        sets = {"assumed": self.assumed, "inherited": self.inherited}
        kept = {name: frozenset(p for p in paths if not p.startswith("fused_rates.")) for name, paths in sets.items()}
        return self.model_copy(update={"coefficients": coefficients, **kept})

    def attention_kernel(self, wanted: AttentionKernel | Framework | Decoding) -> AttentionKernel:
        """A fused attention kernel by its name, or by that of the framework that picks it; `InputError` when the
        profile does not have it.
        """
        coefficients = self.coefficients
        if wanted == "flash_decoding":
            return self._decoding_kernel
        if wanted in coefficients.attention_picked:
            return coefficients.attention_picked[wanted].kernel
        if wanted not in coefficients.attention:
            have = ", ".join(coefficients.attention)
            raise InputError(f"attention {wanted!r}: {self.name} has no such kernel; use flash, unfused or {have}")
        return wanted

    @property
    def _decoding_kernel(self) -> AttentionKernel:
        known = self.coefficients.attention.items()
        found = next((name for name, own in known if own.forward.split), None)
        if found is None:
            raise InputError(
                f"hardware {self.name}: no kernel of attention that divides the keys of one query among blocks has "
                "measured times, and decode needs one; give attention.<kernel>.forward.split, as dgx-h100 has it"
            )
        return found

    def peak(self, dtype: str) -> float:
        """Dense peak FLOP/s of a data type; `InputError` when the device does not have it."""
        try:
            return self.datasheet.peak_tflops[dtype].value * 1e12
        except KeyError:
            have = ", ".join(self.datasheet.peak_tflops)
            raise InputError(
                f"precision {dtype!r}: {self.datasheet.device} has no such peak; choose one of {have}"
            ) from None


Leaf = Provenance | tuple[Provenance, ...]
"""A number with its source, or the curves of one collective."""


def leaves(table: Any, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every coefficient of a table with its dotted path."""
    if isinstance(table, Provenance | tuple):
        yield path, table
        return
    items = table.items() if isinstance(table, dict) else ((n, getattr(table, n)) for n in type(table).model_fields)
    for name, item in items:
        if item is not None:
            yield from leaves(item, f"{path}.{name}" if path else name)


def _check_curve(level: Level, collective: str, curve: CollectiveCurve) -> None:
    """A curve in the network reduces where the level can; any other stays below the link's bandwidth."""
    if curve.algorithm == "nvls":
        if collective not in level.in_network_reduction:
            raise ValueError(f"level {level.name!r} has no in-network {collective}, but an nvls curve; remove one")
        return
    fastest = max(bandwidth for _, bandwidth in curve.points)
    if fastest * 1e9 > level.adapter_bandwidth:
        raise ValueError(
            f"collectives.{level.name}.{collective}: bus bandwidth {fastest:g} GB/s is above the link's "
            f"{level.adapter_bandwidth / 1e9:g} GB/s; check the unit"
        )


def _sources(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("source"), str):
            yield value["source"]
        for item in value.values():
            yield from _sources(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _sources(item)
