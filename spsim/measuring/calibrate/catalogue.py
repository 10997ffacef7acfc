"""What a calibration measures: rows without results, for the machine at hand, quick or full.

GEMM shapes are those of the linears of real layers on one of `t` tensor-parallel ranks. Memory-bound operators
come in sizes that fit the last-level cache and sizes that do not, attention in lengths from where it starts to
pay to where its rate is level, collectives in sizes four apart (full: two) from 1 KiB up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from spsim.inputs.model import Model
from spsim.inputs.presets import load_model
from spsim.measuring.calibrate.records import Measurement
from spsim.measuring.calibrate.shapes import (
    ITEMSIZE,
    MEMORY_BOUND,
    flash_attention,
    linear,
    memory_bound,
    score_products,
)
from spsim.units import GIB, KIB, MIB
from spsim.work import AttentionKernel, Direction

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_receive")
LAUNCHES = ("stream_add", "stream_linear", "stream_layer_norm", "stream_softmax")
"""Kernels of 8 x 8 elements, one after the other."""
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the catalogue depends on."""

    device: Literal["cpu", "cuda"]
    dtypes: tuple[str, ...]
    """Of GEMMs; attention and memory-bound operators take the 16- and 32-bit ones."""
    cache_bytes: int
    """Last-level cache of one rank."""
    ranks: int
    nodes: int
    levels: tuple[str, ...]
    """Names of the topology's levels, inner to outer."""
    attention_kernels: tuple[AttentionKernel, ...]
    """Fused kernels that torch has, the one that it picks by itself first."""

    @property
    def ranks_per_node(self) -> int:
        """Nodes hold equally many."""
        return self.ranks // self.nodes

    @property
    def message_dtype(self) -> str:
        """Of collectives: what training sends, and on a CPU what gloo adds without converting."""
        return "bf16" if self.device == "cuda" else "fp32"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Sizes of one sort of device, quick or full."""

    layers: tuple[tuple[Model, int], ...]
    """(model, tensor-parallel degree): the linears of one rank."""
    tokens: tuple[int, ...]
    short: tuple[tuple[int, int, int], ...]
    """(tokens, inputs, outputs) of linears that take a few microseconds: their start, and few tiles with a long K."""
    lengths: tuple[int, ...]
    """Of sequences in attention."""
    heads: int
    head_dims: tuple[int, ...]
    widths: tuple[int, ...]
    """Row lengths of memory-bound operators."""
    cache_shares: tuple[float, ...]
    """Bytes of one tensor of a memory-bound operator over those of the cache."""
    max_message: int
    message_step: int


INSIDE = (1 / 128, 1 / 32, 1 / 15)
"""Tensors with which no operator moves more than half of the cache. Those beyond it move more than all of it, and on
a CPU stay below the 32 MiB from which the C library gives every tensor fresh pages.
"""


SHORT = ((128, 1024, 1024), (256, 1536, 1536), (64, 4096, 4096), (256, 768, 3584), (128, 14336, 4096))


def _small(hidden: int) -> Model:
    return Model(name=f"small-{hidden}", layers=1, hidden=hidden, heads=hidden // 64, vocab=1)


def selection(machine: Machine, *, quick: bool) -> Selection:
    """The sizes for a machine."""
    if machine.device == "cpu":
        hidden = (256, 512) if quick else (256, 512, 768, 1024)
        return Selection(
            layers=tuple((_small(h), 1) for h in hidden),
            tokens=(128, 512) if quick else (128, 256, 512, 1024, 2048),
            short=(),
            lengths=(128, 256, 512, 1024) if quick else (128, 256, 512, 1024, 2048),
            heads=4,
            head_dims=(64, 128) if quick else (64, 96, 128),
            widths=(1024,) if quick else (512, 1024, 2048),
            cache_shares=(*INSIDE, 0.6, 0.9) if quick else (*INSIDE, 1 / 64, 1 / 20, 0.6, 0.75, 0.9),
            max_message=64 * MIB if quick else 256 * MIB,
            message_step=4 if quick else 2,
        )
    names = ("gpt-22b", "llama-3-70b") if quick else ("gpt-22b", "gpt-175b", "llama-3-8b", "llama-3-70b")
    return Selection(
        layers=tuple((load_model(name), t) for name in names for t in ((8,) if quick else (1, 8))),
        tokens=(2048, 8192) if quick else (1024, 4096),
        short=SHORT[:2] if quick else SHORT,
        lengths=(512, 1024, 2048, 4096, 8192) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384),
        heads=16,
        head_dims=(64, 96, 128),
        widths=(4096,) if quick else (2048, 8192),
        cache_shares=(*INSIDE, 2, 6) if quick else (*INSIDE, 1 / 64, 1 / 20, 1, 2, 4, 8),
        max_message=GIB,
        message_step=4 if quick else 2,
    )


def compute_rows(machine: Machine, *, quick: bool) -> list[Measurement]:
    """Kernels of one rank."""
    sizes = selection(machine, quick=quick)
    parts = (_launches(machine), _gemms(machine, sizes), _attention(machine, sizes), _memory_bound(machine, sizes))
    return _distinct(row for part in parts for row in part)


def _distinct(rows: Iterable[Measurement]) -> list[Measurement]:
    return list({row.key: row for row in rows}.values())


def _launches(machine: Machine) -> Iterator[Measurement]:
    names = LAUNCHES if machine.device == "cpu" else (*LAUNCHES, "host_add", "graph_add")
    for name in names:
        yield Measurement(kind="launch", name=name, dtype="fp32")


def _linears(model: Model, t: int) -> Iterator[tuple[int, int]]:
    """(inputs, outputs) of the four linears of a layer on one of `t` ranks."""
    attended = model.heads * model.head_dim // t
    key_value = 2 * model.kv_heads * model.head_dim // t
    gates = 2 if model.gated_mlp else 1
    yield model.hidden, attended + key_value
    yield attended, model.hidden
    yield model.hidden, gates * model.ffn_hidden // t
    yield model.ffn_hidden // t, model.hidden


def _gemms(machine: Machine, sizes: Selection) -> Iterator[Measurement]:
    for dtype, (model, t), tokens in product(machine.dtypes, sizes.layers, sizes.tokens):
        for inputs, outputs in _linears(model, t):
            yield from linear(dtype, tokens, inputs, outputs)
    for dtype, (tokens, inputs, outputs) in product(machine.dtypes, sizes.short):
        yield from linear(dtype, tokens, inputs, outputs)
    for dtype, head_dim, tokens in product(_wide(machine), sizes.head_dims, sizes.lengths[:4]):
        yield from score_products(dtype, 1, sizes.heads, head_dim, tokens)


def _wide(machine: Machine) -> tuple[str, ...]:
    """Types of attention and of memory-bound operators: one of 16 bits is as fast as another."""
    return tuple(dtype for dtype in machine.dtypes if dtype in ("fp32", "bf16"))


def _attention(machine: Machine, sizes: Selection) -> Iterator[Measurement]:
    """Multi-head with all head sizes and lengths, grouped queries with one size, and fewer and more heads.

    The fused kernel of a GPU takes 16 bits only.
    """
    dtypes = _wide(machine) if machine.device == "cpu" else ("bf16",)
    heads = sizes.heads
    cases = [(1, heads, heads, head_dim, length) for head_dim in sizes.head_dims for length in sizes.lengths]
    cases += [(1, heads, heads // 4, 128, length) for length in sizes.lengths[1::2]]
    if machine.device == "cuda":
        spread = product(SPREAD, (64, 128), sizes.lengths[::2])
        cases += [(batch, own, own, head_dim, length) for (batch, own), head_dim, length in spread]
    for kernel, dtype, direction, causal in product(machine.attention_kernels, dtypes, DIRECTIONS, (True, False)):
        for batch, own_heads, kv_heads, head_dim, length in cases:
            yield flash_attention(
                kernel, dtype, direction, batch=batch, heads=own_heads, kv_heads=kv_heads, head_dim=head_dim,
                tokens=length, causal=causal,
            )  # fmt: skip


SPREAD = ((1, 2), (1, 8), (2, 32))
"""Sequences and heads of attention on a GPU, so that few blocks and many waves of them are seen."""


MASTER_PRECISION = ("cross_entropy", "adam")
"""Operators on fp32 tensors, whatever the type of the layers."""
LARGER = {"bias_gradient": 3}
"""Times the rows of an operator that moves one tensor, where others move two or three."""


def _memory_bound(machine: Machine, sizes: Selection) -> Iterator[Measurement]:
    for dtype, width, share in product(_wide(machine), sizes.widths, sizes.cache_shares):
        rows = max(8, round(share * machine.cache_bytes / (width * ITEMSIZE[dtype]) / 8) * 8)
        for operator in MEMORY_BOUND:
            if dtype == "fp32" or operator not in MASTER_PRECISION:
                yield from memory_bound(operator, dtype, LARGER.get(operator, 1) * rows, width)


def memory_rows(machine: Machine) -> list[Measurement]:
    """What the framework takes beside tensors; a CPU has neither context nor caching allocator."""
    statistics = [Measurement(kind="memory", name="norm_statistics", dtype=dtype) for dtype in _wide(machine)]
    if machine.device == "cpu":
        return statistics
    requests = (1, 513, 100 * KIB + 1, MIB + 1, 10 * MIB + 1, 64 * MIB + 1)
    return [
        Measurement(kind="memory", name="context"),
        *statistics,
        *(Measurement(kind="memory", name=name, bytes_moved=size) for size in requests for name in ALLOCATIONS),
    ]


ALLOCATIONS = ("allocated", "reserved")


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: the first `ranks_per_node` of each of the first `nodes`."""

    level: str
    nodes: int
    ranks_per_node: int

    def members(self, per_node: int) -> list[int]:
        """Their numbers among all ranks, of which a node has `per_node`."""
        return [node * per_node + rank for node in range(self.nodes) for rank in range(self.ranks_per_node)]


def groups(machine: Machine) -> list[Group]:
    """Inside a node 2, 4, 8, ... and all ranks; across nodes one rank of each, and all."""
    inside = [size for size in (2**power for power in range(1, 12)) if size < machine.ranks_per_node]
    if machine.ranks_per_node > 1:
        inside.append(machine.ranks_per_node)
    made = [Group(machine.levels[0], 1, size) for size in inside]
    if machine.nodes > 1:
        made += [Group(machine.levels[1], machine.nodes, size) for size in dict.fromkeys((1, machine.ranks_per_node))]
    return made


def collective_rows(machine: Machine, *, quick: bool) -> list[Measurement]:
    """Communicator buffers first, then collectives by group."""
    if machine.ranks < 2:
        return []
    sizes = selection(machine, quick=quick)
    messages = [KIB]
    while messages[-1] * sizes.message_step <= sizes.max_message:
        messages.append(messages[-1] * sizes.message_step)
    rows = [
        Measurement(kind="collective", name=name, message_bytes=message, **_of(group, machine))
        for group, name, message in product(groups(machine), COLLECTIVES, messages)
    ]
    if machine.device == "cuda":
        widest = groups(machine)[-1]
        rows.insert(0, Measurement(kind="memory", name="communicator", **_of(widest, machine)))
    return rows


def _of(group: Group, machine: Machine) -> dict[str, object]:
    return {
        "dtype": machine.message_dtype, "level": group.level, "nodes": group.nodes,
        "ranks": group.nodes * group.ranks_per_node,
    }  # fmt: skip


INTERFERING = ("all_reduce", "all_gather", "reduce_scatter")


def interference_rows(machine: Machine) -> list[Measurement]:
    """A sequence of products beside a collective among the ranks of one node: what either loses.

    `gemm_beside_...` has the time of one product and the share of its rate that is lost; `..._beside_gemm` the
    time of the collective and the share by which it is longer.
    """
    group = next((group for group in reversed(groups(machine)) if group.nodes == 1), None)
    if group is None:
        return []
    tokens, width, message = (512, 512, 32 * MIB) if machine.device == "cpu" else (4096, 4096, 256 * MIB)
    return [
        Measurement(
            kind="interference", name=name, m=tokens, n=width, k=width, message_bytes=message, **_of(group, machine)
        )
        for collective in INTERFERING
        for name in (f"gemm_beside_{collective}", f"{collective}_beside_gemm")
    ]
