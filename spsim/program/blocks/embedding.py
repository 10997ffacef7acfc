"""The embedding before the first layer, as Megatron-Core's `LanguageModelEmbedding` runs it."""

from __future__ import annotations

from operator import attrgetter

from spsim.inputs.model import Model
from spsim.inputs.workload import Workload
from spsim.program.blocks.block import ModelBlock
from spsim.program.operators import Operator, Tensor
from spsim.program.strategies import WHOLE_SEQUENCE

TABLE = "embedding_weight"
"""The weight of the embedding, and of the head of a model that ties them."""
TOKEN_BYTES = 8
"""Ids are 64-bit integers."""


def padded_vocab(vocab: int, tp: int) -> int:
    """Rows of a table that tp divides: Megatron pads a vocabulary to a multiple of 128 x tp
    (`make_vocab_size_divisible_by`).
    """
    unit = 128 * tp
    return -(-vocab // unit) * unit


class EmbeddingBlock(ModelBlock):
    """The operators of an embedding."""

    def lookup(self, name: str, ids: Tensor, rows: str, rules: str = "") -> Tensor:
        """A row of a table for each id."""
        out, table = self.tensor(f"{name}_out", "s b h"), self.weight(f"{name}_weight", f"{rows} h")
        self.add(
            name, "embedding", f"s b, {rows} h -> s b h", [ids, table], [out],
            saves=[ids], kernel="embedding", rules=rules,
        )  # fmt: skip
        return out

    def learned_positions(self, x: Tensor) -> Tensor:
        """Rows of a table that every rank has, added before the sequence is scattered."""
        ids = self.tensor("position_ids", "s b", "token ids", itemsize=TOKEN_BYTES)
        positions = self.lookup("position_embedding", ids, "p", WHOLE_SEQUENCE)
        out = self.tensor("positioned", "s b h")
        self.add(
            "add_positions", "elementwise", "s b h, s b h -> s b h", [x, positions], [out],
            passthrough=[x, positions], kernel="add", rules=WHOLE_SEQUENCE,
        )  # fmt: skip
        return out

    def to_sequence_first(self, x: Tensor) -> Tensor:
        """The copy that makes [s b h] of [b s h], or a tensor of its own of a part of the sequence."""
        out = self.tensor("embedded", "s b h")
        self.add("embedding_copy", "elementwise", "s b h -> s b h", [x], [out], kernel="copy")
        return out


embedding_traits = attrgetter("hidden", "positions", "max_positions", "dropout")
"""What of a model, beside its vocabulary, the embedding depends on."""


def embedding_block(
    model: Model, workload: Workload, replicas: int = 1, *, vocab: int | None = None
) -> tuple[Operator, ...]:
    """From token ids [s b] to hidden states [s b h], in forward order.

    `vocab` are the rows of the table, the vocabulary of the model and its padding. Sizes are those of a micro-batch of
    all data-parallel replicas.
    """
    block = EmbeddingBlock(model, workload, replicas, v=vocab or model.vocab, p=model.max_positions)
    x = block.lookup("embedding", block.tensor("tokens", "s b", "token ids", itemsize=TOKEN_BYTES), "v")
    if model.positions == "learned":
        x = block.learned_positions(x)
    x = block.to_sequence_first(x)
    if model.dropout:
        block.dropout("embedding_dropout", x)
    return tuple(block.operators)
