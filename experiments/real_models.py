"""Do traced models of Hugging Face take the time and the memory that they took on an H100?

Five training steps of transformers models (eager, bf16, AdamW in bf16, `zero_grad(set_to_none=True)`), measured on one
H100 SXM with torch 2.11 and transformers 5.17: forward, backward, optimizer, the allocator's peak, and their kernels.
Each model is built from its configuration on the meta device, traced and simulated; of these rows only the optimizer's
time of one was fitted on (`h100-adamw-16-bit` of the profile).
Needs transformers (`pip install "spsim[models]"`) and half a minute; without it the measured rows stand alone.

The rows of the experiment itself are the same shapes as spsim's own layers, whose kernels are fused as in Megatron-Core
or eager as in transformers: what eager kernels cost is the difference.

    python -m spsim experiments/real_models.py [--out results] [--quick]
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

import spsim
from spsim import report
from spsim.pytorch.kineto.names import operator_class
from spsim.pytorch.modules.timing import TracedResult

DATA = Path(__file__).parent / "data"
HARDWARE = "dgx-h100"
MISSING = 'transformers is not installed, nothing is traced; install "spsim[models]"'
CLASSES = {"gemm": "products", "attention": "attention", "other": "memory-bound"}
GPT, LLAMA = {"family": "gpt2"}, {"family": "llama", "vocab_size": 128256, "rope_theta": 5e5}
CONFIGURATIONS: Mapping[str, Mapping[str, Any]] = {
    "llama-3.2-1b": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    "llama-3-8b-6layers": {
        **LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 6, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "gpt2-xl": {**GPT, "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "mistral-7b-6layers": {
        "family": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 6,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": None,
    },
}  # fmt: skip
"""As the measured models were made; what is not named is transformers' default."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Simulated:
    """A traced model beside its measured row."""

    row: Row
    result: TracedResult

    @property
    def pairs(self) -> dict[str, tuple[float, float]]:
        """What is compared: (measured, simulated)."""
        return {
            "forward, ms": (self.row["forward_ms"], 1e3 * self.result.forward_s),
            "backward, ms": (self.row["backward_ms"], 1e3 * self.result.backward_s),
            "optimizer, ms": (self.row["optimizer_ms"], 1e3 * self.result.optimizer_s),
            "step, ms": (self.row["step_ms"], 1e3 * self.result.step_time_s),
            "peak, GiB": (self.row["peak_allocated_gib"], self.result.peak_memory_gib),
            "reserved, GiB": (self.row["peak_reserved_gib"], self.result.peak_reserved_gib),
        }


def measured() -> list[Row]:
    """The measured steps."""
    frame = pd.read_csv(DATA / "h100_models.csv")
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def label(row: Row) -> str:
    """Model and shape, for people."""
    checkpoints = ", checkpoints" if row["checkpointing"] else ""
    return f"{row['model']}, {row['micro_batch']} × {row['seq_len']}{checkpoints}"


def hugging_face_model(row: Row) -> Any:
    """The model of a measured row on the meta device, in bf16."""
    import torch
    import transformers

    settings = dict(CONFIGURATIONS[row["model"]])
    made = transformers.AutoConfig.for_model(
        settings.pop("family"), use_cache=False, attn_implementation="sdpa", **settings
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(made).to(torch.bfloat16).train()
    if row["checkpointing"]:
        model.gradient_checkpointing_enable()
    return model


def simulated(row: Row) -> Simulated:
    """Trace and simulate one model."""
    import torch

    model = hugging_face_model(row)
    ids = torch.zeros(row["micro_batch"], row["seq_len"], dtype=torch.long, device="meta")
    # Whether a sequence is packed from several is read off its positions, which a trace does not have: it is one.
    with patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None):
        traced = spsim.trace_module(model, {"input_ids": ids, "labels": ids})
    return Simulated(row, traced.simulate(HARDWARE))


@cache
def all_simulated() -> tuple[Simulated, ...]:
    """Every measured row; none where transformers is missing."""
    found = find_spec("transformers") is not None and find_spec("torch") is not None
    return tuple(simulated(row) for row in measured()) if found else ()


def kernel_times(row: Row) -> Counter[str]:
    """Measured ms of one step by class of kernel."""
    frame = pd.read_csv(DATA / "h100_model_kernels.csv")
    keys = ["model", "micro_batch", "seq_len", "checkpointing"]
    own = frame[(frame[keys] == [row[key] for key in keys]).all(axis=1)]
    times: Counter[str] = Counter()
    for name, time in zip(own["kernel"], own["total_ms"], strict=True):
        times[group(operator_class(name))] += time
    return times


def simulated_times(result: TracedResult) -> Counter[str]:
    """The same, simulated."""
    times: Counter[str] = Counter()
    for entry in result.operators.to_dict("records"):
        times[group(entry["operator_class"])] += entry["time_ms"]
    return times


def group(kernel_class: str) -> str:
    """Products, attention, or what takes the time of its memory traffic."""
    return CLASSES.get(kernel_class, CLASSES["other"])


def points() -> Iterator[spsim.Point]:
    """The same shapes as spsim's own layers, of two libraries."""
    for row in measured():
        settings = dict(CONFIGURATIONS[row["model"]])
        gpt = settings["family"] == "gpt2"
        model = spsim.Model(
            name=row["model"],
            layers=settings["n_layer" if gpt else "num_hidden_layers"],
            hidden=settings["n_embd" if gpt else "hidden_size"],
            heads=settings["n_head" if gpt else "num_attention_heads"],
            vocab=50257 if gpt else settings["vocab_size"],
            **({} if gpt else llama_shape(settings)),
        )
        workload = spsim.Workload(seq_len=row["seq_len"], micro_batch=row["micro_batch"])
        for library in ("megatron-core", "transformers"):
            plan = {"library": library, "recompute": "full" if row["checkpointing"] else "none"}
            scenario = {"hardware": HARDWARE, "model": model, "plan": plan, "workload": workload}
            yield spsim.Point(scenario, {"measured": label(row)})


def llama_shape(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a Llama from a GPT."""
    return {
        "kv_heads": settings["num_key_value_heads"], "head_dim": settings.get("head_dim", 128),
        "ffn_hidden": settings["intermediate_size"], "gated_mlp": True,
    }  # fmt: skip


def figures(frame: pd.DataFrame) -> Mapping[str, Figure]:
    """Measured and simulated bars of each quantity, and the time by class of kernel."""
    found = all_simulated()
    if not found:
        return {}
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, name in zip(panels.flat, ("step, ms", "backward, ms", "peak, GiB"), strict=False):
        bars(axes, name, [label(one.row) for one in found], *zip(*(one.pairs[name] for one in found), strict=True))
    classes(panels[1][1], found)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.suptitle("transformers models on one H100: measured, and traced and simulated")
    return {"real_models.png": figure}


def bars(axes: Axes, title: str, names: list[str], measurements: tuple[float, ...], found: tuple[float, ...]) -> None:
    """Two bars a model, with the error."""
    places = range(len(names))
    axes.barh([p - 0.2 for p in places], measurements, 0.36, color="#BBBBBB", label="measured")
    axes.barh([p + 0.2 for p in places], found, 0.36, color="#4477AA", label="simulated")
    for place, (true, guess) in enumerate(zip(measurements, found, strict=True)):
        axes.annotate(f" {100 * (guess / true - 1):+.1f} %", (max(true, guess), place), va="center", fontsize=8)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_title(title, loc="left")


def classes(axes: Axes, found: tuple[Simulated, ...]) -> None:
    """Stacked bars of kernel time, measured above simulated."""
    colours = dict(zip(CLASSES.values(), ("#4477AA", "#EE6677", "#CCBB44"), strict=True))
    for place, one in enumerate(found):
        for offset, times in ((-0.2, kernel_times(one.row)), (0.2, simulated_times(one.result))):
            left = 0.0
            for name, colour in colours.items():
                axes.barh(
                    place + offset, times[name], 0.36, left, color=colour, alpha=1 if offset > 0 else 0.55,
                    label=name if not place and offset > 0 else None,
                )  # fmt: skip
                left += times[name]
    axes.set_yticks(range(len(found)), [label(one.row) for one in found], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("kernels of a step, ms (measured: pale)", loc="left")
    axes.legend(fontsize=8)


def tables(frame: pd.DataFrame) -> Iterator[Table | str]:
    """Measured against simulated, then by class of kernel."""
    found = all_simulated()
    if not found:
        yield MISSING
        return
    names = list(found[0].pairs)
    made = report.table("Traced models on one H100: measured, simulated, error", ["model", *names], numbers=names)
    for one in found:
        cells = (f"{a:.1f}, {b:.1f}, {100 * (b / a - 1):+.1f} %" for a, b in one.pairs.values())
        made.add_row(label(one.row), *cells)
    yield made
    by_class = report.table(
        "Kernels of a step, ms: measured, simulated", ["model", *CLASSES.values()], numbers=[*CLASSES.values()]
    )
    for one in found:
        true, guess = kernel_times(one.row), simulated_times(one.result)
        by_class.add_row(label(one.row), *(f"{true[name]:.1f}, {guess[name]:.1f}" for name in CLASSES.values()))
    yield by_class


def build() -> spsim.Experiment:
    """The experiment; nothing runs before it is asked for."""
    every = tuple(points())
    return spsim.Experiment(
        name="real_models",
        title="Hugging Face models, traced and simulated, beside an H100",
        points=every,
        quick=every,
        figures=figures,
        tables=tables,
    )
