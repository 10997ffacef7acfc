"""Tables and sentences of a comparison of plans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table

from spsim.report.table import table
from spsim.report.words import (
    STEP_NAME,
    band_parts,
    collective_counts,
    far_off,
    figure,
    gpus,
    listed,
    measured,
    memory_unit,
    missed,
    signed,
    size,
    time,
)
from spsim.results.bands import Band
from spsim.studies.comparison import HELD_OUT, Difference, PlanComparison
from spsim.studies.plan_accounts import PlanAccount, grouped
from spsim.units import GIB, MIB, PS_PER_MS


def plans_table(comparison: PlanComparison) -> Table:
    """The figures of the plans, a column each."""
    accounts = comparison.accounts
    scenario = accounts[0].result.scenario
    title = (
        f"{scenario.model.name} on {scenario.hardware.name}: sequence {scenario.workload.seq_len}, "
        f"micro-batch {scenario.workload.micro_batch}"
    )
    nodes = {account.result.nodes for account in accounts}
    if len(nodes) == 1 and nodes != {1}:
        title += f", {nodes.pop()} nodes"
    made = table(title, ["quantity", *(account.name for account in accounts)])
    columns = [dict(_plan_rows(account)) for account in accounts]
    for quantity in columns[0]:
        made.add_row(quantity, *(column.get(quantity, "unknown") for column in columns))
    return made


def _plan_rows(account: PlanAccount) -> Iterable[tuple[str, str]]:
    result = account.result
    yield "plan", account.text or account.name
    yield "GPUs", gpus(result).replace(" GPUs", "").replace(" GPU", "")
    if result.attention:
        yield "attention", result.attention
    yield "layer forward", time(result.layer_forward_s)
    if not result.is_served:
        yield "layer backward", time(result.layer_backward_s)
    yield STEP_NAME.get(result.scope, "step time"), time(result.step_time_s)
    if result.error_band is not None:
        yield "error band", band_parts(result.error_band).replace(", ", "\n")
    yield "throughput", f"{figure(result.tokens_per_s_per_gpu)} tokens/s/GPU"
    yield "peak memory", f"{size(result.peak_memory_gib * GIB)}, at {result.peak_operator}"
    yield "device memory", f"{size(result.device_memory_gib * GIB)} of {result.capacity_gib:.1f} GiB"
    yield (
        "fits" if result.scope == "step" or result.is_served else f"fits, {result.scope} only",
        "yes" if result.fits else f"no, from {result.out_of_memory_at} on",
    )
    if result.is_served:
        yield "KV cache", size(result.kv_cache_gib * GIB)
        yield "largest batch that fits", str(result.largest_micro_batch)
    else:
        yield "kept per layer", f"{result.activation_bytes_per_layer / MIB:.1f} MiB"
    for phase in result.prepared.passes:
        counts = result.collectives_per_layer[phase]
        yield f"collectives, {phase}", collective_counts(counts)
    sent = result.comm_bytes_per_gpu_by_op.items()
    yield (
        "sent by a GPU in a step",
        "\n".join(f"{name.replace('_', '-')} {size(sent_bytes)}" for name, sent_bytes in sent) or "nothing",
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
    side = (pair.before.memory, pair.after.memory, pair.memory)
    unit, unit_name = memory_unit(max(sum(parts.values()) for parts in side))
    made = table(f"Memory at the peak of the fullest rank, {unit_name}", ["category", *columns], numbers=columns)
    for name in pair.memory:
        made.add_row(name, *_cells(side, name, unit, 2))
    made.add_section()
    made.add_row("total", *_cells(side, None, unit, 2))
    return made


def _cells(side: Sequence[dict[str, int]], name: str | None, unit: int, digits: int) -> list[str]:
    """Both plans and the difference of one part, or of all together."""
    first, second, change = (sum(parts.values()) if name is None else parts.get(name, 0) for parts in side)
    return [f"{first / unit:.{digits}f}", f"{second / unit:.{digits}f}", signed(change / unit, digits)]


def comparison_lines(comparison: PlanComparison) -> list[str]:
    """Which plan is faster and which smaller, by how much, and the main reasons."""
    accounts = comparison.accounts
    lines = [*_answer(comparison)]
    lines += [line for pair in comparison.differences for line in (_time_line(pair), _memory_line(pair))]
    if len({account.result.scenario.plan.gpus for account in accounts}) > 1:
        lines.append("The plans use different numbers of GPUs: compare the throughput per GPU, not times.")
    lines += [f"{a.name} does not fit in the device memory." for a in accounts if not a.result.fits]
    lines += [f"{a.name}: {a.result.overlap}." for a in accounts if a.result.overlap]
    if len(accounts) > 2:
        fit = len({account.result.fits for account in accounts}) == 1
        shortest = f"Shortest step: {_shortest(comparison)}. " if fit else ""
        lines.append(f"{shortest}Lowest peak of memory: {listed(_smallest(accounts))}.")
    return [*lines, *_trust_lines(comparison)]


def _answer(comparison: PlanComparison) -> Iterable[str]:
    """Where some plans do not fit, which of those that do has the shortest step, and which would have a shorter one."""
    steps = {account.name: account.result.step_ps for account in comparison.accounts if account.result.fits}
    if len(steps) in (0, len(comparison.accounts)):
        return
    others = [account for account in comparison.accounts if not account.result.fits]
    shorter = [account.name for account in others if account.result.step_ps < min(steps.values())]
    more = (
        f" {listed(shorter)} would be shorter, but {'do' if len(shorter) > 1 else 'does'} not fit." if shorter else ""
    )
    if len(steps) == 1:
        yield f"Only {next(iter(steps))} fits.{more}"
    else:
        yield f"Shortest step of the plans that fit: {_shortest(comparison)}.{more}"


def _shortest(comparison: PlanComparison) -> str:
    first, *tied = comparison.fastest
    return f"{first}, a tie with {listed(tied)}" if tied else first


def _smallest(accounts: Sequence[PlanAccount]) -> list[str]:
    """The plan with the lowest peak of memory, and those that differ by less than is shown."""
    peaks = {account.name: account.result.peak_memory_gib * GIB for account in accounts}
    return [name for name, peak in peaks.items() if size(peak) == size(min(peaks.values()))]


def _trust_lines(comparison: PlanComparison) -> Iterable[str]:
    """What is left out or has no effect, the rule of the error band, and what a calibration does not describe."""
    notes = [note for account in comparison.accounts for note in account.result.scenario.notes]
    yield from (f"note: {note}" for note in dict.fromkeys(notes))
    if any(pair.band.of == HELD_OUT for pair in comparison.differences):
        yield (
            "A difference of steps is a tie where it is smaller in percent than the larger band of the two steps; "
            "errors that both plans share cancel in part, so the band is wide for a difference."
        )
    parts: dict[Band, list[str]] = {}
    for account in comparison.accounts:
        for part in account.result.far_off:
            parts.setdefault(part, []).append(account.name)
    yield from (f"{listed(names)}: {far_off(part)}" for part, names in parts.items())
    flags: dict[tuple[str, ...], list[str]] = {}
    for account in comparison.accounts:
        if account.result.flagged:
            flags.setdefault(account.result.flagged, []).append(account.name)
    yield from (f"{listed(names)}: {missed(flagged)}" for flagged, names in flags.items())


def _time_line(pair: Difference) -> str:
    """Ranked by the step: neighbouring layers may overlap, and weights synchronise at its end."""
    before, after = pair.before, pair.after
    change = sum(pair.step.values())
    was, now = (time(account.result.step_time_s) for account in (before, after))
    if not change:
        return f"{after.name} takes as long as {before.name}: {was} a step."
    took = f"the step takes {now} instead of {was}" if now != was else f"the step takes {was} under both"
    took += f" ({signed(pair.step_percent, 1)} %"
    if pair.tie:
        head = f"{after.name} and {before.name} are a tie: {took}, less than the band of {measured(pair.band)})"
    else:
        word = "faster" if change < 0 else "slower"
        head = f"{after.name} is {word} than {before.name}: {took}; band {measured(pair.band)})"
    return f"{head}. {reasons(grouped(pair.step), change, PS_PER_MS, 'ms')}"


def _memory_line(pair: Difference) -> str:
    change, was = sum(pair.memory.values()), sum(pair.before.memory.values())
    unit, name = memory_unit(was)
    texts = [f"{amount / unit:.2f}" for amount in (was + change, was)]
    if texts[0] == texts[1]:
        more = f", {size(abs(change))} {'less' if change < 0 else 'more'}" if change else ""
        return f"{pair.after.name} has the same peak of memory as {pair.before.name}: {texts[0]} {name}{more}."
    return (
        f"{pair.after.name} needs {'less' if change < 0 else 'more'} memory: {texts[0]} instead of "
        f"{texts[1]} {name} at the peak ({signed(100 * change / was, 1)} %). "
        f"{reasons(pair.memory, change, unit, name)}"
    )


def reasons(parts: dict[str, int], change: int, unit: int, name: str) -> str:
    """The largest parts, three quarters of what goes the way of the difference, and the largest against it."""
    ways = {part: amount * (1 if change > 0 else -1) for part, amount in parts.items()}
    along = sorted((part for part in ways if ways[part] > 0), key=lambda part: -ways[part])
    told: list[str] = []
    while 4 * sum(ways[part] for part in told) < 3 * sum(ways[part] for part in along):
        told.append(along[len(told)])
    against = min(ways, key=lambda part: ways[part])
    words = ", ".join(f"{part} {signed(parts[part] / unit, 3)} {name}" for part in told)
    rest = signed(parts[against] / unit, 3)
    but = f"; against it: {against} {rest} {name}" if ways[against] < 0 and float(rest.replace("−", "-")) else ""
    return f"Mainly: {words}{but}."
