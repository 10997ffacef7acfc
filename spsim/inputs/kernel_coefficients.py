"""Coefficients of the formulas that time kernels and sends, as a hardware profile holds them."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from spsim.inputs.quantities import Bandwidth, Fraction, Microseconds, NonNegative, Provenance, Quantity, Sides, Table
from spsim.work import DATA_TYPES, KERNEL_PASSES, AttentionKernel, known_data_type, known_kernel_pass

KernelPass = Annotated[
    str, AfterValidator(known_kernel_pass), WithJsonSchema({"type": "string", "enum": KERNEL_PASSES})
]
"""Such as gelu_backward."""
DataType = Annotated[str, AfterValidator(known_data_type), WithJsonSchema({"type": "string", "enum": [*DATA_TYPES]})]
HeadSize = Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]
RowLength = Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]


class GemmCoefficients(Table):
    """Matrix products as tiles on compute units: see `costs.products`."""

    fraction: dict[str, Fraction]
    """Share of the dense peak at which the units work through full tiles, by data type."""
    burst_limit: dict[str, Fraction] = Field(default_factory=dict)
    """Share of the peak that no product exceeds in a burst of milliseconds, as microbenchmarks run; by data type."""
    sustained_limit: dict[str, Fraction] = Field(default_factory=dict)
    """The same at the power limit of the board, as a training step runs."""
    tile_m: Sides
    tile_n: Sides
    """The library takes the pair that is done first."""
    full_rate_side: NonNegative
    """Side of the smallest square tile whose operands arrive as fast as they are multiplied."""
    k_pad_bytes: NonNegative
    """Added to K for the prologue and epilogue of a tile, in bytes of an operand: their time is that of any type."""
    start_us: NonNegative
    """Start of a product beyond that of any kernel."""
    weight_gradient_rate: dict[str, Fraction]
    """Rate of the weight-gradient product relative to forward, by data type."""
    accumulation_exposed: dict[str, NonNegative]
    """Share of the read and write of fp32 main gradients that a short product does not hide, by data type."""
    accumulation_half_k: dict[str, Quantity] = Field(default_factory=dict)
    """K at which main loops hide half of it; none where it never is."""
    group_launch_us: Microseconds | None = None
    """From one product of a group to the next where they are launched one by one, as of the experts of a rank."""
    grouped_rate: dict[str, Fraction] = Field(default_factory=dict)
    """Of kernels that multiply all matrices of a group, relative to a product, by data type; as that unless given."""
    grouped_weight_gradient_rate: dict[str, Fraction] = Field(default_factory=dict)
    """The same of weight gradients, relative to other grouped products."""
    unaligned_rate: Fraction | None = None
    """Share of the limit that products reach whose rows begin at no multiple of 16 bytes; all of it unless given."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        """What every product needs is there for each type that has a fraction."""
        for name in ("weight_gradient_rate", "accumulation_exposed"):
            for dtype in self.fraction:
                if dtype not in getattr(self, name):
                    raise ValueError(f"{name}.{dtype} is missing; there is a fraction of this type, so add it")
        return self


class AttentionTile(Table):
    """A thread block of a fused attention kernel of one head size, direction and masking: see `costs.attention`."""

    fraction: Fraction
    """Share of the dense peak of the compute units, while they loop over keys."""
    block_us: NonNegative
    """What a block takes beside that loop."""


class KeySplit(Table):
    """A forward kernel that also divides the keys of few queries among blocks, and joins their results."""

    rate: Quantity
    """Of a block, in multiples of that of blocks that are not split."""
    join_us: NonNegative
    """Start of joining."""
    join_traffic: NonNegative
    """Share of the time of writing and reading the fp32 results of the parts that joining takes."""
    block_gb_per_s: Bandwidth
    """Rate at which one block reads keys and values from memory."""


class AttentionPass(Table):
    """One direction of a fused attention kernel; tiles by head size (a decimal number as key)."""

    start_us: NonNegative
    """Of all its kernels, beyond that of any kernel."""
    traffic_exposed: NonNegative
    """Share of the time of operands and results that tiles do not hide, kernels before and after them included."""
    block_rows: Quantity
    """Queries of a thread block; backward, its keys."""
    block_tokens: NonNegative | None = None
    """Keys (backward: queries) that a masked block computes or skips together; as many as rows unless measured."""
    blocks_per_unit: Quantity | None = None
    """Thread blocks that share a compute unit; one unless given."""
    lone_rate: Fraction | None = None
    """Share of a unit's rate that one of several blocks reaches alone."""
    dropout_instructions: NonNegative | None = None
    """Of the vector units, for the random number of one query and key, beside the products; none unless given."""
    window_skipped: NonNegative | None = None
    """1 where blocks leave out what is outside a window, as unless given, 0 where they compute and mask it."""
    split: KeySplit | None = None
    causal: Annotated[dict[HeadSize, AttentionTile], Field(min_length=1)]
    full: Annotated[dict[HeadSize, AttentionTile], Field(min_length=1)]


class AttentionCoefficients(Table):
    """One fused attention kernel."""

    forward: AttentionPass
    backward: AttentionPass


class PickedKernel(Provenance):
    """Which kernel a framework runs on the device."""

    kernel: AttentionKernel


class MemoryBoundFractions(Table):
    """Share of the memory bandwidth by operator class."""

    elementwise: Fraction
    norm: Fraction
    softmax: Fraction
    dropout: Fraction
    embedding: Fraction | None = None
    cross_entropy: Fraction | None = None
    optimizer: Fraction | None = None
    """The last three stand outside the transformer layers; without a share of their own they have that of elementwise
    kernels, which stream as they do.
    """
    cast: Fraction | None = None
    """Of products to 8 or 4 bits; rates by type are in `kernel_rates`."""

    def share_of(self, operator_class: str) -> str:
        """The class whose share is that of a class."""
        streams = operator_class in ("embedding", "cross_entropy", "optimizer")
        return "elementwise" if streams and getattr(self, operator_class) is None else operator_class


class KernelRates(Table):
    """Measured traffic of one sort of memory-bound kernel, in memory and in the last-level cache."""

    memory_gb_per_s: Bandwidth
    cache_gb_per_s: Bandwidth
    start_us: NonNegative | None = None
    """Start beyond that of any kernel, such as a node of the autograd graph on a CPU; none unless measured."""


class SendCoefficients(Table):
    """Send and receive by the channels that NCCL gives to one: see `costs.sends`."""

    channel_gb_per_s: Bandwidth
    """That one channel copies at."""
    lone_channel_gb_per_s: Bandwidth | None = None
    """The same of a send that has one channel only; as others unless given."""
    link_gb_per_s: Bandwidth
    """That all channels reach at most."""
    blend: Quantity | None = None
    """Exponent by which the two limits blend where they are alike; without it the lower one holds."""
    start_us: Microseconds
    """Time of a message beyond its bytes."""
    latency_us: Microseconds
    """Time of the smallest messages."""
    from_mib: Quantity
    """Smallest message that these describe; below it the time is interpolated from the latency."""


class ProtocolRates(Table):
    """Of a ring over nodes by the protocol that NCCL picks."""

    ll128: Bandwidth
    simple: Bandwidth


class ProtocolSteps(Table):
    """Of a ring over nodes by the protocol that NCCL picks."""

    ll128: Microseconds
    simple: Microseconds


class NodeCoefficients(Table):
    """NCCL's rings through all GPUs of several nodes, and its trees of NVSwitches: see `costs.between_nodes`."""

    start_us: Microseconds
    """Of a ring, beyond its steps."""
    step_us: ProtocolSteps
    """One step of a ring with a small block."""
    channel_gb_per_s: Bandwidth
    """That one channel moves of the block of a step."""
    adapter_gb_per_s: ProtocolRates
    """That one network adapter moves when all steps are busy."""
    blend: Quantity
    """Exponent by which the limits of adapters and of the links in a node blend where they are alike."""
    from_mib: Quantity
    """Smallest message that the rings were held against; below it the time is interpolated from the latency."""
    tree_hop_us: Microseconds
    """Of a tree of NVSwitches from node to node, up or down."""
