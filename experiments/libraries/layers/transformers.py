"""Hugging Face transformers: a Llama whose layers are cut by `tp_plan="auto"`."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from cases import Case
from subject import Subject
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def configuration(case: Case) -> LlamaConfig:
    """Of the model of a case."""
    model = case.model
    return LlamaConfig(
        hidden_size=model["hidden"],
        intermediate_size=model["ffn_hidden"],
        num_hidden_layers=1,
        num_attention_heads=model["heads"],
        num_key_value_heads=model["kv_heads"],
        vocab_size=model["vocab"],
        attn_implementation="sdpa",
    )


def layer_input(case: Case, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Hidden states [b length h] in bf16, and the positions of its tokens from `first` on."""
    _, batch, hidden = case.shape
    x = torch.randn(batch, length, hidden, dtype=torch.bfloat16, requires_grad=True)
    return x, torch.arange(first, first + length).expand(batch, length).contiguous()


def build(case: Case) -> Subject:
    """A layer, or the whole model with its loss; a plan is applied as weights are read, so they are written first."""
    model = _loaded(case)
    if case.degrees.get("recompute") == "full":
        model.gradient_checkpointing_enable()
    model.train()
    length, batch, _ = case.shape
    if case.part == "model":
        ids = torch.randint(case.model["vocab"], (batch, length))
        return Subject(model, lambda: model(ids, labels=ids, use_cache=False).loss)
    x, positions = layer_input(case, length)
    rotary, layer = model.model.rotary_emb(x, positions), model.model.layers[0]
    return Subject(layer, lambda: layer(x, position_ids=positions, position_embeddings=rotary), shared=rotary)


def _loaded(case: Case) -> LlamaForCausalLM:
    folder: list[str | None] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    if dist.get_rank() == 0:
        LlamaForCausalLM(configuration(case)).bfloat16().save_pretrained(folder[0])
    dist.broadcast_object_list(folder)
    return LlamaForCausalLM.from_pretrained(folder[0], tp_plan="auto", dtype=torch.bfloat16)
