"""The workload: how many tokens, in which phase and precision."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, model_validator

from spsim.inputs import words
from spsim.inputs.configuration import Configuration
from spsim.inputs.documents import MOST, lengths_of

Precision = Literal["fp32", "bf16", "fp16", "fp8", "fp8_delayed", "mxfp8", "fp8_blockwise", "nvfp4"]
"""From `fp8` on recipes: products of a layer in 8 or 4 bits, all else in bf16; see `program.recipes`."""
ELEMENT_BYTES: Mapping[str, int] = {
    "fp32": 4, "bf16": 2, "fp16": 2,
    "fp8": 2, "fp8_any_layout": 2, "fp8_delayed": 2, "fp8_delayed_any_layout": 2, "mxfp8": 2, "fp8_blockwise": 2,
    "nvfp4": 2,
}  # fmt: skip
"""Of tensors between operators: they stay in 16 bits where operands of products are cast to 8 or 4."""
ROW_UNITS: Mapping[str, int] = {"fp8": 16, "fp8_delayed": 16, "mxfp8": 32, "fp8_blockwise": 128, "nvfp4": 16}
"""What must divide rows and columns of operands that are cast (Transformer Engine): a block of one scale, 16 bytes."""

_UNITS = {"k": 2**10, "m": 2**20}


def tokens(value: Any) -> Any:
    """`64K` and `1M` as the numbers of tokens that they mean, 65,536 and 1,048,576; anything else as it is."""
    found = re.fullmatch(r"(\d{1,9})([kKmM])", value) if isinstance(value, str) else None
    return int(found[1]) * _UNITS[found[2].lower()] if found else value


def product_type(precision: str) -> str:
    """Data type of the products of a layer in a precision."""
    return "fp8" if precision == "fp8_delayed" else precision


Phase = Literal["training", "prefill", "decode"]
CacheType = Literal["auto", "bf16", "fp8"]


def _phase(value: Any) -> Any:
    return words.PHASES.get(words.plain(value), words.plain(value)) if isinstance(value, str) else value


def _precision(value: Any) -> Any:
    return words.PRECISIONS.get(words.plain(value), words.plain(value)) if isinstance(value, str) else value


Lengths = Annotated[
    tuple[Annotated[int, Field(ge=1, strict=True)], ...], Field(min_length=1, max_length=MOST, strict=False)
]


class Passage(NamedTuple):
    """Tokens of a sequence that pass together, and up to which position they see it: those before are in the cache."""

    tokens: int
    keys: int


class Workload(Configuration):
    """Tokens of a step; `global_batch` defaults to one micro-batch per data-parallel replica."""

    words: ClassVar[Mapping[str, Iterable[str]]] = words.WORKLOAD

    seq_len: Annotated[int, Field(ge=1, le=2**30), BeforeValidator(tokens)]
    """Tokens of a sequence; a text such as `64K` too."""
    micro_batch: Annotated[int, Field(ge=1, le=2**20)] = 1
    """Sequences of one micro-batch on one replica."""
    global_batch: Annotated[int, Field(ge=1, le=2**30)] | None = None
    """Sequences of a step over all replicas."""
    documents: Lengths | None = None
    """Lengths in tokens of the documents that each sequence is packed of, each of which sees itself alone; a table such
    as `{mean = 2048, seed = 0}` draws them. One document unless given."""
    phase: Annotated[Phase, BeforeValidator(_phase)] = "training"
    """Of inference, forward only: `prefill` passes a prompt of `seq_len` tokens and makes the first token after it,
    `decode` passes one token of each sequence, the last of `seq_len`, and makes the next.
    """
    chunk_tokens: Annotated[int, Field(ge=1, le=2**30), BeforeValidator(tokens)] | None = None
    """Tokens of a prompt that a prefill passes at once, one chunk after another; all of them unless given."""
    kv_cache_dtype: CacheType = "auto"
    """In which keys and values are kept; `auto` is that of activations."""
    kv_block_tokens: Annotated[int, Field(ge=1, le=2**16)] = 16
    """Tokens of a block of the cache, which is handed out whole (`--block-size` of vLLM)."""
    precision: Annotated[Precision, BeforeValidator(_precision)] = "bf16"

    @model_validator(mode="before")
    @classmethod
    def _draw_documents(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "documents" not in data:
            return data
        return {**data, "documents": lengths_of(data["documents"], tokens(data.get("seq_len")))}

    @model_validator(mode="after")
    def _documents_fill(self) -> Self:
        if self.documents is None:
            return self
        if sum(self.documents) != self.seq_len:
            raise ValueError(
                f"documents have {sum(self.documents)} tokens in all, but seq_len = {self.seq_len}; make them equal"
            )
        if self.phase != "training":
            raise ValueError(f"documents with phase = {self.phase!r}: packed sequences are trained on; leave one out")
        return self

    @property
    def product_type(self) -> str:
        """Data type of the products of a layer, whose peak utilisation is relative to."""
        return product_type(self.precision)

    @property
    def element_bytes(self) -> int:
        """Of one element of an activation or weight."""
        return ELEMENT_BYTES[self.precision]

    @property
    def cache_bytes(self) -> int:
        """Of one element of the cache of keys and values."""
        return {"auto": self.element_bytes, "bf16": 2, "fp8": 1}[self.kv_cache_dtype]

    @property
    def passages(self) -> tuple[Passage, ...]:
        """The passes of a step of inference, one after another."""
        if self.phase == "decode":
            return (Passage(1, self.seq_len),)
        size = self.chunk_tokens or self.seq_len
        ends = (*range(size, self.seq_len, size), self.seq_len)
        return tuple([Passage(end - begin, end) for begin, end in zip((0, *ends), ends, strict=False)])


@dataclass(frozen=True, slots=True)
class Workloads:
    """Many workloads that differ in their sizes only, as arrays."""

    seq_len: Any
    micro_batch: Any
    precision: Precision
