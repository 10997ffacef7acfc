"""In the place of flash-attn, which needs CUDA: the same signatures, computed by torch on the CPU.

The ring packages call it for one block of attention after another; what they send between blocks is their own.
"""

from typing import Any

__version__ = "2.8.3"


def flash_attn_func(*args: Any, **kwargs: Any) -> Any:
    """Whole attention, which no ring calls."""
    raise NotImplementedError("the stand-in for flash-attn has blocks of attention only")
