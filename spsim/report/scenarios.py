"""Tables and sentences of scenarios: run, explain, compare, validate, list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from spsim.comparison import Difference, PlanAccount, PlanComparison, grouped
from spsim.explanation import Explanation, InsertedCommunication, OperatorExplanation
from spsim.model import PRESETS
from spsim.profiles import load_profile, profile_names
from spsim.report.table import table
from spsim.simulation import SCOPE, Result
from spsim.uncertainty import ErrorBand
from spsim.units import GIB, MIB, PS_PER_MS
from spsim.validation import Comparison, Errors, Validation

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
        _time(result.step_time_s),
        f"{layers} layers × {micro_batches} micro-batches; {SCOPE_NOTE[SCOPE]}",
    )
    yield "layer forward", _time(result.layer_forward_s), _counts(counts["forward"])
    yield "layer backward", _time(result.layer_backward_s), _counts(counts["backward"])
    yield "exposed communication", _time(result.exposed_comm_s), "of the step, not hidden by any kernel"
    yield "weight synchronisation", _time(result.weight_sync_s), "of the step, at its end"
    yield (
        "MFU",
        f"{100 * result.mfu:.1f} %",
        f"full square; causal half {100 * result.mfu_causal:.1f} %, HFU {100 * result.hfu:.1f} %",
    )
    yield (
        "throughput",
        f"{result.tokens_per_s_per_gpu:,.0f} tokens/s/GPU",
        f"{result.tflops_per_gpu:.0f} TFLOP/s/GPU",
    )
    yield "peak memory", f"{result.peak_memory_gib:.2f} GiB", f"at {result.peak_operator}"
    yield "device memory", f"{result.device_memory_gib:.2f} GiB", _fit(result)
    yield (
        "kept per layer",
        f"{result.activation_bytes_per_layer / MIB:.1f} MiB",
        "activations and masks of one micro-batch",
    )


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3f} s"
    return f"{seconds * 1e3:.3f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _counts(collectives: dict[str, int]) -> str:
    return ", ".join(f"{n} {name.replace('_', '-')}" for name, n in collectives.items()) or "no communication"


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
        lines.append(f"the calibration missed its error limit for: {', '.join(result.flagged)}")
    if result.error_band is not None:
        lines.append(_band(result.error_band))
    return lines


def _band(band: ErrorBand) -> str:
    """The error band in one line."""
    parts = {
        "step": band.step_time_percent, "layer forward": band.layer_forward_percent,
        "layer backward": band.layer_backward_percent,
    }  # fmt: skip
    known = ", ".join(f"{name} ±{percent:.1f} %" for name, percent in parts.items() if percent is not None)
    return f"held-out errors of the calibration make {known}; they cover {100 * band.known_share:.0f} % of the step"


def operator_table(result: Result, rows: int = 12) -> Table:
    """The operators that take most of the time of the first rank."""
    made = table(
        "Time of the first rank by operator", ["operator", "part", "class", "lane", "time", "share of step", "calls"],
        numbers=["time", "share of step", "calls"],
    )  # fmt: skip
    for row in result.operators.head(rows).to_dict("records"):
        share = row["time_ms"] / 1e3 / result.step_time_s
        made.add_row(
            row["operator"], row["part"], row["operator_class"], row["lane"], _time(row["time_ms"] / 1e3),
            f"{100 * share:.1f} %", str(row["calls"]),
        )  # fmt: skip
    return made


# explain


def explanation_table(explanation: Explanation, label: str) -> Table:
    """The operator table: does sequence parallelism apply, and what does the plan make of it?"""
    made = table(
        f"{explanation.model}, {label}: which operators may run on a sequence shard?",
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
        "b micro-batch, h hidden, a heads, d head size, f MLP width, g gate. AR all-reduce, AG all-gather, "
        "RS reduce-scatter, A2A all-to-all, SR send-receive"
    )
    made.caption_justify = "left"
    return made


APPLIES_SHORT = {"yes, with position offset": "offset"}
PART_SHORT = {"forward": "fwd", "backward": "bwd", "recompute": "recomp."}
COLLECTIVE_SHORT = {
    "all_reduce": "AR", "all_gather": "AG", "reduce_scatter": "RS", "all_to_all": "A2A", "send_receive": "SR"
}  # fmt: skip


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


# compare


def plans_table(comparison: PlanComparison) -> Table:
    """The figures of the plans, a column each."""
    accounts = comparison.accounts
    scenario = accounts[0].result.scenario
    title = (
        f"{scenario.model.name} on {scenario.hardware.name}: sequence {scenario.workload.seq_len}, "
        f"micro-batch {scenario.workload.micro_batch}"
    )
    made = table(title, ["quantity", *(account.name for account in accounts)])
    columns = [dict(_plan_rows(account)) for account in accounts]
    for quantity in columns[0]:
        made.add_row(quantity, *(column[quantity] for column in columns))
    return made


def _plan_rows(account: PlanAccount) -> Iterable[tuple[str, str]]:
    result = account.result
    yield "plan", account.text or account.name
    yield "GPUs", str(result.scenario.plan.gpus)
    yield "layer forward", _time(result.layer_forward_s)
    yield "layer backward", _time(result.layer_backward_s)
    yield "step time", _time(result.step_time_s)
    yield "throughput", f"{result.tokens_per_s_per_gpu:,.0f} tokens/s/GPU"
    yield "peak memory", f"{result.peak_memory_gib:.2f} GiB, at {result.peak_operator}"
    yield "device memory", f"{result.device_memory_gib:.2f} GiB of {result.capacity_gib:.1f} GiB"
    yield "fits", "yes" if result.fits else f"no, from {result.out_of_memory_at} on"
    yield "kept per layer", f"{result.activation_bytes_per_layer / MIB:.1f} MiB"
    for phase, counts in result.collectives_per_layer.items():
        yield f"collectives, {phase}", _counts(counts)
    sent = result.comm_bytes_per_gpu_by_op.items()
    yield (
        "sent by a GPU in a step",
        "\n".join(f"{name.replace('_', '-')} {size / GIB:.2f} GiB" for name, size in sent) or "nothing",
    )


def time_table(pair: Difference) -> Table:
    """Where the time of a layer and of the step goes, and its difference, by part; parts add up to the total."""
    before, after = pair.before, pair.after
    names = [name.replace(" × ", " ×\n").replace(",", ",\n") for name in (*pair.names, "difference")]
    columns = [f"{what}:\n{name}" for what in ("layer", "step") for name in names]
    made = table(f"Time by part, ms: {before.name} → {after.name}", ["part", *columns], numbers=columns)
    sides = [(before.layer, after.layer, pair.layer), (before.step, after.step, pair.step)]
    for name in dict.fromkeys([*pair.layer, *pair.step]):
        made.add_row(name, *(cell for side in sides for cell in _cells(side, name, PS_PER_MS, 3)))
    made.add_section()
    made.add_row("total", *(cell for side in sides for cell in _cells(side, None, PS_PER_MS, 3)))
    made.caption = (
        "Layer: forward and backward of the first layer and micro-batch, on the rank that ends last. Exposed: no "
        "kernel runs meanwhile. Slowed: time that kernels lose while communication is posted"
    )
    made.caption_justify = "left"
    return made


def memory_table(pair: Difference) -> Table:
    """What the fullest rank holds at its peak, and the difference, by category."""
    columns = [pair.before.name, pair.after.name, "difference"]
    made = table("Memory at the peak of the fullest rank, GiB", ["category", *columns], numbers=columns)
    side = (pair.before.memory, pair.after.memory, pair.memory)
    for name in pair.memory:
        made.add_row(name, *_cells(side, name, GIB, 2))
    made.add_section()
    made.add_row("total", *_cells(side, None, GIB, 2))
    return made


def _cells(side: Sequence[dict[str, int]], name: str | None, unit: int, digits: int) -> list[str]:
    """Both plans and the difference of one part, or of all together."""
    first, second, change = (sum(parts.values()) if name is None else parts.get(name, 0) for parts in side)
    return [f"{first / unit:.{digits}f}", f"{second / unit:.{digits}f}", _signed(change / unit, digits)]


def _signed(amount: float, digits: int) -> str:
    text = f"{amount:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def comparison_lines(comparison: PlanComparison) -> list[str]:
    """Which plan is faster and which smaller, by how much, and the main reasons."""
    accounts = comparison.accounts
    lines = [line for pair in comparison.differences for line in (_time_line(pair), _memory_line(pair))]
    if len({account.result.scenario.plan.gpus for account in accounts}) > 1:
        lines.append("The plans use different numbers of GPUs: compare the throughput per GPU, not times.")
    lines += [f"{a.name} does not fit in the device memory." for a in accounts if not a.result.fits]
    if len(accounts) > 2:
        fastest = min(accounts, key=lambda account: account.result.step_time_s)
        smallest = min(accounts, key=lambda account: account.result.peak_memory_gib)
        lines.append(f"Shortest step: {fastest.name}. Lowest peak of memory: {smallest.name}.")
    return lines


def _time_line(pair: Difference) -> str:
    before, after = pair.before.name, pair.after.name
    change, was = sum(pair.layer.values()), sum(pair.before.layer.values())
    if not change:
        return f"{after} takes as long as {before}: {was / PS_PER_MS:.3f} ms a layer."
    step = 100 * sum(pair.step.values()) / sum(pair.before.step.values())
    return (
        f"{after} is {'faster' if change < 0 else 'slower'} than {before}: one layer, forward and backward, takes "
        f"{(was + change) / PS_PER_MS:.3f} instead of {was / PS_PER_MS:.3f} ms ({_signed(100 * change / was, 1)} %; "
        f"step {_signed(step, 1)} %). {_reasons(grouped(pair.layer), change, PS_PER_MS, 'ms')}"
    )


def _memory_line(pair: Difference) -> str:
    change, was = sum(pair.memory.values()), sum(pair.before.memory.values())
    if not change:
        return f"{pair.after.name} has the same peak of memory as {pair.before.name}: {was / GIB:.2f} GiB."
    return (
        f"{pair.after.name} needs {'less' if change < 0 else 'more'} memory: {(was + change) / GIB:.2f} instead of "
        f"{was / GIB:.2f} GiB at the peak ({_signed(100 * change / was, 1)} %). "
        f"{_reasons(pair.memory, change, GIB, 'GiB')}"
    )


def _reasons(parts: dict[str, int], change: int, unit: int, name: str) -> str:
    """The largest parts, three quarters of what goes the way of the difference, and the largest against it."""
    ways = {part: amount * (1 if change > 0 else -1) for part, amount in parts.items()}
    along = sorted((part for part in ways if ways[part] > 0), key=lambda part: -ways[part])
    told: list[str] = []
    while 4 * sum(ways[part] for part in told) < 3 * sum(ways[part] for part in along):
        told.append(along[len(told)])
    against = min(ways, key=lambda part: ways[part])
    words = ", ".join(f"{part} {_signed(parts[part] / unit, 3)} {name}" for part in told)
    but = f"; against it: {against} {_signed(parts[against] / unit, 3)} {name}" if ways[against] < 0 else ""
    return f"Mainly: {words}{but}."


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
