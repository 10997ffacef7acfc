"""The operator table: what sequence parallelism applies to, and what it saves."""

from io import StringIO

import pytest
from rich.console import Console

from spsim import InputError, explain
from spsim.cli.outputs import MIN_WIDTH
from spsim.inputs.plan import parse_plan
from spsim.inputs.presets import PRESETS, load_model
from spsim.inputs.workload import Workload
from spsim.program.blocks.transformer import transformer_layer
from spsim.program.operators import Operand, Operator, Tensor
from spsim.report.explanation import explanation_table
from spsim.studies.explanation import applies_alone

WORKLOAD = Workload(seq_len=2048, micro_batch=4)


def by_name(model: str, plan: str) -> dict[str, object]:
    explanation = explain(load_model(model), parse_plan(plan), WORKLOAD)
    return {row.operator: row for row in explanation.operators}


@pytest.mark.parametrize(
    ("operator", "applies"),
    [
        ("norm1", "yes"), ("norm2", "yes"), ("residual1", "yes"), ("gelu", "yes"), ("attention_dropout", "yes"),
        ("qkv", "yes"), ("fc1", "yes"), ("fc2", "yes"), ("projection", "yes"), ("softmax", "yes"),
        ("qk", "no"), ("av", "no"),
    ],
)  # fmt: skip
def test_gpt_operators(operator: str, applies: str) -> None:
    """Korthikanti et al. 2022, section 4.2: norms, dropouts, residuals (and any linear) act token by token."""
    assert by_name("gpt-22b", "tp=8")[operator].applies == applies


@pytest.mark.parametrize(
    ("operator", "applies"),
    [
        ("rope_q", "yes, with position offset"), ("rope_k", "yes, with position offset"), ("attention", "no"),
        ("swiglu", "yes"),
    ],
)  # fmt: skip
def test_llama_operators(operator: str, applies: str) -> None:
    assert by_name("llama-3-8b", "tp=8")[operator].applies == applies


def test_softmax_is_yes_over_queries_only() -> None:
    assert "not on a shard of keys" in by_name("gpt-22b", "tp=8")["softmax"].why


def test_an_operator_that_mixes_positions_is_refused() -> None:
    """BatchNorm or a cumulative sum over the sequence."""
    x = Tensor("x", ("s", "b", "h"), (8, 2, 4), 2)
    operand = Operand(x, x.dims)
    assert applies_alone(Operator("cumsum", "elementwise", (operand,), (operand,), mixes=frozenset("s")))[0] == "no"


def test_where_tp_sp_places_operators() -> None:
    """GeLU may run on a sequence shard, but the plan places it on the shard of the MLP width."""
    rows = by_name("gpt-22b", "tp=8,sequence_parallel")
    placed = {name: row.placed["tp"] for name, row in rows.items()}
    assert {placed[name] for name in ("norm1", "norm2", "residual1", "residual2")} == {"s"}
    assert {placed[name] for name in ("gelu", "fc1", "fc2")} == {"f"}
    assert {placed[name] for name in ("qkv", "qk", "softmax", "av", "projection")} == {"a"}


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_norms_and_dropouts_keep_an_eighth_at_degree_eight(degree: int) -> None:
    """2 x (2S + S) bytes whole, divided by the degree with sequence parallelism."""
    explanation = explain(load_model("gpt-22b"), parse_plan(f"tp={degree},sequence_parallel"), WORKLOAD)
    elements = 2048 * 4 * 6144
    saving = explanation.parts["norms and dropouts"]
    assert saving["without_bytes"] == 6 * elements
    assert saving["with_bytes"] == 6 * elements // degree
    assert saving["saving_percent"] == 100 * (1 - 1 / degree)


def test_layer_total_is_the_published_formula() -> None:
    """10 + 24/t against 34/t of sbh, and 5as/h / t of attention in both."""
    explanation = explain(load_model("gpt-22b"), parse_plan("tp=8,sequence_parallel"), WORKLOAD)
    elements, scores = 2048 * 4 * 6144, 5 * 64 * 2048 * 2048 * 4
    assert explanation.parts["layer"]["without_bytes"] == 13 * elements + scores // 8
    assert explanation.parts["layer"]["with_bytes"] == (34 * elements + scores) // 8


def test_a_plan_without_sequence_shard_is_compared_with_megatron_sp() -> None:
    explanation = explain(load_model("gpt-22b"), parse_plan("tp=8"), WORKLOAD)
    assert (explanation.without, explanation.with_) == ("TP8", "TP8+SP")


def test_communication_stands_at_the_operator_that_needs_it() -> None:
    rows = by_name("gpt-22b", "tp=8,sequence_parallel")
    found = {
        (name, item.part, item.collective, item.purpose, item.count)
        for name, row in rows.items()
        for item in row.communication
    }
    assert found == {
        ("qkv", "forward", "all_gather", "input", 1),
        ("fc1", "forward", "all_gather", "input", 1),
        ("residual1", "forward", "reduce_scatter", "input", 1),
        ("residual2", "forward", "reduce_scatter", "input", 1),
        ("qkv", "backward", "all_gather", "regather", 1),
        ("fc1", "backward", "all_gather", "regather", 1),
        ("fc2", "backward", "all_gather", "gradient", 1),
        ("projection", "backward", "all_gather", "gradient", 1),
        ("norm1", "backward", "reduce_scatter", "gradient", 1),
        ("norm2", "backward", "reduce_scatter", "gradient", 1),
    }


@pytest.mark.parametrize("model", [name for name, own in PRESETS.items() if own.kv_lora_rank is None])
def test_flops_of_the_table_are_the_published_formula(model: str) -> None:
    """24sbh^2 + 4s^2bh for GPT; flash under a causal mask computes half of the second, or a window of the first layer.
    Experts: those of a token.
    """
    chosen = PRESETS[model]
    rows = by_name(model, "tp=1")
    tokens = WORKLOAD.seq_len * WORKLOAD.micro_batch
    qkv = (chosen.heads + 2 * chosen.kv_heads) * chosen.head_dim
    width = chosen.experts_per_token * chosen.expert_ffn_hidden if chosen.experts else chosen.ffn_hidden
    mlp = width * (3 if chosen.gated_mlp else 2) + (chosen.experts or 0)
    heads = chosen.heads * chosen.head_dim
    matrices = 2 * tokens * chosen.hidden * (qkv + heads + mlp)
    attention = 4 * tokens * WORKLOAD.seq_len * heads // (2 if chosen.attention == "flash" else 1)
    if window := chosen.sliding_window:
        attention = 2 * WORKLOAD.micro_batch * heads * window * (2 * WORKLOAD.seq_len - window + 1)
    assert sum(row.flops for row in rows.values()) == matrices + attention


def test_every_operator_of_the_layer_has_a_row() -> None:
    for model in PRESETS.values():
        names = [op.name for op in transformer_layer(model, WORKLOAD)]
        assert list(by_name(model.name, "tp=4,sequence_parallel")) == names


# ------------------------------------------------------------ from Python


def test_what_a_scenario_takes_is_taken() -> None:
    """Names, tables and objects."""
    model = load_model("gpt-22b")
    tables = (model.model_dump(), {"tp": 8}, {"seq_len": WORKLOAD.seq_len, "micro_batch": WORKLOAD.micro_batch})
    assert explain("gpt-22b", "tp=8", WORKLOAD) == explain(model, parse_plan("tp=8"), WORKLOAD) == explain(*tables)


@pytest.mark.parametrize(
    ("model", "plan", "workload", "words"),
    [
        ("nobody", "tp=8", WORKLOAD, "unknown model 'nobody'"),
        ("gpt-22b", "tp=3", WORKLOAD, "tp x ulysses = 3 does not divide heads = 64"),
        ("gpt-22b", {"tp": "8"}, WORKLOAD, "plan: tp: Input should be a valid integer"),
        ("gpt-22b", 8, WORKLOAD, "plan: Input should be an instance of Plan, got 8"),
        ("gpt-22b", "tp=8", {"seq_len": 0}, "workload: seq_len"),
        ("gpt-22b", "ulysses=8", {"seq_len": 2047}, "seq_len = 2047 is not divisible by 8"),
    ],
)
def test_what_does_not_fit_is_one_line(model: str, plan: object, workload: object, words: str) -> None:
    with pytest.raises(InputError) as caught:
        explain(model, plan, workload)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("model", "named"), [("llama-3-8b", "jf"), ("qwen3-30b-a3b", "jekm")])
def test_the_legend_names_the_dimensions_of_the_layer(model: str, named: str) -> None:
    caption = str(explanation_table(explain(load_model(model), parse_plan("tp=2,sequence_parallel"), WORKLOAD)).caption)
    legend = caption.partition("Dimensions: ")[2].partition(".")[0].split(", ")
    assert [item[0] for item in legend if item[0] in "jfemkuql"] == [*named]


def test_the_longest_names_leave_room_for_the_reasons_and_what_is_sent() -> None:
    """Of latent attention and experts, as wide as tables are where no terminal says how wide it is."""
    explanation = explain(load_model("deepseek-v3"), parse_plan("dp=8,ep=8"), WORKLOAD)
    console = Console(width=MIN_WIDTH, record=True, file=StringIO())
    console.print(explanation_table(explanation))
    text = console.export_text()
    assert "bwd A2A ep of gradient" in text
    assert "per position; mixes" in text
    assert "…" not in text
