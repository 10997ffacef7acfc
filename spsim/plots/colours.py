"""The colours of all pictures and of the pages of `report`, without matplotlib: hexadecimal, as `#4477AA`.

They are "bright" of Paul Tol's schemes (SRON/EPS/TN/09-002, 2021), then some of "muted": distinct under any colour
blindness.
"""

from __future__ import annotations

from spsim.results.accounts import IDLE, PEERS, RECOMPUTATION, SLOWED, STAGES, SYNC

COLOURS = {
    "gemm": "#4477AA",
    "attention": "#AA3377",
    "norm": "#228833",
    "softmax": "#CCBB44",
    "dropout": "#66CCEE",
    "elementwise": "#BBBBBB",
    "cast": "#332288",
    "embedding": "#999933",
    "cross_entropy": "#882255",
    "optimizer": "#44AA99",
    "communication": "#EE6677",
    "copy": "#DDAA33",
    "other": "#777777",
}
"""By operator class; `other` is a measured kernel whose name says nothing."""
WAITING = "#FADADD"
OTHER = "#F0F0F0"
GRID = "#E5E5E5"
MUTED = "#666666"
SERIES = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#333333", "#BBBBBB")
WAITS = {PEERS: WAITING, STAGES: "#FBEBC8"}
"""Of what is waited for."""
PARTS = {**COLOURS, RECOMPUTATION: "#777777", SLOWED: "#F7B6BD", SYNC: "#DDAA33", **WAITS, IDLE: OTHER}
"""Of the parts of an account of time."""
CATEGORIES = {
    "weights": "#4477AA",
    "KV cache": "#44AA99",
    "gradients": "#66CCEE",
    "optimizer": "#BBBBBB",
    "activations": "#CCBB44",
    "communication buffers": "#EE6677",
    "temporary": "#AA3377",
}
"""Of memory by what it holds."""


def ink_on(colour: str) -> str:
    """Black or white, whichever reads better on a colour (relative luminance of BT.709)."""
    red, green, blue = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5 else "black"
