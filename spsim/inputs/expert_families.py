"""Keys of a config.json of models with experts, beside those of the dense families that they are otherwise like."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from spsim.inputs.families import FAMILIES, Count, Family, Mistral, Qwen3


class _Mixtral(Mistral):
    """Every layer has experts of the width of a dense MLP (Jiang et al. 2024, arXiv:2401.04088)."""

    num_local_experts: Count = 8
    num_experts_per_tok: Count = 2

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        routed = {"experts": self.num_local_experts, "experts_per_token": self.num_experts_per_tok}
        return {**super().fields(), **routed}


class _Qwen3Moe(Qwen3):
    """Experts in every layer but the first few (Qwen Team 2025, arXiv:2505.09388)."""

    num_experts: Count = 128
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 768
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[int] | None = None

    @model_validator(mode="after")
    def _check_dense_layers(self) -> Self:
        dense = self.mlp_only_layers or []
        if self.decoder_sparse_step > 1 or sorted(dense) != list(range(len(dense))):
            raise ValueError("dense layers among those of experts are not simulated yet; only the first may be dense")
        return self

    def fields(self) -> dict[str, Any]:
        """Fields of `Model`."""
        return {
            **super().fields(), "experts": self.num_experts, "experts_per_token": self.num_experts_per_tok,
            "expert_ffn_hidden": self.moe_intermediate_size, "dense_layers": len(self.mlp_only_layers or []),
        }  # fmt: skip


OF_EXPERTS: dict[str, type[Family]] = {"mixtral": _Mixtral, "qwen3_moe": _Qwen3Moe}
"""By `model_type`."""
EVERY_FAMILY: dict[str, type[Family]] = {**FAMILIES, **OF_EXPERTS}
