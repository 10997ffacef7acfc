"""What is recorded of a library: the two passes of a module, and what of a step follows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class Subject:
    """Passes of one rank; `loss` may be any tensor, whose gradient then is ones."""

    root: nn.Module
    loss: Callable[[], Tensor]
    step: Callable[[], None] | None = None
    """What comes after the backward pass."""
    shared: Sequence[Tensor] = ()
    """What all layers read, such as masks and rotary tables: none of them keeps it."""
    within: AbstractContextManager[None] = field(default_factory=nullcontext)
    """In which both passes run."""
