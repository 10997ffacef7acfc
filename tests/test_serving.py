"""Prefill and decode: what is sent, kept and computed, against closed forms."""

import csv
import math
from itertools import pairwise
from pathlib import Path

import pytest

from spsim import InputError, Scenario, explain, plan_search, simulate
from spsim.costs.kernels import ComputeCost
from spsim.inputs.launch.emission import emit
from spsim.inputs.presets import load_model
from spsim.inputs.profiles import load_profile
from spsim.program.instructions import Communication, Compute
from spsim.program.placement import sent_bytes
from spsim.studies.microbenchmarks import Attention, measured_kernels, summary
from spsim.work import FlashAttention

DATA = Path(__file__).parents[1] / "experiments/data"
H, KV, LAYERS, VOCAB = 4096, 1024, 32, 128256
"""Of Llama-3-8B."""
S, P = 8192, 8
HALF = 2
"""Bytes of an element."""


def served(plan: str = "", phase: str = "prefill", hardware: str = "dgx-h100", **workload: object):
    workload = {"seq_len": S, "phase": phase, **workload}
    return simulate(Scenario(hardware=hardware, model="llama-3-8b", plan=plan, workload=workload))


def sent(result) -> dict[str, int]:
    """Bytes that a GPU sends in one layer, by kind of collective."""
    found: dict[str, int] = {}
    for step in result.program.forward:
        if isinstance(step, Communication):
            found[step.collective] = found.get(step.collective, 0) + step.sent_bytes
    return found


def pairs(result) -> int:
    """Twice the query-key pairs of a head that core attention computes in a layer on one rank."""
    works = (w for step in result.program.forward if isinstance(step, Compute) for w in step.work)
    return sum(work.twice_pairs for work in works if isinstance(work, FlashAttention))


# What strategies send in a layer of a prefill: Yang et al. 2024 (arXiv:2411.01783), tables 2 and 3


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ("tp=8", {"all_reduce": 2 * 2 * S * H * HALF * (P - 1) // P}),
        (
            "tp=8,sequence_parallel",
            {"all_gather": 2 * S * H * HALF * (P - 1) // P, "reduce_scatter": 2 * S * H * HALF * (P - 1) // P},
        ),
        ("ulysses=8", {"all_to_all": S // P * (2 * H + 2 * KV) * HALF * (P - 1) // P}),
        ("ring=8", {"send_receive": (P - 1) * S // P * 2 * KV * HALF}),
        (
            "ring=8,ring_pass=q",
            {
                "send_receive": (P - 1) * S // P * H * HALF,
                "all_to_all": (P - 1) * S // P * (H * HALF + 32 * 4),  # with the log-sum-exp of 32 heads
            },
        ),
    ],
)
def test_what_a_prefill_sends(plan: str, expected: dict[str, int]) -> None:
    assert sent(served(plan)) == expected


@pytest.mark.parametrize("plan", ["", "ulysses=8", "ring=8", "ring=8,ring_pass=q", "ring=8,ring_kind=all_gather"])
@pytest.mark.parametrize("chunk", [None, 2048])
def test_each_pair_is_computed_once(plan: str, chunk: int | None) -> None:
    """Of all ranks and chunks together, by the causal mask; ranks of ulysses have other heads."""
    result = served(plan, chunk_tokens=chunk)
    shards = P if "ring" in plan else 1
    size = chunk or S
    programs = [own for name, own in result.programs.items() if name.startswith("layer")]
    found = 0
    for program in programs:
        works = (w for step in program.forward if isinstance(step, Compute) for w in step.work)
        found += shards * sum(work.twice_pairs for work in works if isinstance(work, FlashAttention))
    # Half of the square, and for later chunks the diagonal: within a query's own key.
    assert found == pytest.approx(S * S, abs=S if size < S else 0)


def test_a_prompt_in_chunks_reads_the_cache_of_all_before() -> None:
    """Pass-KV sends all that is cached with each chunk, pass-Q the queries of the chunk alone."""
    whole, chunked = (served(["ring=8", "_batch=1"][0], chunk_tokens=c) for c in (None, 1024))
    passes = S // 1024
    assert chunked.comm_bytes_per_gpu_by_op["send_receive"] == sum(
        LAYERS * (P - 1) * end * 1024 // P * 2 * KV * HALF for end in range(1, passes + 1)
    )
    assert whole.static.weights == chunked.static.weights
    assert whole.kv_cache_gib == chunked.kv_cache_gib
    queries = served("ring=8,ring_pass=q", chunk_tokens=1024)
    assert queries.comm_bytes_per_gpu_by_op["send_receive"] == LAYERS * (P - 1) * S // P * H * HALF


def test_a_prefill_keeps_nothing_but_its_cache() -> None:
    result = served("tp=2")
    assert result.static.by_category() == {
        "weights": result.static.weights, "gradients": 0, "optimizer": 0,
        "KV cache": LAYERS * S * 2 * KV * HALF // 2,
    }  # fmt: skip
    assert result.program.saved == ()
    assert {"layer_backward_s", "optimizer_s", "tpot_s"} <= result.unknown
    assert result.ttft_s == result.step_time_s


def test_the_cache_is_handed_out_in_blocks() -> None:
    for tokens, blocks in ((1, 1), (16, 1), (17, 2)):
        own = served(phase="decode", seq_len=tokens, micro_batch=3, kv_cache_dtype="fp8")
        assert own.static.cache == 3 * LAYERS * blocks * 16 * 2 * KV
    odd = served("ring=2", "decode", seq_len=34, kv_block_tokens=16)
    assert odd.static.cache == LAYERS * 2 * 16 * 2 * KV * HALF  # 17 tokens on a rank


# One token


def test_a_decode_sends_its_token() -> None:
    """Two sums of [b h] over tp; over a ring gathers of Q and of new K and V, and partial results with their
    log-sum-exp: vLLM's decode context parallelism, Helix (arXiv:2507.07120).
    """
    batch = 4
    assert sent(served("tp=8", "decode", micro_batch=batch)) == {"all_reduce": 2 * 2 * batch * H * HALF * (P - 1) // P}
    ring = sent(served("ring=8", "decode", micro_batch=batch))
    assert ring["all_gather"] == batch * (H + 2 * KV) * HALF * (P - 1) // P
    assert ring["all_to_all"] == batch * (H * HALF + 32 * 4) * (P - 1) // P
    assert ring["all_reduce"] == 2 * 2 * batch * H * HALF * (P - 1) // P


def test_ranks_of_a_ring_and_of_tp_sum_together() -> None:
    axes = [(step.axis, step.ranks) for step in served("tp=2,ring=4", "decode").program.forward
            if isinstance(step, Communication) and step.collective == "all_reduce"]  # fmt: skip
    assert axes == [("model", 8)] * 2


def test_kv_heads_on_several_ranks_are_not_gathered() -> None:
    """Eight heads on 16 ranks: the two ranks of a ring have the same, as with vLLM's `dcp` of tp over KV heads."""
    gathered = [step.tensor for step in served("tp=8,ring=2", "decode").program.forward
                if isinstance(step, Communication) and step.collective == "all_gather"]  # fmt: skip
    assert gathered == ["q_rotated"]


@pytest.mark.parametrize(("plan", "batch"), [("ulysses=8", 8), ("tp=8,sequence_parallel", 8), ("tp=2,ulysses=4", 4)])
def test_a_batch_is_cut_where_there_is_no_sequence(plan: str, batch: int) -> None:
    result = served(plan, "decode", micro_batch=batch)
    assert any("no sequence to shard" in note for note in result.notes)
    with pytest.raises(InputError, match=f"no sequence to shard.* or a micro_batch of {batch}"):
        served(plan, "decode", micro_batch=batch - 1)


@pytest.mark.parametrize(("phase", "picked"), [("prefill", True), ("decode", False)])
def test_the_last_token_is_picked_of_one_too(phase: str, picked: bool) -> None:
    """Of a prompt of one token as of any; a decode picks none."""
    assert ("last_token" in {row["operator"] for row in served(phase=phase, seq_len=1).operator_rows}) == picked


def test_a_last_chunk_of_one_token_is_refused() -> None:
    with pytest.raises(InputError, match="chunk_tokens = 32 leaves a last chunk of one token"):
        served(seq_len=33, chunk_tokens=32)


def test_figures_say_what_phase_they_are_of() -> None:
    assert served(phase="decode").scenario.summary[:2] == ("decode", "sequence 8,192")


def test_what_is_there_all_the_time_is_no_optimizer() -> None:
    assert served(phase="decode", micro_batch=1024).out_of_memory_at == "weights and KV cache"


@pytest.mark.parametrize("plan", ["fp8_dot_product_attention", "fp8_output_proj"])
def test_casts_of_training_are_not_passed_over(plan: str) -> None:
    with pytest.raises(InputError, match=f"{plan} with phase 'prefill': not simulated yet"):
        served(plan, hardware="dgx-b200", precision="mxfp8")


@pytest.mark.parametrize(("hardware", "precision", "size"), [("dgx-h100", "fp8", 1), ("dgx-b200", "mxfp8", 33 / 32)])
def test_weights_of_eight_bits_rest_once(hardware: str, precision: str, size: float) -> None:
    """Linears in the type alone, neither transposed nor in 16 bits; both tables, of words and of the head, in 16."""
    result = served(hardware=hardware, precision=precision)
    linears = LAYERS * (2 * H * H + 2 * H * KV + 3 * H * 14336)
    assert result.static.weights == pytest.approx(size * linears + 2 * VOCAB * H * HALF, rel=1e-3)


def test_a_decode_is_bound_by_what_it_reads() -> None:
    """Weights and cache once for each token, at between half and all of the bandwidth."""
    result = served(phase="decode", seq_len=65536, micro_batch=4)
    read = result.static.total - VOCAB * H * HALF  # of the embedding a row
    assert 0.5 < read / result.tpot_s / result.scenario.hardware.memory_bandwidth < 1.0


def test_logits_are_of_the_last_token() -> None:
    """Against a step whose head reads all: 2 b h v FLOPs, whatever the sequence."""
    flops = sum(work.flops for step in served(micro_batch=2).programs["head"].forward
                if isinstance(step, Compute) and step.operator == "output_layer" for work in step.work)  # fmt: skip
    assert flops == 2 * 2 * H * VOCAB


def test_the_largest_batch_fits() -> None:
    own = served(phase="decode", seq_len=32768)
    most = own.largest_micro_batch
    assert served(phase="decode", seq_len=32768, micro_batch=most).fits
    assert not served(phase="decode", seq_len=32768, micro_batch=most + 1).fits


def test_graphs_start_kernels_earlier() -> None:
    usual, graphs = (served("tp=8", "decode", seq_len=1024) if not own else served(
        "tp=8,cuda_graphs=full_iteration", "decode", seq_len=1024) for own in (False, True))  # fmt: skip
    assert graphs.tpot_s < usual.tpot_s


@pytest.mark.parametrize("plan", ["tp=2,ring=2", "ulysses=4", "ring=4,ring_pass=q", "tp=4"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_folded_is_unfolded(plan: str, phase: str) -> None:
    scenario = Scenario(
        hardware="dgx-h100", model={"layers": 3, "preset": "llama-3-8b"},
        plan=plan, workload={"seq_len": 4096, "phase": phase, "micro_batch": 4},
    )  # fmt: skip
    folded, unfolded = (simulate(scenario, fold=fold) for fold in (True, False))
    assert folded.step_ps == unfolded.step_ps
    assert folded.peak_bytes == unfolded.peak_bytes


def test_what_goes_round_a_ring_has_no_effect_on_a_decode() -> None:
    """Ranks of a ring share the cache, and exchange partial results only."""
    plain, other = (
        simulate(
            Scenario(
                hardware="dgx-h100", model="llama-3-8b", plan=f"ring=4{more}",
                workload={"seq_len": 4096, "phase": "decode", "micro_batch": 4},
            )
        )
        for more in ("", ",ring_pass=q,ring_cut=contiguous")
    )  # fmt: skip
    assert plain.step_ps == other.step_ps
    assert sum("has no effect with phase 'decode'" in note for note in other.notes) == 2
    assert not any("no effect" in note for note in plain.notes)


def test_bytes_of_a_collective_are_those_of_its_message() -> None:
    for step in served("ring=4,tp=2", "decode").program.forward:
        if isinstance(step, Communication):
            assert step.sent_bytes == sent_bytes(step.collective, step.message_bytes, step.ranks)


# Measured on one H100 SXM


@pytest.mark.parametrize("name", ["h100_small_products", "h100_decode_attention"])
def test_kernels_of_inference_are_met(name: str) -> None:
    """Products of few rows, which take the time of reading weights, and one query against a cache."""
    (errors,) = summary(measured_kernels(DATA / f"{name}.csv", load_profile("dgx-h100"), "bf16")).values()
    assert errors.rows >= 3
    assert errors.mean_percent < 8


def test_prefills_of_an_eager_model_are_met() -> None:
    """Eight layers of Llama-3-8B as transformers runs them, logits of the last token: no number was fitted on them."""
    for row in csv.DictReader((DATA / "h100_prefill.csv").open()):
        workload = {"phase": "prefill", "seq_len": int(row["seq_len"]), "micro_batch": int(row["batch"])}
        found = simulate(
            Scenario(
                hardware="dgx-h100", model={"preset": "llama-3-8b", "layers": 8}, plan={"library": "transformers"},
                workload=workload,
            )
        )  # fmt: skip
        assert 1e3 * found.ttft_s == pytest.approx(float(row["time_ms"]), rel=0.08)


# What commands say


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_search_finds_the_fastest_of_all_plans(phase: str) -> None:
    model, batch = {"preset": "llama-3-8b", "layers": 2}, 4
    workload = {"seq_len": 4096, "global_batch": batch, "phase": phase}
    found = plan_search(hardware="dgx-h100", model=model, gpus=4, workload=workload, best=1)
    times = {}
    degrees = [(tp, ulysses, ring) for tp in (1, 2, 4) for ulysses in (1, 2, 4) for ring in (1, 2, 4)]
    for tp, ulysses, ring in (own for own in degrees if 4 % (own[0] * own[1] * own[2]) == 0):
        dp = 4 // (tp * ulysses * ring)
        for further in ("", ",sequence_parallel", ",ring_pass=q"):
            plan = f"tp={tp},ulysses={ulysses},ring={ring},dp={dp}{further}"
            own = {"seq_len": 4096, "micro_batch": batch // dp, "phase": phase}
            try:
                times[plan] = simulate(Scenario(hardware="dgx-h100", model=model, plan=plan, workload=own)).step_ps
            except InputError:
                continue
    assert found.best[0].step_s == pytest.approx(min(times.values()) / 1e12)


def test_an_explanation_says_where_the_cache_lies() -> None:
    found = explain("llama-3-8b", "tp=2,ring=4", {"seq_len": S, "phase": "decode"})
    placed = {own.operator: own.placed for own in found.operators}
    assert placed["attention"] == {"ring": "j", "tp": "a"}
    assert placed["fc1"] == {"ring": "f", "tp": "f"}
    assert any(f"{2 * KV * HALF // 2:,} bytes of the cache" in note for note in found.notes)


def test_what_is_written_for_training_is_no_inference() -> None:
    scenario = Scenario(hardware="dgx-h100", model="llama-3-8b", workload={"seq_len": S, "phase": "prefill"})
    with pytest.raises(InputError, match="prefill is inference"):
        emit(scenario, "megatron")


def test_a_chunk_that_holds_the_prompt_is_the_prompt() -> None:
    assert served(chunk_tokens=2 * S).step_ps == served().step_ps


def test_experts_of_a_prefill_get_their_tokens() -> None:
    """Copies of the own tokens, dealt out evenly, go to three of four ranks and come back."""
    plan = "ring=4,ep=4"
    scenario = Scenario(
        hardware="dgx-h100", model="qwen3-30b-a3b", plan=plan, workload={"seq_len": S, "phase": "prefill"}
    )  # fmt: skip
    result = simulate(scenario)
    per_token, hidden = scenario.model.experts_per_token, scenario.model.hidden
    copies = S // 4 * per_token * hidden * HALF
    exchanged = [own.sent_bytes for own in result.program.forward
                 if isinstance(own, Communication) and own.collective == "all_to_all"]  # fmt: skip
    assert exchanged.count(copies * 3 // 4) == 2


@pytest.mark.parametrize(("batch", "plan", "read"), [(1, "", 8), (8, "", 51.6), (1, "dp=8,ep=8", 51.6 / 8)])
def test_experts_without_a_token_are_not_read(batch: int, plan: str, read: float) -> None:
    """Of 128 experts each token picks 8: of n tokens 128 (1 - (1 - 8 / 128)^n) are picked by one at least, so many on a
    rank of those that share them.
    """
    workload = {"seq_len": 4096, "micro_batch": batch, "phase": "decode"}
    result = simulate(Scenario(hardware="dgx-h100", model="qwen3-30b-a3b", plan=plan, workload=workload))
    model = result.scenario.model
    (work,) = (own for step in result.program.forward if isinstance(step, Compute) and step.operator == "expert_fc1"
               for own in step.work)  # fmt: skip
    assert work.batch == math.ceil(read)
    assert work.bytes_moved == pytest.approx(read * 2 * model.hidden * model.expert_ffn_hidden * HALF, rel=0.03)
    assert result.static.weights > 0.1 * model.layers * model.expert_parameters * HALF


@pytest.mark.parametrize("batch", [16, 32, 256])
def test_heads_that_share_keys_read_them_once(batch: int) -> None:
    """Of one query four heads of Q for each of K take what one takes, whether keys are divided among blocks or not."""
    cost = ComputeCost(load_profile("dgx-h100"), "bf16", burst=True)
    rows = [Attention(batch=batch, heads=heads, kv_heads=8, head_dim=128, keys=4096, time_us=1) for heads in (8, 32)]
    few, many = (cost.duration(row.work("flash_attention_2", "forward", "bf16")) for row in rows)
    assert few == pytest.approx(many, rel=0.03)
    assert rows[1].work("flash_attention_2", "forward", "bf16").bytes_moved / many > 1.9e12


def test_chunks_pass_one_after_another() -> None:
    """Each reads more of the cache than the one before; their layers are told apart, and all is written out."""
    result = served("ring=4", chunk_tokens=1024)
    windows = [result.trace.window_of("forward", 0, chunk) for chunk in range(S // 1024)]
    assert all(before[1] < after[0] for before, after in pairwise(windows))
    lengths = [end - begin for begin, end in windows]
    assert lengths == sorted(lengths)
    assert result.layer_forward_s * 1e12 == pytest.approx(lengths[0])
    assert result.select().whole_step
    assert {"kv_cache_gib", "weights_gib"} <= {*result.memory_curve.columns}


def test_a_window_keeps_and_reads_its_tokens_alone() -> None:
    """Five of six layers of Gemma 3 look back at 1,024 tokens, as vLLM keeps them."""
    model, window = load_model("gemma-3-27b"), 1024
    full = sum(count for kind, count in model.types.items() if kind.full)
    own = simulate(Scenario(hardware="dgx-h100", model=model, workload={"seq_len": S, "phase": "decode"}))
    token = 2 * model.kv_heads * model.head_dim * HALF
    assert own.static.cache == token * (full * S + (model.layers - full) * window)
    keys = {work.keys for program in own.programs.values() for step in program.forward if isinstance(step, Compute)
            for work in step.work if isinstance(work, FlashAttention)}  # fmt: skip
    assert keys == {S, window}
    prompt = Scenario(hardware="dgx-h100", model=model, workload={"seq_len": S, "phase": "prefill"})
    windowless = prompt.model.model_copy(update={"sliding_window": None, "layer_types": None})
    longer = simulate(Scenario(hardware="dgx-h100", model=windowless, workload=prompt.workload))
    assert simulate(prompt).ttft_s < longer.ttft_s
    with pytest.raises(InputError, match="ring = 2 with phase 'decode' under sliding_window = 1024"):
        Scenario(hardware="dgx-h100", model=model, plan="ring=2", workload={"seq_len": S, "phase": "decode"})


@pytest.mark.parametrize(
    ("model", "plan", "token_bytes"),
    [
        ("deepseek-v3", "ulysses=8,ep=8", 70_272),
        ({"preset": "llama-3-8b", "layers": 80, "hidden": 8192, "heads": 64, "ffn_hidden": 29568}, "", 327_680),
        ({"preset": "llama-3-8b", "layers": 126, "hidden": 16384, "heads": 128, "ffn_hidden": 53248}, "", 516_096),
    ],
)
def test_the_cache_of_a_token_is_as_published(model: object, plan: str, token_bytes: int) -> None:
    """DeepSeek-V3, Qwen2.5-72B and Llama 3.1 405B in DeepSeek-AI 2025 (arXiv:2505.09343, table 1); ranks that share
    heads of latent attention have each the whole latents.
    """
    scenario = Scenario(hardware="dgx-h100", model=model, plan=plan, workload={"seq_len": S, "phase": "prefill"})
    assert simulate(scenario).static.cache == token_bytes * S
