"""Tables of the shipped profiles and models."""

from __future__ import annotations

from rich.table import Table

from spsim.inputs.model import PRESETS
from spsim.inputs.profiles import load_profile, profile_names
from spsim.report.table import table
from spsim.units import GIB, MIB


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
