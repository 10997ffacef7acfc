"""Arguments of Megatron-LM for windows of attention, and for sinks, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spsim.inputs.launch.draft import Draft
from spsim.inputs.launch.megatron.patterns import layers_of, list_of
from spsim.inputs.launch.options import Options

if TYPE_CHECKING:
    from spsim.inputs.model import Model

FULL, SLIDING = "full_attention", "sliding_attention"


def read_windows(options: Options, draft: Draft) -> None:
    """Keys that a query looks back at, in which layers; of every n layers the last has no window."""
    model = draft.model
    if options.choice("softmax_type", {"vanilla": False, "off-by-one": False, "learnable": True}, False):
        model["attention_sinks"] = True
    if "window_size" not in options:
        options.ignore("window_attn_skip_freq")
        return
    model["sliding_window"] = _window(options)
    name = "window_attn_skip_freq"
    windowed = layers_of(options, name, model.get("layers"), lambda layer, every: (layer + 1) % every != 0)
    if not all(windowed):
        model["layer_types"] = [SLIDING if own else FULL for own in windowed]


def _window(options: Options) -> int:
    """Keys that a query looks back at, itself included, of `left,right`."""
    parts = str(options.take("window_size")).strip("()").replace(" ", "").split(",")
    if len(parts) != 2 or not parts[0].isdecimal() or parts[1] not in ("0", "-1"):
        raise options.wrong("window_size", "keys to the left and 0, as 4095,0")
    return int(parts[0]) + 1


def window_arguments(model: Model) -> dict[str, Any]:
    """Names and values."""
    turns, window = model.layer_types, model.sliding_window
    skipped: int | str | None = None
    if turns is not None:
        last = turns.index(FULL) == len(turns) - 1
        skipped = len(turns) if last else list_of([not model.type_of(layer).full for layer in range(model.layers)])
    return {
        "window_size": None if window is None else f"{window - 1},0",
        "window_attn_skip_freq": skipped,
        "softmax_type": "learnable" if model.attention_sinks else None,
    }
