"""DeepSpeed's Ulysses: its `DistributedAttention`, and the attention that it gives to transformers models (ALST)."""

from __future__ import annotations

from importlib import import_module

import deepspeed
import deepspeed.runtime.sequence_parallel.parallel_state_sp as sequence_groups
import torch
from cases import Case
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from subject import Subject
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layers.attention import local_qkv
from layers.transformers import configuration, layer_input

# Its kernels for ranks that share memory would be compiled, and are not asked for.
import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def build(case: Case) -> Subject:
    """A layer of a transformers model, or attention alone."""
    deepspeed.init_distributed("gloo", verbose=False)
    sequence_groups._release_sequence_parallel_groups()
    return _transformers_layer(case) if case.part == "layer" else _attention(case)


def _transformers_layer(case: Case) -> Subject:
    ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward  # without what a case before has put there
    model = LlamaModel(configuration(case)).bfloat16()
    length, batch, _ = case.shape
    UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", case.ranks, batch, length, False)
    if case.degrees.get("recompute") == "full":
        model.gradient_checkpointing_enable()
    layer = model.layers[0].train()
    rank = torch.distributed.get_rank()
    local = length // case.ranks
    x, positions = layer_input(case, local, first=rank * local)
    rotary = model.rotary_emb(x, positions)
    return Subject(layer, lambda: layer(x, position_ids=positions, position_embeddings=rotary), shared=rotary)


def _attention(case: Case) -> Subject:
    sequence_groups.initialize_sequence_parallel(case.ranks)
    groups.mpu = sequence_groups
    attention = DistributedAttention(_CoreAttention(), sequence_groups.get_sequence_parallel_group())
    q, k, v = local_qkv(case)
    return Subject(attention, lambda: attention(q, k, v, 1))


class _CoreAttention(nn.Module):
    """[s b heads d], as DeepSpeed hands it over with the batch in the second place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
        return out.permute(2, 0, 1, 3)
