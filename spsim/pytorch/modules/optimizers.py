"""What an optimizer of torch keeps of the parameters of a module, and the kernels of its step.

`torch.optim.AdamW(fused=True)` keeps two moments of each parameter in the parameter's own dtype, and no copy of it. Its
step is one pass over lists of tensors that reads the gradient, and reads and writes parameter and moments
(`aten/src/ATen/native/cuda/fused_adamw_impl.cu`): seven times the bytes of the parameters. Nothing is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spsim.inputs.workload import Precision
from spsim.pytorch.modules.gradients import Gradients
from spsim.work import KernelName

OptimizerName = Literal["adamw", "none"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("adamw", "none")
MOMENTS = 2
MOVED = 1 + 2 * (1 + MOMENTS)
"""Times the bytes of the parameters: the gradient once, parameter and moments there and back."""
HALF_BYTES = 2


@dataclass(frozen=True)
class AdamW:
    """Over the parameters of a rank that have gradients."""

    number: int
    """Of these parameters."""
    size: int
    """Their bytes, which are those of the gradients and of each moment."""
    precision: Precision
    gradients: Gradients

    @property
    def moments(self) -> tuple[int, ...]:
        """Bytes of each kind, which stay from step to step."""
        return (self.size,) * MOMENTS

    @property
    def names(self) -> tuple[str, ...]:
        """Of its kernels: gradients that are kept are cleared for the next step, others let go."""
        return ("adamw", "zero_gradients") if self.gradients == "kept" else ("adamw",)

    @property
    def rates(self) -> tuple[KernelName | None, str | None]:
        """Of 16 bits a profile may know them: the four elements that a thread loads at once are 8 bytes, not 16."""
        return ("adam", self.precision) if self.size <= HALF_BYTES * self.number else (None, self.precision)

    def sizes(self, parameters: int, spread: int = 0) -> list[int]:
        """Bytes that they move, of so many parameters, of which none is `spread`."""
        size = -(-self.size * parameters // self.number)
        return [MOVED * size, size][: len(self.names)]
