"""Multi-token prediction: parameters and FLOPs as published, what its block reads and hands on, where it stands."""

import pytest

from spsim import Model, Scenario, simulate
from spsim.errors import InputError
from spsim.inputs.grid import Grid
from spsim.inputs.plan import parse_plan
from spsim.inputs.stages import all_chunks
from spsim.inputs.workload import Workload
from spsim.program.assembly import HEAD, MTP, compile_step
from spsim.program.instructions import Communication, Compute
from spsim.simulation import simulate_many

SMALL = {
    "layers": 4, "hidden": 1024, "ffn_hidden": 4096, "heads": 16, "kv_heads": 4, "gated_mlp": True, "vocab": 32000,
    "mtp_layers": 1,
}  # fmt: skip
TOKENS = 1024


def programs(plan, **changes):
    return compile_step(Model(**{**SMALL, **changes}), parse_plan(plan), Workload(seq_len=TOKENS))


def operators(program):
    return [step.operator for step in program.forward if isinstance(step, Compute)]


def step(plan, **further):
    workload = {"seq_len": TOKENS, "global_batch": 8 * parse_plan(plan).dp}
    return simulate(Scenario(hardware="dgx-h100", model=SMALL, plan=plan, workload=workload), **further)


def test_parameters():
    """A layer, a projection from 2h to h, norms of both of its inputs and of the result."""
    with_it, without = Model(**SMALL), Model(**{**SMALL, "mtp_layers": 0})
    assert with_it.parameters - without.parameters == without.layer_parameters + 2 * 1024**2 + 3 * 1024
    found = programs("")
    assert found[MTP].parameters == without.layer_parameters + 2 * 1024**2 + 4 * 1024  # and the final norm
    assert found[HEAD].parameters == 32000 * 1024
    assert programs("pp=2")[MTP].parameters - found[MTP].parameters == 32000 * 1024  # a copy of the embedding


def test_its_layer_stands_between_the_final_norm_and_two_heads():
    """`MultiTokenPredictionLayer` and `process_mtp_loss` of Megatron-Core."""
    found = programs("")
    own = operators(found[MTP])
    assert own[:8] == [
        "final_norm", "embedding", "embedding_copy", "enorm", "hnorm", "join", "eh_proj", "norm1"
    ]  # fmt: skip
    assert own[-4:] == ["residual2", "mtp_final_norm", "predicted_hidden_copy", "last_hidden_copy"]
    head = operators(found[HEAD])
    assert head[0] == "mtp_output_layer"
    assert head[len(head) // 2 :] == [name.removeprefix("mtp_") for name in head[: len(head) // 2]]


def test_blocks_hand_on_the_hidden_states_of_both_tokens():
    found = programs("pp=2")
    assert [buffer.tensor for buffer in found[MTP].outputs] == ["predicted_hidden", "last_hidden"]
    assert [buffer.tensor for buffer in found[HEAD].inputs] == [
        "predicted_hidden", "last_hidden", "mtp_targets", "targets"
    ]  # fmt: skip
    gradients = [buffer.tensor for buffer in found[HEAD].input_gradients]
    assert gradients == [buffer.tensor for buffer in found[MTP].output_gradients]


def test_the_projection_is_column_parallel():
    """It gathers 2h of a token before, and its columns become the sequence that the layer reads."""
    sizes = {
        step.tensor: (step.collective, step.message_bytes / 2 / TOKENS)
        for step in programs("tp=2,sequence_parallel")[MTP].forward
        if isinstance(step, Communication)
    }
    assert sizes["joined"] == ("all_gather", 2048)
    assert sizes["layer_input"] == ("all_to_all", 512)


def test_modules_of_its_layer_are_recomputed():
    again = [s.operator for s in programs("recompute=selective")[MTP].backward if s.part == "recompute"]
    assert again == ["attention"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=2,sequence_parallel", "pp=2,tp=2", "pp=2,virtual_pp=2,pp_layout=Et/t/t/tmL"])
def test_folded_is_unfolded(plan):
    one, other = (step(plan, fold=fold) for fold in (True, False))
    assert (one.step_ps, one.peak_bytes) == (other.step_ps, other.peak_bytes)


DEEPSEEK = {
    "layers": 61, "hidden": 7168, "ffn_hidden": 18432, "heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "gated_mlp": True, "vocab": 129280,
    "experts": 256, "experts_per_token": 8, "expert_ffn_hidden": 2048, "shared_ffn_hidden": 2048, "dense_layers": 3,
}  # fmt: skip


@pytest.mark.parametrize(("mtp_layers", "gigaflops"), [(0, 249.81), (1, 259.99)])
def test_flops_of_a_token_are_as_published(mtp_layers, gigaflops):
    """NVIDIA-NeMo/Megatron-Bridge at 067f987d, docs/performance-summary.md, by its flop_utils.py: causal half, 4096
    tokens; the router is not counted there.
    """
    model = Model(**DEEPSEEK, mtp_layers=mtp_layers)
    plan = "pp=16,dp=8,ep=8"
    result = simulate(Scenario(hardware="gb200-nvl72", model=model, plan=plan, workload={"seq_len": 4096}))
    found = result.amounts.causal / (8 * 4096) / 1e9
    assert found == pytest.approx(gigaflops, rel=0.005)
    assert found - 6 * (58 + mtp_layers) * 7168 * 256 / 1e9 == pytest.approx(gigaflops, abs=0.02)


def test_it_stands_before_the_loss():
    model = Model(**SMALL)
    chunks = all_chunks(model, parse_plan("pp=2,virtual_pp=2,pp_layout=Et/t2/t/mL"))
    assert [len(chunk.layers) for chunk in chunks] == [1, 2, 1, 0]


@pytest.mark.parametrize(
    ("changes", "plan", "message"),
    [
        ({}, "pp=2,pp_layout=Et2/t2L", "has 0 m, but the model has mtp_layers = 1"),
        ({"mtp_layers": 0}, "pp=2,pp_layout=Et2/t2mL", "has 1 m, but the model has mtp_layers = 0"),
        ({}, "pp=2,virtual_pp=2,pp_layout=Et2/t/tm/L", "m, multi-token prediction, stands apart from the loss"),
        ({"head_rows": 0}, "", "mtp_layers = 1 needs head_rows = 32000"),
        ({"positions": "learned"}, "", "mtp_layers = 1 needs positions = 'rope'"),
        ({"mtp_layers": 2}, "", "mtp_layers"),
    ],
)
def test_what_does_not_fit_is_refused(changes, plan, message):
    with pytest.raises(InputError, match=message):
        Scenario(hardware="dgx-h100", model={**SMALL, **changes}, plan=plan, workload={"seq_len": TOKENS})


@pytest.mark.parametrize("plan", ["tp=4", "tp=2,sequence_parallel,recompute=full"])
def test_many_workloads_at_once(plan):
    """The next block waits for the sums of gradients that the head ends with."""
    scenario = Scenario(hardware="dgx-h100", model=SMALL, plan=plan, workload={"seq_len": TOKENS, "global_batch": 2})
    found = simulate_many(Grid.of(scenario, [(TOKENS, 1, 2), (2 * TOKENS, 1, 2)]))
    assert int(found.step_ps[0]) == simulate(scenario).step_ps
