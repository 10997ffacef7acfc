"""Whose implementation a plan is: for each library what its options are unless the user says otherwise.

A library is nothing but defaults of a plan's options. What is simulated reads the options, never the library's name, so
that each choice can be made by itself. Read and run with the versions given here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LibraryName = Literal[
    "megatron-core", "torchtitan", "transformers", "deepspeed", "torch", "yunchang", "ring-flash-attn"
]
"""`torch` are the defaults of DTensor, FSDP2 and `context_parallel`; `transformers` its `tp_plan` and what Accelerate
adds, torch's `context_parallel` and DeepSpeed's Ulysses for its models (ALST); `deepspeed` its `DistributedAttention`.
"""


@dataclass(frozen=True)
class LibraryRecord:
    """What a library does unless it is told otherwise."""

    version: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Option of a plan -> its value, where that is not the one of the field."""
    staged: Mapping[str, Any] = field(default_factory=dict)
    """Those that are others with pipeline stages."""
    modules: Mapping[str, Any] = field(default_factory=dict)
    """Field of a model that says how its modules run -> its value, where the library has modules of its own, or those
    of another one."""


_EAGER_DTENSOR = {"tp_backward_overlap": False, "norm_gradients": "each_reader", "few_kv_heads": "refuse"}
"""DTensor run eagerly waits for each collective before the next product, and reduces a Partial whenever it is read."""
_CONTEXT_PARALLEL = {"ring_kind": "gather_permute", "ring_gradients": "fp32", "ring_messages": "concatenated"}
"""torch's `context_parallel` with `set_rotate_method("allgather")`, its default; "alltoall" is `ring_kind = "p2p"`."""
_RING_FLASH_ATTENTION = {"ring_gradients": "fp32", "ring_messages": "separate"}
_TORCH_MODULES = {"kernels": "eager", "composite_norm": False, "glu_offset": False}
"""Modules of torch.nn, not compiled."""
_TRANSFORMERS_MODULES = {**_TORCH_MODULES, "composite_norm": True}
_FULLY_SHARDED = {"zero": 3, "dp_library": "fsdp", "pp_sends": "torch"}
_KEPT_FOR_STAGES = {"zero": 2}
"""What is gathered for the first micro-batch stays until the last has passed: torchtitan's default
(`fsdp_reshard_after_forward`), and what torch's schedules do with the weights of a stage."""

LIBRARIES: Mapping[str, LibraryRecord] = {
    "megatron-core": LibraryRecord("0.16.1"),
    "torchtitan": LibraryRecord(
        "0.2.2",
        {
            **_FULLY_SHARDED,
            **_EAGER_DTENSOR,
            **_CONTEXT_PARALLEL,
            "sequence_parallel": True,
            "projections": "separate",
            "keep_gathered": True,
            "batch_first": True,
            "fsdp_ends": "units",
            "recompute_reentrant": False,
        },
        _KEPT_FOR_STAGES,
        _TORCH_MODULES,
    ),
    "transformers": LibraryRecord(
        "5.24.0",
        {
            "dp_library": "ddp",
            **_CONTEXT_PARALLEL,
            "ulysses_gradients": "reverse",
            "gathers_position_ids": True,
            "projections": "separate",
            "input_gradients": "each",
            "tp_backward_overlap": False,
            "loss_parallel": False,
            "recompute_early_stop": True,
            "recompute_reentrant": False,
            "few_kv_heads": "refuse",
        },
        modules=_TRANSFORMERS_MODULES,
    ),
    "deepspeed": LibraryRecord(
        "0.19.8",
        {
            "dp_library": "deepspeed",
            "few_kv_heads": "replicate",
            "uneven_heads": "by_group",
            "ulysses_few_kv_heads": "refuse",
            "ulysses_gradients": "reverse",
        },
        modules=_TRANSFORMERS_MODULES,
    ),
    "torch": LibraryRecord(
        "2.13.0",
        {
            **_FULLY_SHARDED,
            **_EAGER_DTENSOR,
            **_CONTEXT_PARALLEL,
            "projections": "separate",
            "input_gradients": "each",
            "keep_gathered": True,
            "recompute_early_stop": True,
            "recompute_reentrant": False,
            "batch_first": True,
        },
        _KEPT_FOR_STAGES,
        _TORCH_MODULES,
    ),
    "yunchang": LibraryRecord(
        "0.6.4",
        {
            **_RING_FLASH_ATTENTION,
            "ring_cut": "contiguous",
            "ulysses_few_kv_heads": "refuse",
            "ulysses_gradients": "reverse",
        },
    ),
    "ring-flash-attn": LibraryRecord("0.1.8", _RING_FLASH_ATTENTION),
}
"""Library -> what it does. The defaults of the fields of a plan are those of Megatron-Core."""


OF_THE_USER = frozenset({
    "dp_library", "fsdp_ends", "pp_sends", "ring_cut", "ring_kind", "sequence_parallel", "tp_backward_overlap", "zero",
})  # fmt: skip
"""Options of records that libraries leave to their users."""
CHOICES = tuple(sorted({name for record in LIBRARIES.values() for name in record.options} - OF_THE_USER))
"""Options that are how a library is made."""


def some_library_has(choices: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Whether a library makes all of some choices; of those that it does not name it makes the `usual` ones."""
    return any(
        all(record.options.get(name, usual[name]) == value for name, value in choices.items())
        for record in LIBRARIES.values()
    )


def library_defaults(library: Any, stages: Any = 1) -> Mapping[str, Any]:
    """Options of a plan of a library on so many pipeline stages that are not those of the fields; none of what is no
    library.
    """
    record = LIBRARIES.get(library) if isinstance(library, str) else None
    if record is None:
        return {}
    return record.options if stages == 1 else {**record.options, **record.staged}


def module_defaults(library: LibraryName) -> Mapping[str, Any]:
    """How the modules of a model run in a library, by field of the model, where that is not as in Megatron-Core."""
    return LIBRARIES[library].modules
