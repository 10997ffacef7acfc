"""How fast is spsim? CPU time, best of several repetitions, figures as ratios within one run.

    python benchmarks/run.py [--peer PATH]

1. Events of the engine per second, without and with contention.
2. Configurations of a layer-level sweep per second and core, memory and metrics included, by plan; and what
   folding layers gains, the results being equal.
3. Scaling in layers and in ranks.
4. Grids: the workloads of one plan at once, as columns and through `sweep()`; plans that are new; a search over plans.
5. Whole steps of several pipeline stages: the step time, and with memory and what ranks wait for.
6. Commands as whole processes, against one that only imports pandas.
7. With `--peer`, a checkout of Calculon (github.com/calculon-ai/calculon, which needs psutil): the same
   configurations there, in the same process, what both predict for the layer of gpt-22b on A100, the eight steps that
   it is validated on (Korthikanti et al. 2022, Table 5), and its commands.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import islice, product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any

from rich.console import Console
from rich.table import Table
from timing import REPETITIONS, cpu_seconds

import spsim
from spsim import report
from spsim.engine.engine import run
from spsim.engine.tasks import Meeting, Task
from spsim.inputs.plan import parse_plan
from spsim.studies.grids import tables_of_points
from spsim.studies.measured_cases import load_cases
from spsim.studies.points import Point
from spsim.studies.rows import row

SETTINGS = {"hardware": "dgx-h100", "model": "llama-3-70b"}
PLANS = ("tp=8", "tp=8,sequence_parallel", "ulysses=8", "ring=8", "ulysses=4,ring=2", "tp=2,sequence_parallel,ring=4")
STEPS = (
    ("gpt-175b", "tp=8,pp=8,virtual_pp=3", 64),
    ("gpt-530b", "tp=8,pp=35,virtual_pp=3", 280),
    ("gpt-1t", "tp=8,pp=64", 512),
)
"""Model, plan beside sequence parallelism and selective recomputation, sequences of a step."""
PEER_MODELS = ("megatron-22B", "gpt3-175B", "turing-530B", "megatron-1T")
COMMANDS = {
    "--help": "",
    "run": "--model gpt-22b --hardware dgx-a100-80gb --plan tp=8,sequence_parallel,recompute=selective "
    "--seq-len 2048 --micro-batch 4",
    "explain": "--model gpt-22b --plan tp=8,sequence_parallel",
    "list": "hardware",
}


def engine_table() -> Table:
    """Tasks per second of the bare engine: a kernel and a collective in turn, on several ranks."""
    made = report.table(
        "Engine", ["ranks", "contention", "tasks", "tasks/s", "of the first"], numbers=["tasks", "tasks/s"]
    )
    first = None
    for ranks in (1, 8):
        for slowdown in (0.0, 0.15):
            programs = {rank: tasks(rank, ranks, 500) for rank in range(ranks)}
            seconds = cpu_seconds(lambda programs=programs, slowdown=slowdown: run(programs, slowdown=slowdown))
            rate = 1000 * ranks / seconds
            first = first or rate
            made.add_row(str(ranks), f"{slowdown:.0%}", f"{1000 * ranks}", f"{rate:,.0f}", f"{rate / first:.2f} ×")
    return made


def tasks(rank: int, ranks: int, pairs: int) -> list[Task]:
    """Kernels that overlap the collective before them."""
    found = []
    for index in range(pairs):
        needs = (2 * index - 2,) if index else ()
        found.append(Task(2 * index, "compute", 900 + rank))
        found.append(Task(2 * index + 1, "net", 400, needs, (Meeting((2 * index + 1,), ranks),)))
    return found


def points(plan: str, layers: int = 32) -> list[Point]:
    """Sequence lengths and micro-batches of llama-3-8b on two profiles."""
    model = spsim.load_model("llama-3-8b").model_copy(update={"layers": layers})
    return [
        Point({"hardware": spsim.load_profile(hardware), "model": model, "plan": parse_plan(plan),
               "workload": spsim.Workload(seq_len=1024 * length, micro_batch=micro_batch)})
        for hardware in ("dgx-a100-80gb", "dgx-h100")
        for length in range(4, 24)
        for micro_batch in (1, 2)
    ]  # fmt: skip


def rate(work: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """Items per second of CPU time, once everything that is prepared once is prepared."""
    work(items)
    return len(items) / cpu_seconds(lambda: work(items))


def sweep_table() -> Table:
    """Rows per second and core: scenario, simulation, memory and metrics."""
    columns = ["plan", "configurations/s", "of the first", "without folding", "folding gains"]
    made = report.table("Layer-level sweep, llama-3-8b, 32 layers", columns, numbers=columns[1:])
    first = None
    for plan in PLANS:
        folded = rate(tables_of_points, points(plan))
        first = first or folded
        scenarios = [spsim.Scenario(**point.settings) for point in points(plan)[:3]]
        unfolded = rate(lambda all_: [spsim.simulate(one, fold=False).step_time_s for one in all_], scenarios)
        made.add_row(
            plan, f"{folded:,.0f}", f"{folded / first:.2f} ×", f"{unfolded:,.1f}", f"{folded / unfolded:,.0f} ×"
        )
    return made


def scaling_table() -> Table:
    """Time against layers and ranks, relative to the smallest."""
    made = report.table(
        "Scaling, tp with sequence parallelism", ["layers", "ranks", "time", "of the first"], numbers=["time"]
    )
    first = None
    for layers, tp in ((1, 8), (8, 8), (32, 8), (96, 8), (32, 2), (32, 4)):
        seconds = 1 / rate(tables_of_points, points(f"tp={tp},sequence_parallel", layers)[:40])
        first = first or seconds
        made.add_row(str(layers), str(tp), f"{seconds * 1e6:.0f} us", f"{seconds / first:.2f} ×")
    return made


def grid_table(peer: Callable[[bool], Any] | None) -> Table:
    """Rows per second of the workloads of a plan at once, and of many plans, against one row at a time."""
    columns = ["what", "rows", "rows/s", "of one by one", *(["of Calculon"] if peer else [])]
    made = report.table("Grids, llama-3-70b on dgx-h100", columns, numbers=columns[1:])
    other = rate(lambda flags: [peer(flag) for flag in flags], [False, True] * 20) if peer else 0.0

    def add(what: str, rows: int, speed: float, one_by_one: float) -> None:
        ratios = [speed / one_by_one, *([speed / other] if peer else [])]
        made.add_row(what, str(rows), f"{speed:,.0f}", *(f"{ratio:.2f} ×" for ratio in ratios))

    for plan in PLANS:
        settings = [{**SETTINGS, "plan": plan, "workload": {"seq_len": 1024 * n}} for n in range(1, 65)]
        found = [Point(own) for own in settings]
        one_by_one = rate(lambda own: [row(point) for point in own], found)
        add(f"{plan}, one by one", len(found), one_by_one, one_by_one)
        add(f"{plan}, columns", len(found), rate(tables_of_points, found), one_by_one)
        add(f"{plan}, sweep()", len(found), rate(spsim.sweep, settings), one_by_one)
    plans = search_plans()
    model = spsim.load_model("llama-3-70b").model_copy(update={"layers": 16})
    search = [
        {**SETTINGS, "model": model, "plan": plan, "workload": {"seq_len": 8192, "micro_batch": micro_batch}}
        for plan in plans
        for micro_batch in (1, 2, 4)
    ]
    new = {**SETTINGS, "model": model.model_copy(update={"hidden": 4096})}
    cold = [[{**new, "plan": plan, "workload": {"seq_len": 8192}}] for plan in plans]
    add("new plan, sweep([point])", len(cold), once(lambda: [*map(spsim.sweep, cold)], len(cold)), one_by_one)
    what = f"search, {len(plans)} plans x 3"
    add(f"{what}, all new", len(search), once(lambda: spsim.sweep(search), len(search)), one_by_one)
    add(f"{what}, again", len(search), rate(spsim.sweep, search), one_by_one)
    return made


def once(work: Callable[[], Any], count: int) -> float:
    """Items per second of CPU time of what is new only once."""
    start = process_time()
    work()
    return count / (process_time() - start)


def search_plans() -> list[str]:
    """120 plans of 8 GPUs."""
    degrees = ("tp=8", "tp=4,ulysses=2", "tp=4,ring=2", "tp=2,ulysses=4", "tp=2,ulysses=2,ring=2", "tp=2,ring=4")
    options = (
        ",".join(filter(None, own))
        for own in product(
            degrees,
            ("", "recompute=selective", "recompute=full"),
            ("", "sequence_parallel"),
            ("", "distributed_optimizer"),
            ("", "tp_backward_overlap=false"),
        )
    )
    return [*islice(options, 120)]


def startup_table(peer: Path | None) -> Table:
    """CPU time of whole processes, the interpreter and all imports included; those compared run in turn."""
    columns = ["command", "CPU time", "of import pandas", *(["of Calculon"] if peer else [])]
    made = report.table("Commands as processes", columns, numbers=columns[1:])
    with TemporaryDirectory() as directory:
        for name, arguments in COMMANDS.items():
            processes = [["-m", "spsim", name, *arguments.split()], ["-c", "import pandas"]]
            if peer:
                processes.append(peer_command(peer, Path(directory), "-h" if name == "--help" else "llm"))
            times = [[process_seconds(process, peer) for process in processes] for _ in range(2 * REPETITIONS)]
            ratios = [median(own / others[i] for own, *others in times) for i in range(len(processes) - 1)]
            own = median(own for own, *_ in times)
            made.add_row(f"spsim {name}", f"{1e3 * own:.0f} ms", *(f"{ratio:.2f} ×" for ratio in ratios))
    return made


def process_seconds(arguments: Sequence[str], path: Path | None) -> float:
    """User and system time of one process of this interpreter, that finds what is in `path`."""
    places = [str(path) if path else "", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peer_command(path: Path, directory: Path, command: str) -> list[str]:
    """A command of Calculon: its help, or one configuration."""
    script = str(path / "bin" / "calculon")
    if command == "-h":
        return [script, "-h"]
    execution = directory / "execution.json"
    execution.write_text(json.dumps(peer_execution(path, sequence_parallel=True)))
    inputs = (path / "models" / "megatron-22B.json", execution, path / "systems" / "a100_80g.json")
    return [script, "llm", *map(str, inputs), "-"]


def peer_execution(path: Path, *, sequence_parallel: bool) -> dict[str, Any]:
    """How Calculon is told of one layer of gpt-22b on 8 GPUs, micro-batch 4."""
    example = json.loads((path / "examples" / "3072_t4_p64_d12_mbs4_full.json").read_text())
    return example | {
        "num_procs": 8, "tensor_par": 8, "pipeline_par": 1, "data_par": 1, "batch_size": 4, "microbatch_size": 4,
        "activation_recompute": "none", "optimizer_sharding": False, "pipeline_interleaving": 1,
        "tensor_par_comm_type": "rs_ag" if sequence_parallel else "ar", "seq_par_ag_redo": sequence_parallel,
    }  # fmt: skip


def peer_layer(path: Path) -> Callable[[bool], tuple[float, float]]:
    """Calculon on the gpt-22b layer, with its own A100 system file: seconds forward and backward."""
    sys.path.insert(0, str(path))
    from calculon.llm.llm import Llm
    from calculon.system import System

    description = json.loads((path / "systems" / "a100_80g.json").read_text())
    description["mem1"]["GiB"] = 200  # it refuses what does not fit; the layer's time is asked for
    system = System(description)
    application = Llm.Application(json.loads((path / "models" / "megatron-22B.json").read_text()))
    logger = logging.getLogger("peer")

    def calculon(sequence_parallel: bool) -> tuple[float, float]:
        settings = peer_execution(path, sequence_parallel=sequence_parallel)
        model = Llm(application, logger)
        model.compile(system, Llm.Execution.from_json(settings))
        model.run(system)
        stats = model.get_stats_json(False)
        backward = ("block_agrad_time", "block_wgrad_time", "baseblock_agrad_tp_time_exposed")
        backward += ("baseblock_recomm_time_exposed",)
        forward = stats["block_fw_time"] + stats["baseblock_fw_tp_time_exposed"]
        return forward, sum(stats[name] for name in backward)

    return calculon


def step_table() -> Table:
    """Steps of Korthikanti et al. 2022, Table 5."""
    columns = ["model", "plan", "GPUs", "micro-batches", "step time", "CPU, step time", "CPU, all figures"]
    made = report.table("Whole steps on A100, sequence 2048", columns, numbers=columns[2:])
    for model, plan, batch in STEPS:
        scenario = spsim.Scenario(
            hardware="dgx-a100-80gb", model=model, plan=f"{plan},sequence_parallel,recompute=selective",
            workload={"seq_len": 2048, "global_batch": batch}, scope="step",
        )  # fmt: skip

        def figures(scenario: spsim.Scenario = scenario) -> object:
            result = spsim.simulate(scenario)
            return result.step_time_s, result.peak_bytes, result.exposed_ps, result.idle_s, result.weight_sync_s

        step_s = spsim.simulate(scenario).step_time_s
        quick = cpu_seconds(lambda scenario=scenario: spsim.simulate(scenario).step_time_s)
        whole = cpu_seconds(figures)
        gpus, number = scenario.plan.gpus, scenario.num_micro_batches
        made.add_row(
            model, plan, f"{gpus}", f"{number}", f"{step_s:.2f} s", f"{1e3 * quick:.1f} ms", f"{1e3 * whole:.1f} ms"
        )
    return made


def peer_table(calculon: Callable[[bool], tuple[float, float]]) -> Table:
    """Both on the gpt-22b layer."""

    def ours(sequence_parallel: bool) -> tuple[float, float]:
        plan = spsim.Plan(tp=8, sequence_parallel=sequence_parallel)
        workload = spsim.Workload(seq_len=2048, micro_batch=4)
        scenario = spsim.Scenario(hardware="dgx-a100-80gb", model="gpt-22b", plan=plan, workload=workload)
        result = spsim.simulate(scenario)
        return result.layer_forward_s, result.layer_backward_s

    made = report.table(
        "Layer of gpt-22b on 8 x A100, micro-batch 4", ["tool", "TP", "TP+SP", "SP gains forward", "configurations/s"]
    )
    for name, tool in {"spsim": ours, "Calculon": calculon}.items():
        tp, sp = tool(False), tool(True)
        both = [f"{fw * 1e3:.2f} + {bw * 1e3:.2f} ms" for fw, bw in (tp, sp)]
        speed = rate(lambda flags, tool=tool: [tool(flag) for flag in flags], [False, True] * 20)
        made.add_row(name, *both, f"{100 * (1 - sp[0] / tp[0]):+.1f} %", f"{speed:,.0f}")
    made.caption = "measured (Korthikanti et al. 2022, Table 4): 7.7 + 11.9 ms, 7.2 + 11.8 ms, SP gains 6.5 % forward"
    return made


def peer_step_table(path: Path) -> Table:
    """Both on the steps of Korthikanti et al. 2022, Table 5; plans, models and profile known, as in a search."""
    from calculon.llm.llm import Llm
    from calculon.system import System

    system = System(json.loads((path / "systems" / "a100_80e.json").read_text()))
    logger = logging.getLogger("peer")

    def calculon(case: tuple[Any, Any]) -> float:
        model = Llm(case[0], logger)
        model.compile(system, case[1])
        model.run(system)
        return float(model.get_stats_json(False)["total_time"])

    columns = ["step", "measured", "spsim", "Calculon", "CPU, step time", "and memory", "CPU, Calculon", "of spsim's"]
    made = report.table("Steps of Table 5 on A100", columns, numbers=columns[1:])
    own = [case for case in load_cases() if case.family == "kort22_t5"]
    totals = [0.0, 0.0, 0.0]
    for case, (model, recompute) in zip(own, product(PEER_MODELS, ("full", "seqsel")), strict=True):
        execution = path / "validation" / "seqsel" / "tab5" / f"{model}_{recompute}.json"
        peer = (
            Llm.Application(json.loads((path / "models" / f"{model}.json").read_text())),
            Llm.Execution.from_json(json.loads(execution.read_text())),
        )
        scenario = case.scenario()
        times = [
            cpu_seconds(lambda one=scenario: spsim.simulate(one).step_time_s),
            cpu_seconds(lambda one=scenario: _time_and_memory(one)),
            cpu_seconds(lambda one=peer: calculon(one)),
        ]
        totals = [total + time for total, time in zip(totals, times, strict=True)]
        predicted = (spsim.simulate(scenario).step_time_s, calculon(peer))
        made.add_row(
            f"{model}, {recompute}", *(f"{time:.2f} s" for time in (case.measured, *predicted)),
            *(f"{1e3 * time:.2f} ms" for time in times), f"{times[2] / times[0]:.1f} ×",
        )  # fmt: skip
    made.add_row("all", "", "", "", *(f"{1e3 * time:.2f} ms" for time in totals), f"{totals[2] / totals[0]:.1f} ×")
    return made


def _time_and_memory(scenario: spsim.Scenario) -> tuple[float, float]:
    result = spsim.simulate(scenario)
    return result.step_time_s, result.peak_memory_gib


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="checkout of Calculon")
    arguments = parser.parse_args()
    console = Console(width=140)
    calculon = peer_layer(arguments.peer) if arguments.peer else None
    tables = (engine_table(), sweep_table(), scaling_table(), grid_table(calculon), step_table())
    for made in (*tables, startup_table(arguments.peer)):
        console.print(made)
    if calculon:
        console.print(peer_table(calculon))
        console.print(peer_step_table(arguments.peer))


if __name__ == "__main__":
    main()
