"""Bytes that real layers keep for the backward pass equal the simulator's to the byte, operator by operator.

Compared by category, so that statistics cannot make up for activations. Where torch has habits of its own on
CPU, a test below names each with its bytes.
"""

import pytest
import torch
from torch.nn import functional

from spsim import simulate
from spsim.pytorch.layers import Groups, ParallelLayer, operator, record_saved
from tests.cases import scenario
from tests.truth.cases import COMBINATIONS, GPT, LLAMA, MODELS, PLANS, Case, case, expected_saved, observe, observe_here
from tests.truth.processes import Processes, groups_of

TYPES = (torch.float32, torch.bfloat16)
STATISTICS = ("norm statistics", "log-sum-exp")
by_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


@by_type
@pytest.mark.parametrize("model", MODELS)
def test_one_process(model: str, dtype: torch.dtype) -> None:
    one = case("", **MODELS[model])
    assert observe(one, Groups.create(one.plan), dtype).saved == expected_saved(one, dtype)


@by_type
@pytest.mark.parametrize(("plan", "model"), COMBINATIONS)
def test_two_processes(pair: Processes, plan: str, model: str, dtype: torch.dtype) -> None:
    each = case(plan, **MODELS[model])
    for rank in pair.run(observe_here, each, dtype):
        assert rank.saved == expected_saved(each, dtype)


@pytest.mark.parametrize("plan", ["", "tp=2", "tp=2,sequence_parallel", "ulysses=2", "ring=2,ring_kind=all_gather"])
@pytest.mark.parametrize(
    "shape",
    [
        {"seq_len": 8, "micro_batch": 1, "hidden": 48, "heads": 6},
        {"seq_len": 64, "micro_batch": 2, "hidden": 96, "heads": 2, "head_dim": 64},
        {"seq_len": 20, "micro_batch": 5, "hidden": 40, "heads": 4, "ffn_hidden": 52},
    ],
    ids=str,
)
def test_other_shapes(pair: Processes, plan: str, shape: dict[str, int]) -> None:
    each = case(plan, **shape, **GPT)
    observed = pair.run(observe_here, each, torch.bfloat16)
    assert [rank.saved for rank in observed] == 2 * [expected_saved(each, torch.bfloat16)]


def hidden_tensors(case: Case) -> list[str]:
    """Attributes of autograd nodes that are tensors, which no recorder of saved tensors sees."""
    layer = ParallelLayer(case.model, case.plan, groups_of(case.plan))
    pending = [layer(layer.local_input(torch.ones(case.shape)).requires_grad_()).grad_fn]
    nodes: set[object] = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            pending += [following for following, _ in node.next_functions]
    attributes = [(type(node).__name__, item) for node in nodes for item in getattr(node, "__dict__", {}).items()]
    return [f"{kind}.{name}" for kind, (name, value) in attributes if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("plan", PLANS)
def test_no_operator_hides_a_tensor_from_the_recorder(pair: Processes, plan: str) -> None:
    assert pair.run(hidden_tensors, case(plan, **LLAMA)) == [[], []]


@pytest.mark.parametrize("plan", ["", *PLANS])
def test_the_result_of_a_simulation_says_the_same(pair: Processes, plan: str) -> None:
    """`activation_bytes_per_layer` and `statistics_bytes_per_layer` are sums of what is compared above."""
    run = scenario(plan, seq_len=32, micro_batch=3, hidden=64, heads=4, **LLAMA)
    each = Case(run.plan, run.model, run.workload)
    result = simulate(run)
    ranks = pair.run(observe_here, each, torch.bfloat16) if plan else [observe(each, Groups.create(run.plan))]
    for rank in ranks:
        statistics = sum(size for (_, category), size in rank.saved.items() if category in STATISTICS)
        assert statistics == result.statistics_bytes_per_layer
        assert sum(rank.saved.values()) - statistics == result.activation_bytes_per_layer


# ------------------------------------------------------------ torch's habits, which the simulator does not count

S, B, H = 16, 3, 32


def leaf(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(sizes, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(("weights", "itemsize"), [(torch.bfloat16, 2), (torch.float32, 4)])
def test_layer_norm_on_cpu_keeps_statistics_in_the_type_of_its_weights(weights: torch.dtype, itemsize: int) -> None:
    """CUDA keeps fp32 either way: 8 s b bytes, which the simulator counts."""
    with record_saved() as saved, operator("norm1"):
        functional.layer_norm(leaf(S, B, H), (H,), torch.ones(H, dtype=weights), torch.ones(H, dtype=weights))
    assert saved.bytes("norm statistics") == 2 * itemsize * S * B


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_rms_norm_on_cpu_is_a_composition_of_kernels(dtype: torch.dtype) -> None:
    """It keeps input and normed input in fp32, 8 bytes an element, where the fused kernel keeps the input only."""
    x, weight = leaf(S, B, H, dtype=dtype), leaf(H, dtype=dtype)
    with record_saved(torch.nn.ParameterList([weight])) as saved, operator("norm1"):
        functional.rms_norm(x, (H,), weight)
    assert saved.bytes("activation") == 8 * S * B * H
    assert saved.bytes("norm statistics") == 4 * S * B


def test_dropout_on_cpu_keeps_noise_of_the_type_of_its_input() -> None:
    """2 bytes an element in bf16, where `native_dropout` and CUDA keep a mask of 1."""
    with record_saved() as saved:
        functional.dropout(leaf(S, B, H), 0.1)
    assert saved.bytes() == 2 * S * B * H
    with record_saved() as saved:
        torch.native_dropout(leaf(S, B, H), 0.1, train=True)
    assert saved.bytes() == S * B * H


def test_sdpa_with_dropout_on_cpu_leaves_the_flash_kernel() -> None:
    """It keeps fp32 copies of q, k and v, and probabilities, noise and their product: 12 (a s d + a s s) b bytes.
    Why the layers of these tests have no dropout inside SDPA.
    """
    heads, d = 4, 8
    q, k, v = (leaf(B, heads, S, d) for _ in range(3))
    kept = []
    for p in (0.0, 0.1):
        with record_saved() as saved:
            functional.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        kept.append(saved.bytes())
    rows = B * heads * S
    assert kept == [8 * rows * d + 4 * rows, 12 * rows * (d + S)]


def test_a_view_of_fused_qkv_keeps_all_of_it() -> None:
    """With rotary positions q and k are new, while v keeps the storage of all three: 2 s b (a + kv) d more."""
    heads, kv, d = 4, 2, 8
    fused = leaf(S, B, (heads + 2 * kv) * d) * 1
    q, k, v = (part.unflatten(-1, (-1, d)) for part in fused.split([heads * d, kv * d, kv * d], -1))
    q, k = -q, -k  # any operator that keeps nothing, as rotation does
    with record_saved() as saved:
        functional.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True, enable_gqa=True
        )
    separate = 2 * S * B * d * (heads + 2 * kv) + 2 * S * B * heads * d + 4 * S * B * heads
    assert saved.bytes() == separate + 2 * S * B * (heads + kv) * d


def test_swiglu_out_of_single_kernels_keeps_four_tensors() -> None:
    """Gate, SiLU(gate), up: 6 s b f, and the product, which fc2 keeps anyway: 8 s b f, where a fused kernel and
    fc2 keep 4 + 2.
    """
    x, weight = leaf(S, B, 2, H), leaf(8, H)
    gate, up = (x * 1).unbind(-2)
    gate, up = gate * 1, up * 1
    with record_saved(torch.nn.ParameterList([weight])) as saved:
        functional.linear(functional.silu(gate) * up, weight)
    assert saved.bytes() == 8 * S * B * H
