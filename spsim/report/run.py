"""Tables and sentences of one run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from spsim.report.table import table
from spsim.report.words import STEP_NAME, band, collective_counts, far_off, figure, gpus, missed, size, time
from spsim.results.accounts import IDLE, PEERS, STAGES
from spsim.results.derived import FITS_SCOPE, STATIC
from spsim.results.result import Result
from spsim.results.sensitivity import SHARE, Effect
from spsim.results.waterfall import noticeable
from spsim.units import GIB, MIB

WAITS = {
    "peer": (PEERS, "for a rank that comes later to a communication"),
    "stage": (STAGES, "for a message that it has not sent or taken"),
    "dependency": (IDLE, "nothing runs and no communication is posted"),
}
"""What kernels wait for beside transfers: in a word, and why."""
LITTLE_PERCENT = 0.1
"""Of the step, below which effects are not told one by one."""
SCOPE_NOTE = {
    "step": "embedding to loss and back, gradients summed, optimizer",
    "layers": "transformer layers only: no embedding, head, loss or optimizer step",
    "module": "passes of the module, gradients summed, optimizer",
    "passes": "passes of the module only",
    "prefill": "from the prompt to the first token after it",
    "decode": "from a token of each sequence to the next",
}


def summary(result: Result) -> Table:
    """The figures of one run."""
    scenario = result.scenario
    title = (
        f"{scenario.model.name} on {scenario.hardware.name}: {scenario.plan.label}, {gpus(result)}, "
        f"sequence {scenario.workload.seq_len}, micro-batch {scenario.workload.micro_batch}"
    )
    return figures_table(result, title)


def figures_table(result: Result, title: str = "") -> Table:
    """The same under another title."""
    made = table(title, ["quantity", "value", "of"], numbers=["value"])
    for row in _summary_rows(result):
        made.add_row(*row)
    return made


def _summary_rows(result: Result) -> Iterable[tuple[str, str, str]]:
    counts = result.collectives_per_layer
    layers, micro_batches = result.scenario.model.layers, result.scenario.num_micro_batches
    passes = f"{layers} layers × {micro_batches} micro-batches"
    name = STEP_NAME.get(result.scope, "step time")
    yield name, time(result.step_time_s), f"{passes}; {SCOPE_NOTE[result.scope]}"
    if result.attention:
        yield "attention", result.attention, "the kernel of core attention"
    yield "layer forward", time(result.layer_forward_s), collective_counts(counts["forward"])
    if not result.is_served:
        yield "layer backward", time(result.layer_backward_s), collective_counts(counts["backward"])
    yield "exposed communication", time(result.exposed_comm_s), "of the step, not hidden by any kernel"
    for reason, seconds in result.idle_s.items():
        if seconds:
            name, why = WAITS[reason]
            yield name, time(seconds), f"of the step, {why}"
    if result.bubble:
        yield "bubble", f"{100 * result.bubble:.1f} %", "of the step, a mean over stages; transfers apart"
    if not result.is_served:
        yield "weight synchronisation", time(result.weight_sync_s), "of the step, at its end"
    if result.optimizer_s:
        yield "optimizer", time(result.optimizer_s), "of the step: its kernels, and what ranks agree on"
    yield (
        "MFU",
        f"{100 * result.mfu:.1f} %",
        f"full square; causal half {100 * result.mfu_causal:.1f} %"
        + ("" if result.is_served else f", HFU {100 * result.hfu:.1f} %"),
    )
    yield (
        "throughput",
        "" if "tokens_per_s_per_gpu" in result.unknown else f"{figure(result.tokens_per_s_per_gpu)} tokens/s/GPU",
        f"{figure(result.tflops_per_gpu)} TFLOP/s/GPU",
    )
    yield "peak memory", size(result.peak_memory_gib * GIB), f"at {result.peak_operator}"
    yield "device memory", size(result.device_memory_gib * GIB), _fit(result)
    if result.is_served:
        yield from _cache_rows(result)
        return
    yield (
        "kept per layer",
        f"{result.activation_bytes_per_layer / MIB:.1f} MiB",
        "activations and masks of one micro-batch",
    )


def _cache_rows(result: Result) -> Iterable[tuple[str, str, str]]:
    workload = result.scenario.workload
    of = f"{workload.micro_batch} x {workload.seq_len:,} tokens, in blocks of {workload.kv_block_tokens}"
    yield "KV cache", size(result.kv_cache_gib * GIB), of
    yield "largest batch that fits", str(result.largest_micro_batch), "sequences of this length, of one replica"


def waterfall_table(result: Result) -> Table:
    """From the ideal time of the model's FLOPs to the step, part by part."""
    made = table("From ideal FLOPs to the step", ["part", "time", "share"], numbers=["time", "share"])
    (parts,) = noticeable([result.waterfall])
    for part, took in [*parts.items(), ("step", result.step_time_s)]:
        made.add_row(part, time(took), f"{100 * took / result.step_time_s:.1f} %")
    return made


def stage_table(result: Result) -> Table:
    """Where memory is fullest on each stage of a pipeline."""
    made = table("Peak of memory by stage", ["stage", "rank", "peak", "at"], numbers=["stage", "rank", "peak"])
    for spot in result.stage_peaks:
        made.add_row(str(spot.stage), str(spot.rank), size(spot.bytes), spot.operator or STATIC)
    return made


def _fit(result: Result) -> str:
    if result.fits:
        return f"fits {result.capacity_gib:.1f} GiB reported by the driver; {FITS_SCOPE[result.scope]}"
    over = result.device_memory_gib - result.capacity_gib
    only = "" if result.scope == "step" or result.is_served else f" ({result.scope} only)"
    return f"does not fit {result.capacity_gib:.1f} GiB by {over:.1f} GiB, at {result.out_of_memory_at}{only}"


def notes(result: Result) -> list[str]:
    """What a reader of the figures must know: notes, inputs that nobody measured, errors of the calibration."""
    lines = [f"note: {note}" for note in result.notes]
    unmeasured = {"assumed inputs": result.assumed, "inherited inputs (of another card)": result.inherited}
    lines += [_unmeasured(what, names, result) for what, names in unmeasured.items() if names]
    lines += map(far_off, result.far_off)
    if result.flagged:
        lines.append(missed(result.flagged))
    if result.error_band is not None:
        lines.append(band(result.error_band))
    if result.prior_band is not None:
        prior = result.prior_band
        lines.append(f"how sure: 90 % of {prior.rows} {prior.of} are met within ±{prior.percent:.1f} %")
    return lines


def _unmeasured(what: str, names: tuple[str, ...], result: Result) -> str:
    """Each coefficient with what a fifth of it does, largest first; those that do little together."""
    if result.assumed_effects is None:
        return f"{what} used ({len(names)}; too many tasks to say what each does): {', '.join(names)}"
    effects = {path: effect for path, effect in result.assumed_effects.items() if path in names}
    told, little = [], []
    for path, effect in effects.items():
        percent, room = _largest(effect) if effect else (0.0, 0.0)
        if percent >= LITTLE_PERCENT or room:
            told.append(f"{path} ±{f'{percent:.1f} %' if percent else f'{room * GIB / MIB:.0f} MiB of free memory'}")
        elif effect:
            little.append(path)
    parts = [", ".join(told)] if told else []
    parts += [f"{len(little)} less than ±{LITTLE_PERCENT} % each (--json names them)"] if little else []
    choices = [path for path, effect in effects.items() if effect is None]
    parts += [f"choices: {', '.join(choices)}"] if choices else []
    does = f"what ±{100 * SHARE:.0f} % of each does to the step"
    return f"{what} used ({len(names)}), and {does}: {'; '.join(parts)}"


def _largest(effect: Effect) -> tuple[float, float]:
    percent, room = (max(map(abs, change)) for change in (effect.step_time_percent, effect.free_memory_gib))
    return percent, room


def operator_table(result: Result, rows: int = 12) -> Table:
    """The operators that take most of the time of the first rank, with their rates."""
    made = table(
        "Time of the first rank by operator",
        ["operator", "part", "class", "lane", "time", "share of step", "calls", "rate"],
        numbers=["time", "share of step", "calls"],
    )  # fmt: skip
    found = result.operator_rows
    for row in found[:rows]:
        share = row["time_ms"] / 1e3 / result.step_time_s
        made.add_row(
            row["operator"], row["part"], row["operator_class"], row["lane"], time(row["time_ms"] / 1e3),
            f"{100 * share:.1f} %", str(row["calls"]), _rate(row),
        )  # fmt: skip
    shown, total = (sum(row["time_ms"] for row in some) for some in (found[:rows], found))
    made.caption = (
        f"{min(rows, len(found))} of {len(found)} operators, {100 * shown / total:.0f} % of their time; --out writes "
        "all to operators.csv. GB/s: bus bandwidth"
    )
    made.caption_justify = "left"
    return made


def _rate(row: Mapping[str, Any]) -> str:
    """FLOP/s of a kernel; bytes that a GPU sends over time, and how they are sent."""
    if not row["time_ms"]:
        return ""
    if row["sent_mib"]:
        rate = f"{figure(row['sent_mib'] * MIB / row['time_ms'] / 1e6)} GB/s, {row['algorithm'].replace('_', '-')}"
        return rate + (f" on {row['channels']} channels" if row["channels"] else "")
    return f"{figure(row['gflop'] / row['time_ms'])} TFLOP/s" if row["gflop"] else ""
