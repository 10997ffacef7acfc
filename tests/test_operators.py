"""Operators beyond those of a dense transformer layer: the right figure, or a refusal that names the operand."""

from dataclasses import replace

import numpy as np
import pytest

from spsim.errors import InputError
from spsim.inputs.plan import parse_plan
from spsim.program.instructions import Communication
from spsim.program.kernel_kinds import kernels_of
from spsim.program.mesh import Mesh, mesh_of
from spsim.program.operators import Operand, Operator, Tensor, parse
from spsim.program.placed import PlacedOperator
from spsim.work import FlashAttention, Gemm
from tests.cases import compile_program

SIZES = {
    "s": 4096, "j": 4096, "b": 2, "h": 512, "a": 16, "d": 192, "e": 128, "x": 8, "t": 96, "f": 256, "v": 32000, "y": 3
}  # fmt: skip


def operator(kind, signature, names, *, mixes="", saves=(), kinds=(), sizes=SIZES, name="op"):
    """An operator from its einsum form; `names` are those of inputs and outputs, `kinds` of the inputs that are no
    activations, by name.
    """
    left, right = parse(signature)
    kinds = dict(kinds)

    def operand(tensor, subscript):
        extents = tuple(sizes[dim] for dim in subscript)
        return Operand(Tensor(tensor, subscript, extents, 2, kinds.get(tensor, "activation")), subscript)

    operands = [operand(*pair) for pair in zip(names.split(), (*left, *right), strict=True)]
    return Operator(
        name, kind, tuple(operands[: len(left)]), tuple(operands[len(left) :]), frozenset(mixes.split()), tuple(saves)
    )


def kernels(op):
    """The kernels of an operator on one rank."""
    return kernels_of(PlacedOperator(op, (), Mesh({})))


def collectives(op, plan):
    """(collective, tensor, part) of a program of one operator."""
    plan = parse_plan(plan)
    program = compile_program([op], plan, mesh_of(plan), causal=True)
    return [(s.collective, s.tensor, s.part) for s in program.instructions if isinstance(s, Communication)]


# ------------------------------------------------------------ attention


def attention(queries=4096, keys=4096, **changes):
    """Queries and keys of 192 elements a head, values of 128 (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1)."""
    signature = "s b a d, j b a d, j b a e -> s b a e"
    sizes = {**SIZES, "s": queries, "j": keys, **changes}
    return operator("attention", signature, "q k v context", mixes="j d", sizes=sizes)


@pytest.mark.parametrize(("direction", "widths"), [("forward", 192 + 128), ("backward", 3 * 192 + 2 * 128)])
@pytest.mark.parametrize("causal", [True, False])
def test_values_of_another_width(direction, widths, causal):
    """2 s j (d_qk + d_v) FLOPs per head and sequence, half of it under a mask; backward three products of the width of
    keys and two of that of values. Each of q, k, v and the output is moved once, and again as gradients.
    """
    found = kernels(attention())
    (work,) = getattr(found, direction)(causal, "zigzag")
    square = 4096 * 4096 * 2 * 16 * 2 * widths
    assert work.flops == (square // 2 if causal else square)
    assert (work.head_dim, work.value_dim) == (192, 128)
    assert work.bytes_moved == (1 if direction == "forward" else 2) * 2 * (4096 * 2 * 16) * 2 * (192 + 128)


def test_keys_and_values_of_another_type():
    """A cache of one byte an element: queries and output are moved as two."""
    op = attention()
    queries, *cached = op.inputs
    cached = [Operand(operand.tensor._replace(itemsize=1), operand.subscript) for operand in cached]
    (work,) = kernels(replace(op, inputs=(queries, *cached))).forward(True, "zigzag")
    assert work.bytes_moved == 4096 * 2 * 16 * (2 + 1) * (192 + 128)


@pytest.mark.parametrize(("queries", "keys"), [(1, 4096), (1, 1), (7, 4096), (100, 101)])
def test_queries_at_the_end_of_the_keys(queries, keys):
    """A token that is decoded sees all keys; of several the first sees all but those of the others."""
    (work,) = kernels(attention(queries, keys)).forward(True, "zigzag")
    pairs = sum(keys - queries + 1 + place for place in range(queries))
    assert work.twice_pairs == (2 * pairs if queries < keys else keys * keys)


def test_as_many_queries_as_keys_are_half_of_the_square():
    """The convention of published FLOPs, which leaves out half of the diagonal."""
    (work,) = kernels(attention()).forward(True, "zigzag")
    assert work.twice_pairs == 4096 * 4096


def test_a_mask_needs_keys_for_every_query_and_no_ring():
    with pytest.raises(InputError, match=r"operator op .* a causal mask of 8 queries on 4 keys"):
        kernels(attention(8, 4)).forward(True, "zigzag")
    with pytest.raises(InputError, match="needs no ring"):
        collectives(attention(8, 4096), "ring=2")


def test_attention_takes_three_operands():
    masked = operator("attention", "s b a d, j b a d, j b a d, s j -> s b a d", "q k v mask out", mixes="j d")
    with pytest.raises(InputError, match="takes queries, keys and values"):
        kernels(masked).forward(False, "zigzag")


# ------------------------------------------------------------ products


def experts(signature="x t h, x h f -> x t f", names="tokens weight out"):
    """Eight experts, each a product of its own tokens."""
    return operator("gemm", signature, names, saves=["tokens"], kinds={"weight": "weight", "other": "weight"})


def test_a_product_for_each_expert():
    """2 e t h f FLOPs in a batch of eight, forward and for both gradients."""
    found = kernels(experts())
    (forward,) = found.forward(True, "zigzag")
    assert forward == Gemm(m=96, n=256, k=512, batch=8, bytes_moved=forward.bytes_moved)
    (_, of_tokens), (of_weight,) = found.data_gradients[0], found.weight_gradients
    assert {work.flops for work in (forward, of_tokens, of_weight)} == {2 * 8 * 96 * 512 * 256}
    assert (of_tokens.n, of_weight.m, of_weight.accumulated) == (512, 512, 8 * 512 * 256)
    assert forward.bytes_moved == 2 * 8 * (96 * 512 + 512 * 256 + 96 * 256)


def test_weights_of_a_product_are_multiplied_alike():
    with pytest.raises(InputError, match="other is not multiplied along the dimensions of weight"):
        kernels(experts("x t h, x h f, h y -> x t f y", "tokens weight other out")).forward(True, "zigzag")


@pytest.mark.parametrize("kind", ["elementwise", "gemm"])
def test_dealing_tokens_out_is_no_sum(kind):
    """It would be split along the sequence and summed over it; an operator that mixes positions gathers them."""
    with pytest.raises(InputError, match=r"operator op .*: dealt has dimensions of no input \(x t\)"):
        operator(kind, "s b h -> x t h", "tokens dealt")
    dealt = operator("elementwise", "s b h -> x t h", "tokens dealt", mixes="s b")
    found = collectives(dealt, "ulysses=4")
    assert {name for name, _, _ in found} <= {"all_gather", "reduce_scatter"}
    assert ("all_gather", "tokens", "forward") in found


def test_a_product_multiplies_what_it_sums():
    summed = operator("gemm", "s b a d, j b d -> s b j", "left right out")
    with pytest.raises(InputError, match="left is summed over a, not multiplied"):
        kernels(summed).forward(True, "zigzag")
    with pytest.raises(InputError, match="takes two activations"):
        kernels(operator("gemm", "s b h -> s b", "left out")).forward(True, "zigzag")


@pytest.mark.parametrize("signature", ["s b h, s b h, h f -> s b f", "h f, h f -> f"])
def test_a_product_has_one_activation_beside_its_weights(signature):
    names = "left right weight out" if signature.startswith("s") else "weight other out"
    product = operator("gemm", signature, names, kinds={"weight": "weight", "other": "weight"})
    with pytest.raises(InputError, match="takes one activation"):
        kernels(product).forward(True, "zigzag")


# ------------------------------------------------------------ embeddings


def embedding(kind="token ids"):
    """Rows of a table of 32,000."""
    return operator(
        "embedding", "s b, v h -> s b h", "ids table hidden", saves=["ids"], kinds={"ids": kind, "table": "weight"}
    )


def test_an_embedding_reads_rows():
    """Ids, a row for each and the result; backward the gradient of the table is cleared, and that of the result added
    to its rows, which are read and written.
    """
    rows = 4096 * 2 * 512 * 2
    (forward,), (backward,) = (getattr(kernels(embedding()), name)(True, "zigzag") for name in ("forward", "backward"))
    assert (forward.operator_class, forward.bytes_moved, forward.flops) == ("embedding", 4096 * 2 * 2 + 2 * rows, 0)
    assert backward.bytes_moved == 4096 * 2 * 2 + 3 * rows + 32000 * 512 * 2
    assert backward.backward


def test_a_program_begins_with_token_ids():
    """They come from outside, are kept for the gradient of the table, and have none themselves."""
    plan = parse_plan("tp=2,ulysses=2")
    program = compile_program([embedding()], plan, mesh_of(plan), causal=True)
    assert [buffer.tensor for buffer in program.inputs] == ["ids"]
    assert program.input_gradients == ()
    assert [saved.tensor for saved in program.saved] == ["ids"]
    assert program.parameters == 32000 * 512 // 2
    assert [(sync.weight, sync.axes) for sync in program.weight_sync] == [("table", ("ulysses",))]


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("tp=4", [("all_reduce", "hidden", "forward")]),
        ("tp=4,sequence_parallel", [("reduce_scatter", "hidden", "forward"), ("all_gather", "hidden", "backward")]),
        ("ulysses=4", []),
        ("ulysses=4,ring=2", []),
    ],
)
def test_an_embedding_is_split_by_its_vocabulary_or_its_tokens(plan, expected):
    """A rank of tp has some rows of the table and leaves a partial sum, which the next operator has made whole. Ids are
    not sent.
    """
    norm = operator("norm", "s b h, h -> s b h", "hidden scale normed", mixes="h", kinds={"scale": "weight"}, name="n")
    parsed = parse_plan(plan)
    program = compile_program([embedding(), norm], parsed, mesh_of(parsed), causal=True)
    found = [(s.collective, s.tensor, s.part) for s in program.instructions if isinstance(s, Communication)]
    assert found == expected


def test_an_embedding_is_not_fed_activations():
    with pytest.raises(InputError, match="token ids"):
        kernels(embedding("activation")).forward(True, "zigzag")


def test_a_lookup_is_of_rows():
    """Not of the sum of a row."""
    summed = operator("embedding", "s b, v h -> s b", "ids table out", kinds={"ids": "token ids", "table": "weight"})
    with pytest.raises(InputError, match="table is not looked up along one dimension"):
        kernels(summed).forward(True, "zigzag")


def test_widths_may_differ_within_an_array_of_kernels():
    """Work of arrays: FLOPs of each as alone."""
    columns = {
        "batch": 2,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": [64, 192],
        "value_dim": [64, 128],
        "queries": 8,
        "keys": 8,
    }
    many = FlashAttention(
        "cudnn", ("forward", "backward"), *(np.array(v, dtype=float) for v in columns.values()), 64.0, True, 1.0
    )
    alone = [
        FlashAttention("cudnn", direction, 2, 4, 4, d, e, 8, 8, 64, True, 1).flops
        for direction, d, e in (("forward", 64, 64), ("backward", 192, 128))
    ]
    assert many.flops.tolist() == alone
