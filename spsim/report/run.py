"""Tables and sentences of one run."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from spsim.report.table import table
from spsim.report.words import band, collective_counts, figure, missed, size, time
from spsim.results.accounts import IDLE, PEERS, STAGES
from spsim.results.result import Result
from spsim.results.tables import operator_rows
from spsim.units import GIB, MIB

WAITS = {
    "peer": (PEERS, "for a rank that comes later to a communication"),
    "stage": (STAGES, "for a message that it has not sent or taken"),
    "dependency": (IDLE, "nothing runs and no communication is posted"),
}
"""What kernels wait for beside transfers: in a word, and why."""
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
    if result.attention:
        yield "attention", result.attention, "the kernel of core attention"
    yield "layer forward", time(result.layer_forward_s), collective_counts(counts["forward"])
    yield "layer backward", time(result.layer_backward_s), collective_counts(counts["backward"])
    yield "exposed communication", time(result.exposed_comm_s), "of the step, not hidden by any kernel"
    for reason, seconds in result.idle_s.items():
        if seconds:
            name, why = WAITS[reason]
            yield name, time(seconds), f"of the step, {why}"
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
    lines = [f"note: {note}" for note in result.notes]
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
    for row in operator_rows(result.trace)[:rows]:
        share = row["time_ms"] / 1e3 / result.step_time_s
        made.add_row(
            row["operator"], row["part"], row["operator_class"], row["lane"], time(row["time_ms"] / 1e3),
            f"{100 * share:.1f} %", str(row["calls"]),
        )  # fmt: skip
    return made
