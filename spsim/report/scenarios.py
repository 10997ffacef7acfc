"""Tables and sentences of scenarios: run, explain, validate, list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from spsim.inputs.model import PRESETS
from spsim.inputs.profiles import load_profile, profile_names
from spsim.program.placement import COLLECTIVE_SHORT
from spsim.report.table import table
from spsim.report.words import COLLECTIVES, band, collective_counts, figure, missed, size, time
from spsim.results.result import Result
from spsim.studies.explanation import Explanation, InsertedCommunication, OperatorExplanation
from spsim.studies.validation import Comparison, Errors, Validation
from spsim.units import GIB, MIB

SCOPE_NOTE = {"layers": "transformer layers only: no embedding, head, loss or optimizer step"}


def summary(result: Result) -> Table:
    """The figures of one run."""
    scenario = result.scenario
    title = (
        f"{scenario.model.name} on {scenario.hardware.name}: {scenario.plan.label}, {scenario.plan.gpus} GPUs, "
        f"sequence {scenario.workload.seq_len}, micro-batch {scenario.workload.micro_batch}"
    )
    made = table(title, ["quantity", "value", "of"], numbers=["value"])
    for row in _summary_rows(result):
        made.add_row(*row)
    return made


def _summary_rows(result: Result) -> Iterable[tuple[str, str, str]]:
    counts = result.collectives_per_layer
    layers, micro_batches = result.scenario.model.layers, result.scenario.num_micro_batches
    yield (
        "step time",
        time(result.step_time_s),
        f"{layers} layers × {micro_batches} micro-batches; {SCOPE_NOTE[result.scope]}",
    )
    yield "layer forward", time(result.layer_forward_s), collective_counts(counts["forward"])
    yield "layer backward", time(result.layer_backward_s), collective_counts(counts["backward"])
    yield "exposed communication", time(result.exposed_comm_s), "of the step, not hidden by any kernel"
    yield "weight synchronisation", time(result.weight_sync_s), "of the step, at its end"
    yield (
        "MFU",
        f"{100 * result.mfu:.1f} %",
        f"full square; causal half {100 * result.mfu_causal:.1f} %, HFU {100 * result.hfu:.1f} %",
    )
    yield (
        "throughput",
        f"{figure(result.tokens_per_s_per_gpu)} tokens/s/GPU",
        f"{figure(result.tflops_per_gpu)} TFLOP/s/GPU",
    )
    yield "peak memory", size(result.peak_memory_gib * GIB), f"at {result.peak_operator}"
    yield "device memory", size(result.device_memory_gib * GIB), _fit(result)
    yield (
        "kept per layer",
        f"{result.activation_bytes_per_layer / MIB:.1f} MiB",
        "activations and masks of one micro-batch",
    )


def _fit(result: Result) -> str:
    if result.fits:
        return f"fits: {result.capacity_gib:.1f} GiB reported by the driver"
    over = result.device_memory_gib - result.capacity_gib
    return f"does not fit {result.capacity_gib:.1f} GiB by {over:.1f} GiB, at {result.out_of_memory_at}"


def notes(result: Result) -> list[str]:
    """What a reader of the figures must know: notes, assumed inputs, errors of the calibration."""
    lines = [f"note: {note}" for note in result.scenario.notes]
    if result.assumed:
        lines.append(f"assumed inputs used ({len(result.assumed)}): {', '.join(result.assumed)}")
    if result.flagged:
        lines.append(missed(result.flagged))
    if result.error_band is not None:
        lines.append(band(result.error_band))
    return lines


def operator_table(result: Result, rows: int = 12) -> Table:
    """The operators that take most of the time of the first rank."""
    made = table(
        "Time of the first rank by operator", ["operator", "part", "class", "lane", "time", "share of step", "calls"],
        numbers=["time", "share of step", "calls"],
    )  # fmt: skip
    for row in result.operators.head(rows).to_dict("records"):
        share = row["time_ms"] / 1e3 / result.step_time_s
        made.add_row(
            row["operator"], row["part"], row["operator_class"], row["lane"], time(row["time_ms"] / 1e3),
            f"{100 * share:.1f} %", str(row["calls"]),
        )  # fmt: skip
    return made


# explain


def explanation_table(explanation: Explanation) -> Table:
    """The operator table: does sequence parallelism apply, and what does the plan make of it?"""
    made = table(
        f"{explanation.model}, {explanation.plan}: which operators may run on a sequence shard?",
        ["operator", "dimensions", "may it?", "why", "placed", "GFLOP", "MiB", "kept, MiB", "communication"],
        numbers=["GFLOP", "MiB", "kept, MiB"],
    )
    for column in (0, 1, 2, 4, 8):
        made.columns[column].no_wrap = True
    for row in explanation.operators:
        made.add_row(
            row.operator, row.subscripts, APPLIES_SHORT.get(row.applies, row.applies), row.why, _placed(row),
            f"{row.flops / 1e9:.1f}" if row.flops else "–",
            f"{row.bytes_moved / MIB:.1f}", f"{row.saved_bytes_without / MIB:.1f} → {row.saved_bytes_with / MIB:.1f}",
            "\n".join(_communication(item) for item in row.communication) or "–",
        )  # fmt: skip
    made.caption = (
        "May it run on a sequence shard (offset: given its position)? GFLOP and MiB moved: one rank, forward. Kept for "
        f"backward: {explanation.without} → {explanation.with_}. Dimensions: s sequence, j key positions, "
        f"b micro-batch, h hidden, a heads, d head size, f MLP width, g gate. {COLLECTIVES}"
    )
    made.caption_justify = "left"
    return made


APPLIES_SHORT = {"yes, with position offset": "offset"}
PART_SHORT = {"forward": "fwd", "backward": "bwd", "recompute": "recomp."}


def _communication(item: InsertedCommunication) -> str:
    purpose = {"input": "", "regather": " again", "gradient": " of gradient"}[item.purpose]
    count = f"{item.count} " if item.count > 1 else ""
    return f"{PART_SHORT[item.part]} {count}{COLLECTIVE_SHORT[item.collective]} {item.axis}{purpose}"


def _placed(row: OperatorExplanation) -> str:
    return "\n".join(f"{axis}: {dim or 'whole'}" for axis, dim in row.placed.items()) or "whole"


def saving_lines(explanation: Explanation) -> list[str]:
    """The saving in words, for the norms and dropouts and for the layer."""
    return [
        f"{name}: {saving['without_bytes'] / MIB:.1f} MiB kept with {explanation.without}, "
        f"{saving['with_bytes'] / MIB:.1f} MiB with {explanation.with_}: {saving['saving_percent']:.1f} % less"
        for name, saving in explanation.parts.items()
    ]


# validate


def comparison_table(cases: Sequence[Comparison]) -> Table:
    """Measured against predicted, a row a case."""
    columns = ["case", "metric", "measured", "predicted", "error", "note"]
    made = table("Measured against predicted", columns, numbers=["measured", "predicted", "error"])
    for case in cases:
        made.add_row(
            case.case_id, case.metric, f"{case.measured:.4g}",
            "–" if case.predicted is None else f"{case.predicted:.4g}",
            "–" if case.error_percent is None else f"{case.error_percent:+.1f} %",
            "fitted on" if case.fitted else "",
        )  # fmt: skip
    return made


def error_table(title: str, families: dict[str, Errors]) -> Table:
    """Errors by family."""
    columns = ["family", "rows", "mean", "90th percentile", "largest"]
    made = table(title, columns, numbers=columns[1:])
    for name, errors in families.items():
        figures = (errors.mean_abs_error_percent, errors.p90_abs_error_percent, errors.max_abs_error_percent)
        made.add_row(name, str(errors.n), *(f"{figure:.1f} %" for figure in figures))
    return made


def skipped_lines(validation: Validation) -> list[str]:
    """Rows that were not predicted, by reason."""
    reasons: dict[str, list[str]] = {}
    for case in validation.cases:
        if case.skipped is not None:
            reasons.setdefault(case.skipped, []).append(f"{case.case_id} ({case.metric})")
    return [f"skipped, {reason}: {len(cases)} rows, such as {cases[0]}" for reason, cases in reasons.items()]


# list


def hardware_table() -> Table:
    """The shipped profiles."""
    columns = ["profile", "device", "16-bit TFLOP/s", "memory GiB", "GB/s", "node", "assumed"]
    made = table("Hardware profiles", columns, numbers=columns[2:5])
    for name in profile_names():
        profile = load_profile(name)
        sheet = profile.datasheet
        peak = sheet.peak_tflops.get("bf16") or next(iter(sheet.peak_tflops.values()))
        made.add_row(
            name, sheet.device, f"{peak.value:g}", f"{sheet.memory.reported_mib.value * MIB / GIB:.1f}",
            f"{sheet.memory.bandwidth_gb_per_s.value:g}",
            ", ".join(f"{level.name} × {level.gpus or 'any'}" for level in sheet.topology),
            f"{len(profile.assumed)} coefficients",
        )  # fmt: skip
    return made


def model_table() -> Table:
    """The model presets."""
    columns = [
        "model",
        "parameters",
        "layers",
        "hidden",
        "MLP width",
        "heads",
        "KV heads",
        "vocabulary",
        "attention",
    ]
    made = table("Models", columns, numbers=columns[1:8])
    for model in PRESETS.values():
        sizes = (model.layers, model.hidden, model.ffn_hidden, model.heads, model.kv_heads, model.vocab)
        made.add_row(model.name, f"{model.parameters / 1e9:.2f} B", *(str(size) for size in sizes), model.attention)
    return made
