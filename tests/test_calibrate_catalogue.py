"""What a calibration measures: FLOPs and bytes against the kernels of the simulator, sizes against the machine."""

import subprocess
import sys

import pytest

from spsim.inputs.model import Model
from spsim.inputs.profiles import load_profile, profile_names
from spsim.inputs.workload import Workload
from spsim.measuring.calibrate.catalogue import (
    COLLECTIVES,
    Group,
    Machine,
    collective_rows,
    compute_rows,
    groups,
    interference_rows,
    memory_rows,
)
from spsim.measuring.calibrate.shapes import flash_attention, linear, memory_bound, score_products
from spsim.measuring.processes.matching import describes
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.kernel_kinds import kernels_of
from spsim.program.mesh import Mesh
from spsim.program.placed import PlacedOperator
from spsim.units import GIB, KIB, MIB
from spsim.work import Gemm
from tests.cases import model

TOKENS, BATCH = 96, 2
ROWS = TOKENS * BATCH


def machine(**changes):
    """One node of eight GPUs with a cache of 50 MiB, unless changed."""
    fields = {
        "device": "cuda", "dtypes": ("fp32", "tf32", "fp16", "bf16", "fp8"), "cache_bytes": 50 * MIB, "ranks": 8,
        "nodes": 1, "levels": ("nvlink", "infiniband"), "attention_kernels": ("cudnn", "flash_attention_2"),
    }  # fmt: skip
    return Machine(**{**fields, **changes})


CPU = machine(
    device="cpu",
    dtypes=("fp32", "bf16"),
    cache_bytes=16 * MIB,
    ranks=2,
    levels=("shared-memory",),
    attention_kernels=("torch_cpu",),
)


def kernels(name, **changes):
    """The simulator's kernels of one operator of a layer on one rank."""
    layer = transformer_layer(model(**changes), Workload(seq_len=TOKENS, micro_batch=BATCH))
    return kernels_of(PlacedOperator(next(operator for operator in layer if operator.name == name), (), Mesh({})))


def gemm(row):
    return Gemm(row.m, row.n, row.k, row.batch, row.bytes_moved, row.accumulated or 0)


@pytest.mark.parametrize("name", ["fc1", "fc2", "projection"])
def test_products_of_a_linear_are_those_of_the_simulator(name):
    operator = kernels(name, bias=False)
    forward, dgrad, wgrad, accumulated = map(gemm, linear("bf16", ROWS, *shape_of(operator)))
    assert forward == operator.forward(True, "zigzag")[0]
    assert dgrad == operator.data_gradients[0][1]
    assert accumulated == operator.weight_gradients[0]
    assert (wgrad.flops, wgrad.bytes_moved, wgrad.accumulated) == (accumulated.flops, accumulated.bytes_moved, 0)


def shape_of(operator):
    work = operator.forward(True, "zigzag")[0]
    return work.k, work.n


def test_products_of_unfused_attention_are_those_of_the_simulator():
    qk, av = kernels("qk", attention="unfused"), kernels("av", attention="unfused")
    first, second, key_gradient = map(gemm, score_products("bf16", BATCH, 8, 32, TOKENS))
    assert first == qk.forward(True, "zigzag")[0]
    assert second == av.forward(True, "zigzag")[0]
    gradients = {"q": qk.data_gradients[0], "k": qk.data_gradients[1], "v": av.data_gradients[1]}
    assert gradients["q"][1] == second
    for of_keys in (gradients["k"][1], gradients["v"][1]):
        # The simulator has the transposed product: the same work.
        assert {of_keys.m, of_keys.n} == {key_gradient.m, key_gradient.n}
        assert (of_keys.k, of_keys.flops, of_keys.bytes_moved) == (
            key_gradient.k, key_gradient.flops, key_gradient.bytes_moved
        )  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_flash_attention_moves_what_the_simulator_says(direction, kv_heads):
    work = kernels("attention", kv_heads=kv_heads).over_gathered_keys(direction, True, "zigzag")[0]
    row = flash_attention(
        "cudnn", "bf16", direction, batch=BATCH, heads=8, kv_heads=kv_heads, head_dim=32, tokens=TOKENS, causal=True
    )
    assert row.bytes_moved == work.bytes_moved
    assert (row.batch, row.heads, row.kv_heads, row.head_dim, row.queries, row.keys, row.causal) == (
        work.batch, work.heads, work.kv_heads, work.head_dim, work.queries, work.keys, work.causal
    )  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "simulated", "rows", "width", "changes"),
    [
        ("layer_norm", "norm1", ROWS, 256, {}),
        ("rms_norm", "norm1", ROWS, 256, {"norm": "rmsnorm"}),
        ("masked_softmax", "softmax", BATCH * 8 * TOKENS, TOKENS, {"attention": "unfused"}),
        ("softmax", "softmax", BATCH * 8 * TOKENS, TOKENS, {"attention": "unfused", "causal": False}),
        ("dropout", "attention_dropout", BATCH * 8 * TOKENS, TOKENS, {"attention": "unfused", "dropout": 0.1}),
        ("gelu", "gelu", ROWS, 1024, {"bias": False}),
        ("bias_gelu", "gelu", ROWS, 1024, {}),
        ("swiglu", "swiglu", ROWS, 512, {"gated_mlp": True, "ffn_hidden": 512}),
        ("bias_dropout_add", "residual1", ROWS, 256, {"dropout": 0.1}),
    ],
)
def test_memory_bound_operators_move_what_the_simulator_says(operator, simulated, rows, width, changes):
    forward, backward = memory_bound(operator, "bf16", rows, width)
    expected = kernels(simulated, **changes)
    (there,), (back,) = expected.forward(True, "zigzag"), expected.backward(True, "zigzag")
    assert (forward.bytes_moved, backward.bytes_moved) == (there.bytes_moved, back.bytes_moved)
    assert forward.operator_class == backward.operator_class == there.operator_class
    assert (there.kernel, there.backward) == (back.kernel, not back.backward) == (operator, False)


def test_kernels_of_one_pass_move_what_the_simulator_says():
    (added,) = kernels("residual1").forward(True, "zigzag")
    (alone,) = kernels("residual1", bias=False).forward(True, "zigzag")
    (gradient,) = kernels("residual1").backward(True, "zigzag")
    for work, name in ((added, "bias_add"), (alone, "add"), (gradient, "bias_gradient")):
        (row,) = memory_bound(name, "bf16", ROWS, 256)
        assert (row.bytes_moved, row.operator_class, work.kernel) == (work.bytes_moved, work.operator_class, name)


def test_a_bias_gradient_of_a_linear_moves_what_is_measured():
    qkv = kernels("qkv")
    _, gradient = qkv.weight_gradients
    (row,) = memory_bound("bias_gradient", "bf16", ROWS, shape_of(qkv)[1])
    assert (gradient.kernel, gradient.bytes_moved) == (row.name, row.bytes_moved)


def test_norms_of_queries_are_rms_norms():
    assert kernels("q_norm", qk_norm=True).forward(True, "zigzag")[0].kernel == "rms_norm"


def test_rotations_move_what_the_simulator_says():
    """Heads of 128, as they are measured; one sequence, since all sequences share the table."""
    operators = transformer_layer(
        Model(layers=1, hidden=512, heads=4, vocab=64, positions="rope"), Workload(seq_len=64, micro_batch=1)
    )
    rope = kernels_of(PlacedOperator(next(o for o in operators if o.name == "rope_q"), (), Mesh({})))
    forward, backward = memory_bound("rope", "bf16", 64, 512)
    (there,), (back,) = rope.forward(True, "zigzag"), rope.backward(True, "zigzag")
    assert (forward.bytes_moved, backward.bytes_moved) == (there.bytes_moved, back.bytes_moved)
    assert there.kernel == back.kernel == "rope"


def test_fp32_moves_twice_the_bytes_of_bf16_but_for_masks_and_statistics():
    (half, _), (whole, _) = (memory_bound("dropout", dtype, 8, 16) for dtype in ("bf16", "fp32"))
    assert whole.bytes_moved - 8 * 16 == 2 * (half.bytes_moved - 8 * 16)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("where", [machine(), CPU], ids=["gpu", "cpu"])
def test_every_measurement_is_listed_once_and_classes_have_both_tiers(where, quick):
    rows = [
        *compute_rows(where, quick=quick), *memory_rows(where), *collective_rows(where, quick=quick),
        *interference_rows(where),
    ]  # fmt: skip
    assert len({row.key for row in rows}) == len(rows)
    tiers = {}
    for row in rows:
        if row.kind == "memory_bound":
            # Between the two the simulator interpolates.
            assert not where.cache_bytes / 2 < row.bytes_moved < where.cache_bytes
            tiers.setdefault(row.operator_class, set()).add(row.bytes_moved < where.cache_bytes)
    assert len(tiers) == 7
    assert all(found == {True, False} for found in tiers.values())
    assert {row.dtype for row in rows if row.kind == "gemm"} == set(where.dtypes)


def test_quick_is_a_part_of_the_work_of_full():
    assert len(compute_rows(CPU, quick=True)) < len(compute_rows(CPU, quick=False)) / 2


def test_groups_of_one_node_and_of_several():
    assert groups(machine(ranks=8)) == [Group("nvlink", 1, size) for size in (2, 4, 8)]
    assert groups(machine(ranks=6)) == [Group("nvlink", 1, size) for size in (2, 4, 6)]
    assert groups(machine(ranks=2, nodes=2)) == [Group("infiniband", 2, 1)]
    across = groups(machine(ranks=16, nodes=2))[-2:]
    assert [group.members(8) for group in across] == [[0, 8], list(range(16))]
    assert groups(machine(ranks=1)) == []
    assert collective_rows(machine(ranks=1), quick=True) == []


def test_messages_go_from_a_kibibyte_to_a_gibibyte_for_every_group():
    rows = [row for row in collective_rows(machine(ranks=16, nodes=2), quick=False) if row.kind == "collective"]
    for group in groups(machine(ranks=16, nodes=2)):
        ranks = group.nodes * group.ranks_per_node
        for name in COLLECTIVES:
            sizes = [
                row.message_bytes
                for row in rows
                if (row.name, row.level, row.ranks, row.nodes) == (name, group.level, ranks, group.nodes)
            ]
            assert sizes == [KIB << power for power in range(21)]
            assert sizes[-1] == GIB


@pytest.mark.parametrize(
    ("device", "profile"),
    [
        ("NVIDIA A100-SXM4-80GB", "dgx-a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", "dgx-a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-8"),
        ("NVIDIA H100 80GB HBM3", "dgx-h100"),
        ("NVIDIA H100 PCIe", "h100-pcie-8"),
        ("NVIDIA H200", "dgx-h200"),
        ("NVIDIA B200", "dgx-b200"),
        ("NVIDIA GB200", "gb200-nvl72"),
        ("NVIDIA B300 SXM6 AC", "dgx-b300"),
        ("NVIDIA GB300", "gb300-nvl72"),
        ("NVIDIA L40S", "l40s-8"),
        ("AMD Instinct MI300X", "mi300x-8"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H20", "h20-8"),
        ("NVIDIA L40", None),
        ("AMD Instinct MI325X", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090-8"),
    ],
)
def test_names_of_drivers_find_their_profile_and_no_other(device, profile):
    found = [name for name in profile_names() if describes(load_profile(name), device, gpu=True)]
    assert found == ([] if profile is None else [profile])


@pytest.mark.slow
def test_all_but_the_measuring_itself_does_without_torch():
    code = (
        "import sys; from spsim.measuring.calibrate import base, catalogue, launch, records, session, shapes, timing; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
