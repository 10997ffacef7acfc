"""What a rank keeps of a parameter, and the kernels of a step of the optimizer, which move it.

Mixed-precision Adam (Micikevicius et al. 2018; Rajbhandari et al. 2020, section 3.1) as Megatron-Core steps: gradients
in their buffer, an fp32 master of each 16-bit weight, two moments. All of it takes the time of its memory traffic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from spsim.inputs.plan import Plan
from spsim.work import FP32_BYTES

MOMENT_BYTES = {"fp32": 4, "bf16": 2}
GRADIENT_BYTES = {"fp32": 4, "bf16": 2}
REMAINDER_BYTES = 2
"""Of what a 16-bit weight leaves of its fp32 master."""


@dataclass(frozen=True, slots=True)
class ParameterState:
    """Bytes of one parameter, whatever holds them."""

    weight: int
    gradient: int
    """In the buffer in which gradients are accumulated and reduced."""
    master: int
    """The fp32 copy of a 16-bit weight, or the remainder that it leaves; none of an fp32 weight."""
    moments: int
    """Both."""
    precision_aware: bool = False
    """The optimizer reads gradients in their own type and holds remainders."""

    @property
    def optimizer(self) -> int:
        """What only the optimizer reads."""
        return self.master + self.moments


def parameter_state(plan: Plan, weight_bytes: int) -> ParameterState:
    """Of a weight of so many bytes under the optimizer of a plan: 2 + 4 + 4 + 8 bytes unless it says otherwise."""
    half, aware = weight_bytes < FP32_BYTES, plan.precision_aware_optimizer
    return ParameterState(
        weight=weight_bytes,
        gradient=GRADIENT_BYTES[plan.grad_dtype] if half else FP32_BYTES,
        master=(REMAINDER_BYTES if aware else FP32_BYTES) if half else 0,
        moments=2 * MOMENT_BYTES[plan.moment_dtype],
        precision_aware=half and aware,
    )


def shard_ranks(plan: Plan) -> int:
    """Ranks that share one copy of what ZeRO shards."""
    return (plan.shard_group or plan.dp) * plan.ulysses * plan.ring


def expert_shard_ranks(plan: Plan) -> int:
    """The same of experts that are spread: the ranks that hold the same ones."""
    return plan.dp // plan.expert_replicas


class OptimizerKernel(NamedTuple):
    """One kernel, or a row of them over lists of tensors: it takes the time of its memory traffic."""

    name: str
    bytes: int
    """That it reads and writes."""


def zero_gradients(parameters: int, state: ParameterState) -> OptimizerKernel:
    """The gradient buffer of a rank written once, before the first micro-batch (`zero_grad_buffer`)."""
    return OptimizerKernel("zero_gradients", state.gradient * parameters)


def average_gradients(parameters: int, state: ParameterState) -> OptimizerKernel:
    """The buffer divided by the number of replicas before their gradients are summed (`gradient_scaling_factor`)."""
    return OptimizerKernel("average_gradients", 2 * state.gradient * parameters)


def optimizer_step(shard: int, state: ParameterState, *, scaled: bool = False) -> tuple[OptimizerKernel, ...]:
    """The kernels of a step over the parameters that a rank updates: its shard, or all of them.

    `scaled` where the loss is, as in fp16. Bytes of a parameter, of fp32 gradients and moments and a 16-bit weight:
    norm 4, clipping 8, Adam 28, the weight 6: 46 and, with the buffer that is cleared, 50; 8 more to unscale.
    Adam reads and writes 4 bytes of the parameter itself, whether these are weight, master, or weight and remainder.
    The norm of all ranks, one number, is summed between norm and clipping.
    """
    read = state.gradient if state.precision_aware else FP32_BYTES
    kernels: list[OptimizerKernel] = []
    if read != state.gradient:
        kernels.append(OptimizerKernel("gradients_to_fp32", (state.gradient + read) * shard))
    if scaled:
        kernels.append(OptimizerKernel("unscale", 2 * read * shard))
    kernels.append(OptimizerKernel("gradient_norm", read * shard))
    kernels.append(OptimizerKernel("clip", 2 * read * shard))
    kernels.append(OptimizerKernel("adam", (read + 2 * (FP32_BYTES + state.moments)) * shard))
    if state.master and not state.precision_aware:
        kernels.append(OptimizerKernel("weights_from_master", (state.master + state.weight) * shard))
    return tuple(kernels)
