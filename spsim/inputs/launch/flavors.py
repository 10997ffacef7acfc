"""Models of torchtitan 0.2.2 by name and flavor (`torchtitan/models/*/__init__.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FLAVORS: Mapping[tuple[str, str], str] = {
    ("llama3", "8B"): "llama-3-8b", ("llama3", "70B"): "llama-3-70b", ("llama3", "405B"): "llama-3-405b",
    ("qwen3", "8B"): "qwen3-8b", ("qwen3", "30B-A3B"): "qwen3-30b-a3b", ("qwen3", "235B-A22B"): "qwen3-235b-a22b",
}  # fmt: skip
"""Name and flavor -> preset of the same sizes."""
_QWEN3 = {
    "kv_heads": 8, "head_dim": 128, "vocab": 151936, "gated_mlp": True, "qk_norm": True
}  # fmt: skip
SIZES: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("llama3", "debugmodel"): {
        "layers": 6, "hidden": 256, "ffn_hidden": 768, "heads": 16, "vocab": 2048, "gated_mlp": True
    },
    **{
        ("qwen3", flavor): {
            **_QWEN3, "layers": layers, "hidden": hidden, "ffn_hidden": ffn_hidden, "heads": heads,
            "tied_embeddings": tied,
        }
        for flavor, layers, hidden, ffn_hidden, heads, tied in (
            ("0.6B", 28, 1024, 3072, 16, True), ("1.7B", 28, 2048, 6144, 16, True), ("4B", 36, 2560, 9728, 32, True),
            ("14B", 40, 5120, 17408, 40, False), ("32B", 64, 5120, 25600, 64, False),
        )
    },
}  # fmt: skip
"""Those without a preset."""
