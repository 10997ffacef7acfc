"""Memory that is there for the whole step, and the capacity it is judged by.

Mixed-precision Adam keeps 18 bytes a parameter: 2 for the weight, 4 for the fp32 main gradient and 12 for
the fp32 copy and two moments (Korthikanti et al. 2022; Rajbhandari et al. 2020, section 3.1). In fp32 the weight
needs no copy: 16 bytes. ZeRO's stages shard the optimizer state, then the gradients, then the weights, over
dp x ulysses x ring; the distributed optimizer is the first. Of the layers only, while the scope is "layers".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan
from spsim.inputs.workload import Workload
from spsim.program.blocks.optimizer import expert_shard_ranks, parameter_state, shard_ranks
from spsim.program.instructions import Program
from spsim.program.mesh import Mesh
from spsim.units import MIB
from spsim.work import FP32_BYTES


@dataclass(frozen=True, slots=True)
class StaticMemory:
    """Bytes of one rank that do not change during a step."""

    weights: int
    gradients: int
    optimizer: int
    cache: int = 0
    """Of keys and values, in inference."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.cache

    def by_category(self) -> dict[str, int]:
        """Bytes by the category names of the memory curve."""
        kept = {"KV cache": self.cache} if self.cache else {}
        return {"weights": self.weights, "gradients": self.gradients, "optimizer": self.optimizer, **kept}


def static_memory(
    parameters: int, plan: Plan, weight_bytes: int, weights: int | None = None, spread: int = 0
) -> StaticMemory:
    """Weights, gradients and optimizer state of `parameters` on one rank, `weight_bytes` per element between operators;
    all `weights` together take so many bytes where products read cast copies. So many are `spread`: of experts that
    fewer ranks share.

    FSDP2 shards fp32 weights, which need no copy, and gathers them in 16 bits; Megatron and DeepSpeed shard 16-bit
    weights and the fp32 copy apart. Torch's DDP has gradients beside the buckets in which it reduces them. Under
    ZeRO-2 and 3 gradients are reduced in every micro-batch, so that none wait whole; but for pipeline stages of torch,
    on which weights stay gathered, and gradients whole, for the whole step. A rank alone has nothing to share.
    """
    ranks, fsdp = shard_ranks(plan), plan.dp_library == "fsdp" and plan.zero_stage > 0 and plan.copies > 1
    at_rest = FP32_BYTES if fsdp else weight_bytes
    state = parameter_state(plan, at_rest)
    copies = 2 if plan.dp_library == "ddp" and plan.dp > 1 else 1
    staged = fsdp and plan.pp > 1

    def held(size: int, *, sharded: bool) -> int:
        """Of so many bytes."""
        if not sharded or not spread:
            return -(-size // (ranks if sharded else 1))
        own = size * spread // parameters
        return -(-(size - own) // ranks) + -(-own // expert_shard_ranks(plan))

    total = state.weight * parameters if weights is None or at_rest != weight_bytes else weights
    return StaticMemory(
        held(total, sharded=plan.zero_stage >= 3 or fsdp) + (weight_bytes * parameters if staged else 0),
        copies * held(state.gradient * parameters, sharded=plan.zero_stage >= 2 and not staged),
        held(state.optimizer * parameters, sharded=plan.zero_stage >= 1),
    )


def serving_memory(
    weights: int, caches: Iterable[tuple[int, int | None]], plan: Plan, workload: Workload
) -> StaticMemory:
    """Weights of inference, and the cache of all sequences of a replica, so many bytes for one token, of all tokens or
    of a window: blocks of `kv_block_tokens` are handed out whole (Kwon et al. 2023, arXiv:2309.06180), to each rank of
    a ring for its tokens.
    """
    block, total = workload.kv_block_tokens, 0
    for token_bytes, window in caches:
        own = -(-min(workload.seq_len, window or workload.seq_len) // plan.ring)
        total += -(-own // block) * block * token_bytes
    return StaticMemory(weights, 0, 0, workload.micro_batch * total)


def dummy_gradients(programs: Iterable[Program], weight_bytes: int) -> int:
    """Bytes of what autograd is given for gradients of weights that products have added to main gradients already: one
    tensor of each shape for all weights of a rank, which Transformer Engine keeps (`get_dummy_wgrad`).
    """
    shapes = {shape: size for program in programs for shape, size in program.accumulated.items()}
    return weight_bytes * sum(shapes.values())


def outside_tensors(profile: HardwareProfile, mesh: Mesh) -> int:
    """Bytes that the framework takes beside tensors: context, communicator buffers, reserve."""
    memory = profile.coefficients.memory
    communicators = len(mesh.axes)
    mib = memory.context_mib.value + communicators * memory.communicator_mib.value + memory.reserve_mib.value
    return round(mib * MIB)


def capacity(profile: HardwareProfile) -> int:
    """Bytes that the driver reports."""
    return round(profile.datasheet.memory.reported_mib.value * MIB)
