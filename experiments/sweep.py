"""What does sequence parallelism buy over tensor parallelism alone, in time and in memory, for whole training steps?

TP only, Megatron TP+SP, Ulysses, ring attention and their product (USP), each in the forms that people run: without
recomputation, selective or full; Ulysses, ring and USP with their optimizer (ZeRO-1) or weights and gradients, too
(ZeRO-3), spread over their ranks; interleaved pipeline stages where a model needs them. Steps of 1M tokens of gpt-22b
as published (attention not fused, so no ring) and llama-3-8b on a node of A100 and H100, and of llama-3-70b on four
nodes of H100. Ten seconds of CPU. Expect TP+SP to save memory always, and time mostly where it fits with less
recomputation than TP only; Ulysses, ring and USP to be ahead at long sequences, where they send less in every layer.

    python -m spsim experiments/sweep.py [--out results] [--jobs N] [--quick]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

import spsim
from spsim import plots, report
from spsim.inputs.plan import parse_plan
from spsim.studies.ranking import ranked, tie
from spsim.units import KIB, MIB, MS_PER_S

TOKENS = MIB
"""Of a step: the global batch is as many sequences as hold them."""
MICRO_BATCH_TOKENS = 8 * KIB
"""Of a micro-batch, or one sequence if that is longer: 4 sequences of 2K as gpt-22b was measured with."""
NOTE = "whole steps of 1M tokens"
SHARDED = ("distributed_optimizer", "zero=3")
"""How Ulysses, ring and USP spread weights, gradients and optimizer over their ranks and replicas."""
OVERLAP = ",dp_overlap"
"""What there is to synchronise of weights and gradients runs behind the passes, as people have it everywhere."""
RECOMPUTATION = ("none", "selective", "full")
"""From the least to the most."""

Row = Mapping[str, Any]
Rows = Mapping[str, Row]
"""Strategy -> its row."""
Key = tuple[str, str, int]
"""Model, hardware and sequence length."""


@dataclass(frozen=True)
class Case:
    """One model on some machines."""

    model: str
    machines: tuple[str, ...]
    seq_lens: tuple[int, ...]
    strategies: Mapping[str, tuple[str, ...]]
    """Strategy -> its plans, without recomputation."""
    selective: str
    """What a selective recomputation runs again: the largest of what is cheap."""

    def plans(self) -> Iterator[tuple[str, str]]:
        """(strategy, plan) with every recomputation."""
        for strategy, plans in self.strategies.items():
            for plan in plans:
                yield from ((strategy, plan + OVERLAP + suffix) for suffix in ("", self.selective, ",recompute=full"))

    def points(self) -> Iterator[spsim.Point]:
        """Every configuration; its labels are columns of its row even when it fails."""
        for hardware in self.machines:
            for seq_len in self.seq_lens:
                for strategy, plan in self.plans():
                    labels = {"model": self.model, "hardware": hardware, "strategy": strategy, "seq_len": seq_len}
                    yield spsim.Point(settings(self.model, hardware, seq_len, plan), labels)


def lengths(first: int, last: int) -> tuple[int, ...]:
    """Powers of two, given in units of 1024 tokens."""
    return tuple(KIB * 2**power for power in range(first.bit_length() - 1, last.bit_length()))


def sharded(degrees: str) -> tuple[str, ...]:
    """Degrees of sequence parallelism with each way to spread the optimizer."""
    return tuple(f"{degrees},{options}" for options in SHARDED)


def staged(degrees: str) -> tuple[str, ...]:
    """The same for four nodes: one of four pipeline stages each, or one of four replicas."""
    return f"{degrees},pp=4,virtual_pp=5,distributed_optimizer", f"{degrees},dp=4,{SHARDED[1]}"


TP = {"TP only": ("tp=8",), "TP+SP": ("tp=8,sequence_parallel",)}
STAGED_TP = {strategy: (f"{plan},pp=4,virtual_pp=5",) for strategy, (plan,) in TP.items()}
NODE = {"Ulysses": "ulysses=8", "Ring": "ring=8", "USP": "ulysses=4,ring=2"}
NODES = {strategy: staged(degrees) for strategy, degrees in NODE.items()}
NODES["USP"] += (f"ulysses=8,ring=4,{SHARDED[1]}",)
MLP = ",recompute=selective,recompute_modules=mlp"
CASES = (
    Case(
        "gpt-22b", ("dgx-a100-80gb", "dgx-h100"), lengths(2, 32),
        {**TP, "Ulysses": sharded(NODE["Ulysses"])}, ",recompute=selective",
    ),
    Case(
        "llama-3-8b", ("dgx-a100-80gb", "dgx-h100"), lengths(8, 256),
        {**TP, **{strategy: sharded(degrees) for strategy, degrees in NODE.items()}}, MLP,
    ),
    Case("llama-3-70b", ("dgx-h100",), lengths(8, 256), {**STAGED_TP, **NODES}, MLP),
)  # fmt: skip


def settings(model: str, hardware: str, seq_len: int, plan: str, tokens: int = TOKENS) -> dict[str, object]:
    """The settings of one scenario; a step of so many tokens."""
    micro_batch = max(1, MICRO_BATCH_TOKENS // seq_len)
    workload = spsim.Workload(seq_len=seq_len, micro_batch=micro_batch, global_batch=tokens // seq_len)
    return {"hardware": hardware, "model": model, "plan": plan, "workload": workload}


def points() -> list[spsim.Point]:
    """Every configuration of every case."""
    return [point for case in CASES for point in case.points()]


def quick_points() -> list[spsim.Point]:
    """Two sequence lengths of the models that one node holds, on one machine each."""
    kept = {("gpt-22b", "dgx-a100-80gb"): (2 * KIB, 8 * KIB), ("llama-3-8b", "dgx-h100"): (64 * KIB, 256 * KIB)}
    return [p for p in points() if p.labels["seq_len"] in kept.get((p.labels["model"], p.labels["hardware"]), ())]


# ------------------------------------------------------------ of each strategy one plan


def chosen(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Of each model, hardware, length and strategy the plan that fits with the least in a column; where none fits, the
    one that needs the least memory.
    """
    known = frame[frame["error"] == ""]
    fits = known["fits"].astype(bool)
    order = known.assign(out=~fits, size=known[column].where(fits, known["device_memory_gib"]))
    best = order.sort_values(["out", "size"]).groupby(["model", "hardware", "seq_len", "strategy"], sort=False).head(1)
    return known.loc[best.index.sort_values()]


def cases(frame: pd.DataFrame) -> dict[Key, Rows]:
    """Strategy -> row, of each model, hardware and length."""
    found: dict[Key, dict[str, Row]] = {}
    for row in frame.to_dict("records"):
        found.setdefault((row["model"], row["hardware"], row["seq_len"]), {})[row["strategy"]] = row
    return found


def recomputation(row: Row) -> str:
    """What the plan of a row recomputes."""
    return parse_plan(row["plan"]).recompute


def named(key: Key) -> str:
    """Where something holds."""
    model, hardware, seq_len = key
    return f"{model} on {hardware} at {seq_len // KIB}K"


# ------------------------------------------------------------ pictures


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """Steps and memory of each strategy's best plan; a layer and a memory curve of plans beside each other."""
    where, memory = ("gpt-22b", "dgx-a100-80gb", 2 * KIB), ("llama-3-8b", "dgx-h100", 32 * KIB)
    pair = {strategy: simulate(where, f"{plan},recompute=selective") for strategy, (plan,) in TP.items()}
    plans = {strategy: plan for strategy, (plan,) in TP.items()}
    plans |= dict(zip(("Ulysses, ZeRO-1", "Ulysses, ZeRO-3"), sharded(NODE["Ulysses"]), strict=True))
    curves = {strategy: simulate(memory, plan) for strategy, plan in plans.items()}
    return {
        "step_times.png": plots.plot_step_times(
            chosen(frame, "step_time_ms"), note=f"{NOTE} · of each strategy its fastest plan that fits"
        ),
        "peak_memory.png": plots.plot_peak_memory(
            chosen(frame, "device_memory_gib"), note=f"{NOTE} · of each strategy its leanest plan"
        ),
        "timelines_tp_sp.png": plots.plot_timelines(pair, title="One layer of gpt-22b on eight A100"),
        "memory_curves.png": plots.plot_memory_curves(
            curves, title="Memory over a step of one micro-batch of llama-3-8b on eight H100"
        ),
    }


def simulate(key: Key, plan: str) -> spsim.Result:
    """One micro-batch of a configuration that is drawn."""
    model, hardware, seq_len = key
    return spsim.simulate(spsim.Scenario(**settings(model, hardware, seq_len, plan, max(seq_len, MICRO_BATCH_TOKENS))))


# ------------------------------------------------------------ tables and the answer


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Of each model and hardware the strategies beside each other, and the answer in three sentences."""
    fastest = cases(chosen(frame, "step_time_ms"))
    strategies = list(dict.fromkeys(frame["strategy"]))
    for (model, hardware), group in frame.groupby(["model", "hardware"], sort=False):
        made = report.table(
            f"{model} on {group['gpus'].iloc[0]} GPUs of {hardware}: {NOTE}", ["sequence", *strategies], numbers=[]
        )
        for key, rows in fastest.items():
            if key[:2] == (model, hardware):
                made.add_row(f"{key[2] // KIB}K", *cells(rows, strategies, hardware))
        yield made
    yield (
        "Of each strategy the plan that fits with the shortest step, its memory of the device, and what it recomputes "
        "(selective, full) and shards (Z1, Z3: ZeRO stage); ✗: no plan of it fits, and what the leanest needs; *: the "
        "shortest step, and those that tie with it, which differ from it by less than published ratios of such plans "
        "are off (experiments/bands.py); –: not run, since ring attention needs the flash kernel."
    )
    yield from answer(frame)


def cells(rows: Rows, strategies: list[str], hardware: str) -> Iterator[str]:
    """A cell for each strategy."""
    fitting = {strategy: row for strategy, row in rows.items() if row["fits"]}
    best: tuple[str, ...] = ()
    if fitting:
        ranking = ranked(fitting, spsim.load_profile(hardware))
        best = (ranking.names[0], *ranking.tied)
    for strategy in strategies:
        yield cell(rows[strategy], star=strategy in best) if strategy in rows else "–"


def cell(row: Row, *, star: bool) -> str:
    """Step, memory, and options of one plan."""
    memory = f"{row['device_memory_gib']:.0f} GiB"
    if not row["fits"]:
        return f"✗ {memory}"
    plan = parse_plan(row["plan"])
    options = [plan.recompute] if plan.recompute != "none" else []
    options += [f"Z{plan.zero_stage}"] if plan.zero_stage else []
    return f"{'*' if star else ''}{row['step_time_ms'] / MS_PER_S:.1f} s, {memory}" + "".join(f", {o}" for o in options)


def answer(frame: pd.DataFrame) -> Iterator[str]:
    """What sequence parallelism bought: time, memory, and what fits with nothing else."""
    fastest = cases(chosen(frame, "step_time_ms"))
    yield time_bought(fastest)
    yield memory_bought(frame, fastest)
    yield fit_bought(fastest)


def time_bought(fastest: Mapping[Key, Rows]) -> str:
    """Fastest plans that fit, against that of TP only."""
    both = {key: rows for key, rows in fastest.items() if rows["TP only"]["fits"]}
    if not both:
        return "Time: TP only fits nowhere, so there is nothing to compare with."
    others = [s for s in dict.fromkeys(s for rows in both.values() for s in rows) if s not in TP]
    said = [against(both, ["TP+SP"], "TP+SP"), against(both, others, f"the fastest of {', '.join(others)}")]
    return f"Time: of {len(fastest)} cases TP only fits in {len(both)}; there the step of {'; that of '.join(said)}."


def against(both: Mapping[Key, Rows], strategies: list[str], name: str) -> str:
    """In how many cases the fastest of some strategies is ahead of TP only, behind it, or neither."""
    ahead, behind, tied = {}, {}, 0
    for key, rows in both.items():
        tp, profile = rows["TP only"], spsim.load_profile(key[1])
        fitting = [rows[s] for s in strategies if s in rows and rows[s]["fits"]]
        if not fitting:
            continue
        mine = min(fitting, key=lambda row: row["step_time_ms"])
        change = mine["step_time_ms"] / tp["step_time_ms"] - 1
        if tie(mine, tp, profile):
            tied += 1
        else:
            (ahead if change < 0 else behind)[key] = change
    parts = [f"is shorter in {len(ahead)}{furthest(ahead)}", f"longer in {len(behind)}{furthest(behind)}"]
    return f"{name} {', '.join(parts)} and a tie in {tied}"


def furthest(changes: Mapping[Key, float]) -> str:
    """The largest of some changes, and where."""
    if not changes:
        return ""
    key = max(changes, key=lambda key: abs(changes[key]))
    return f" (by up to {100 * abs(changes[key]):.0f} %, {named(key)})"


def memory_bought(frame: pd.DataFrame, fastest: Mapping[Key, Rows]) -> str:
    """TP+SP against TP only under the same recomputation, and what each recomputes to fit."""
    known = frame[frame["error"] == ""]
    whole = known[[parse_plan(plan).recompute == "none" for plan in known["plan"]]]
    pairs = {key: (rows["TP only"], rows["TP+SP"]) for key, rows in cases(whole).items() if "TP+SP" in rows}
    saved = {key: 1 - sp["device_memory_gib"] / tp["device_memory_gib"] for key, (tp, sp) in pairs.items()}
    least, most = min(saved, key=saved.__getitem__), max(saved, key=saved.__getitem__)
    both = [rows for rows in fastest.values() if rows["TP only"]["fits"] and rows["TP+SP"]["fits"]]
    less = sum(
        RECOMPUTATION.index(recomputation(rows["TP+SP"])) < RECOMPUTATION.index(recomputation(rows["TP only"]))
        for rows in both
    )
    return (
        f"Memory: without recomputation TP+SP needs {100 * saved[least]:.0f} % ({named(least)}) to "
        f"{100 * saved[most]:.0f} % ({named(most)}) less of a GPU than TP only, and in {less} of the {len(both)} cases "
        "where both fit its fastest plan recomputes less."
    )


def fit_bought(fastest: Mapping[Key, Rows]) -> str:
    """Where TP only does not fit and something else does."""
    alone: dict[tuple[str, str], list[tuple[int, list[str]]]] = {}
    for (model, hardware, seq_len), rows in fastest.items():
        fitting = [strategy for strategy, row in rows.items() if row["fits"]]
        if fitting and "TP only" not in fitting:
            alone.setdefault((model, hardware), []).append((seq_len, fitting))
    if not alone:
        return "What fits: wherever a plan fits, TP only fits too."
    said = [
        f"{model} on {hardware} from {found[0][0] // KIB}K on (at {found[-1][0] // KIB}K {', '.join(found[-1][1])})"
        for (model, hardware), found in alone.items()
    ]
    return f"What fits: only sequence parallelism fits {'; '.join(said)}."


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    return spsim.Experiment(
        name="sweep",
        title="What sequence parallelism buys over tensor parallelism alone, for whole training steps",
        points=points(),
        quick=quick_points(),
        figures=figures,
        tables=tables,
    )
