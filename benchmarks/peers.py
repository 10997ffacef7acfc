"""How many whole steps a second of CPU time do spsim and its peers evaluate? One process, the same configurations.

    python benchmarks/peers.py [--calculon PATH] [--simumax PATH] [--llm-analysis PATH]

The space is one that a search would go through: GPT-3 175B on 64 GPUs of A100, tp with sequence parallelism, all
pipelines and replicas that fit, chunks, micro-batches, recomputation and batches. spsim gets it as points of `sweep`,
whose plans are all new to it: times, memory and metrics of each. Peers are called as their own documentation has it,
and know model, system and configuration as objects beforehand. A peer is a checkout, or what is installed; one that is
not there is left out. What a peer refuses, as too large for memory, counts as evaluated.

- Calculon (github.com/calculon-ai/calculon): closed formulas of one stage.
- SimuMax (github.com/MooreThreads/SimuMax): every layer as an object; without contexts of its own for each evaluation
  it slows down, so that it gets new ones; without recomputation, which it tells apart in another way.
- llm-analysis (PyPI): FLOPs and bytes at an efficiency that is given.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

from rich.console import Console

import spsim
from spsim.report.table import table

GPUS, LAYERS, SEQ_LEN = 64, 96, 2048
BATCHES = (64, 128, 256, 512, 1024, 2048)
MICRO_BATCHES, CHUNKS = (1, 2, 4, 8), range(1, 9)
"""As many as a search for a plan has."""


class Configuration(NamedTuple):
    """One step."""

    tp: int
    pp: int
    chunks: int
    dp: int
    micro_batch: int
    batch: int
    recompute: str
    sharded: bool
    """The optimizer's state."""

    def point(self) -> dict[str, Any]:
        """As spsim is told of it."""
        options = {
            "tp": self.tp, "sequence_parallel": self.tp > 1, "pp": self.pp, "virtual_pp": self.chunks, "dp": self.dp,
            "recompute": self.recompute, "distributed_optimizer": self.sharded,
        }  # fmt: skip
        workload = {"seq_len": SEQ_LEN, "micro_batch": self.micro_batch, "global_batch": self.batch}
        return {"hardware": "dgx-a100-80gb", "model": "gpt-175b", "plan": options, "workload": workload}


def space() -> Iterator[Configuration]:
    """All that the degrees divide; interleaved schedules need as many micro-batches as stages."""
    recomputed = ("none", "selective", "full")
    for tp, pp, chunks in product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32), CHUNKS):
        if GPUS % (tp * pp) or LAYERS % (pp * chunks) or (chunks > 1 and pp == 1):
            continue
        dp = GPUS // (tp * pp)
        for micro_batch, batch, recompute in product(MICRO_BATCHES, BATCHES, recomputed):
            number, rest = divmod(batch, dp * micro_batch)
            if rest or (chunks > 1 and number % pp):
                continue
            for sharded in (False, True) if dp > 1 else (False,):
                yield Configuration(tp, pp, chunks, dp, micro_batch, batch, recompute, sharded)


Evaluate = Callable[[Configuration], object]


def calculon(path: Path | None) -> Evaluate:
    """Its model is compiled and run, and its statistics are read."""
    _find(path)
    from calculon.llm.llm import Llm
    from calculon.system import System

    root = path or Path(importlib.import_module("calculon").__file__ or "").parents[1]
    application = Llm.Application(json.loads((root / "models" / "gpt3-175B.json").read_text()))
    system = System(json.loads((root / "systems" / "a100_80e.json").read_text()))
    example = json.loads((root / "examples" / "3072_t4_p64_d12_mbs4_full.json").read_text())
    logger = logging.getLogger("calculon")

    def evaluate(own: Configuration) -> object:
        recompute = {"selective": "attn_only"}.get(own.recompute, own.recompute)
        settings = example | {
            "num_procs": GPUS, "tensor_par": own.tp, "pipeline_par": own.pp, "data_par": own.dp,
            "batch_size": own.batch, "microbatch_size": own.micro_batch, "activation_recompute": recompute,
            "pipeline_interleaving": own.chunks, "optimizer_sharding": own.sharded,
            "tensor_par_comm_type": "rs_ag" if own.tp > 1 and recompute != "full" else "ar",
        }  # fmt: skip
        model = Llm(application, logger)
        with contextlib.suppress(Llm.Error):  # it refuses what does not fit
            model.compile(system, Llm.Execution.from_json(settings))
            model.run(system)
            return model.get_stats_json(False)["total_time"]
        return None

    return evaluate


def simumax(path: Path | None) -> Evaluate:
    """A step is estimated, its memory and its cost analysed."""
    _find(path)
    from simumax.core.config import ModelConfig, StrategyConfig, SystemConfig
    from simumax.core.perf_llm import PerfLLM

    root = path or Path(importlib.import_module("simumax").__file__ or "").parents[1]
    model = json.loads((root / "configs" / "models" / "llama3-8b.json").read_text()) | {
        "model_name": "gpt3", "hidden_size": 12288, "head_num": 96, "kv_head_num": 96, "intermediate_size": 49152,
        "layer_num": LAYERS, "vocab_size": 51200, "use_swiglu": False,
    }  # fmt: skip
    strategy = json.loads((root / "configs" / "strategy" / "tp1_pp2_dp4_mbs1.json").read_text())
    system = json.loads((root / "configs" / "system" / "a100_pcie.json").read_text())

    def evaluate(own: Configuration) -> object:
        settings = strategy | {
            "seq_len": SEQ_LEN, "micro_batch_size": own.micro_batch, "world_size": GPUS, "tp_size": own.tp,
            "micro_batch_num": own.batch // (own.dp * own.micro_batch), "pp_size": own.pp,
            "interleaving_size": own.chunks, "zero_state": int(own.sharded), "enable_recompute": False,
            "pp_comm_async": False,
        }  # fmt: skip
        made = PerfLLM()
        quiet = contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore")
        with quiet[0], quiet[1], contextlib.suppress(AssertionError, RuntimeError):  # two stages interleaved
            made.configure(
                strategy_config=StrategyConfig.init_from_dict(settings),
                model_config=ModelConfig.init_from_dict(model),
                system_config=SystemConfig.init_from_dict(system),
            )
            made.run_estimate()
            return made.analysis_mem(), made.analysis_cost()

    return evaluate


def llm_analysis(path: Path | None) -> Evaluate:
    """`training`, at half of the peak."""
    _find(path)
    analysis = importlib.import_module("llm_analysis.analysis")
    config = importlib.import_module("llm_analysis.config")
    logging.getLogger("llm_analysis").setLevel(logging.CRITICAL)
    logging.disable(logging.WARNING)
    model = config.ModelConfig(
        name="gpt3", num_layers=LAYERS, n_head=96, hidden_dim=12288, vocab_size=51200, max_seq_len=SEQ_LEN,
        num_key_value_heads=96, ffn_embed_dim=49152, model_type="gpt2",
    )  # fmt: skip
    gpu = config.get_gpu_config_by_name("a100-sxm-80gb")
    dtype = config.get_dtype_config_by_name("w16a16e16")
    recomputed = {"none": 0, "selective": 1, "full": 2}

    def evaluate(own: Configuration) -> object:
        degrees = config.ParallelismConfig(tp_size=own.tp, pp_size=own.pp, dp_size=own.dp, sp_size=own.tp)
        made = analysis.LLMAnalysis(model, gpu, dtype, degrees, flops_efficiency=0.5)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(AssertionError):  # of what does not fit
            return made.training(
                batch_size_per_gpu=own.micro_batch, global_batch_size=own.batch, seq_len=SEQ_LEN,
                activation_recomputation=analysis.ActivationRecomputation(recomputed[own.recompute]),
                ds_zero=analysis.DSZeRO(int(own.sharded)),
            )  # fmt: skip
        return None

    return evaluate


PEERS: Mapping[str, tuple[Callable[[Path | None], Evaluate], int]] = {
    "calculon": (calculon, 300), "simumax": (simumax, 6), "llm-analysis": (llm_analysis, 300),
}  # fmt: skip
"""How each is made ready, and of how many configurations at most its rate is taken."""


def _find(path: Path | None) -> None:
    if path is not None:
        sys.path.insert(0, str(path))


def rate_of_spsim(own: Sequence[Configuration]) -> tuple[float, int]:
    """Steps per second of CPU time, all plans new, and how many were refused."""
    points = [one.point() for one in own]
    spsim.sweep([{**points[0], "model": "gpt-22b"}, {**points[1], "model": "gpt-22b"}])  # imports
    start = process_time()
    found = spsim.sweep(points)
    return len(own) / (process_time() - start), int((found["error"] != "").sum())


def rate_of(evaluate: Evaluate, own: Sequence[Configuration]) -> float:
    """Steps per second of CPU time."""
    evaluate(own[0])
    start = process_time()
    for one in own:
        evaluate(one)
    return len(own) / (process_time() - start)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in PEERS:
        parser.add_argument(f"--{name}", type=Path, help=f"checkout of {name}; what is installed unless given")
    paths = vars(parser.parse_args())
    own = list(space())
    columns = ["tool", "configurations", "a CPU second", "spsim is"]
    made = table("Whole steps of GPT-3 175B on 64 A100, one process", columns, numbers=columns[1:])
    rate, refused = rate_of_spsim(own)
    made.add_row("spsim, every plan new", f"{len(own):,}", f"{rate:,.0f}", "")
    again, _ = rate_of_spsim(own)
    made.add_row("spsim, again", f"{len(own):,}", f"{again:,.0f}", "")
    print(f"spsim refused {refused} of them")
    for name, (prepare, number) in PEERS.items():
        try:
            evaluate = prepare(paths[name.replace("-", "_")])
            some = own[:: -(-len(own) // number)]
            other = rate_of(evaluate, some)
        except (ImportError, OSError) as error:
            print(f"{name} is left out: {error}")
            continue
        made.add_row(name, f"{len(some):,}", f"{other:,.0f}", f"{rate / other:.1f} × as fast")
    Console(width=120).print(made)


if __name__ == "__main__":
    main()
