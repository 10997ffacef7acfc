"""Megatron-Core: its transformer block of one layer and its GPT model, of its own layers (not Transformer Engine's)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import Case
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import _allreduce_non_tensor_model_parallel_grads
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from subject import Subject
from torch import Tensor, nn
from torch.nn import functional

# Megatron asks CUDA for the device of its buffers and for random states; of both the CPU has its own.
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()


def build(case: Case) -> Subject:
    """With the groups of Megatron's `parallel_state`, made for this case."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case.degrees["tp"])
    model_parallel_cuda_manual_seed(0)
    config = _config(case)
    mask = torch.ones(case.shape[0], case.shape[0], dtype=torch.bool).triu(1)[None, None]
    root, loss = (_whole_model if case.part == "model" else _block)(case, config, mask)
    return Subject(root, loss, lambda: _finalize(root, config), [mask])


def _config(case: Case) -> TransformerConfig:
    """Megatron's words for the model and the plan; what the case's options say comes last."""
    model, plan = case.model, case.degrees
    gated = {
        "gated_linear_unit": True,
        "activation_func": functional.silu,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
    }
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    }[plan.get("recompute", "none")]
    given = {
        "num_layers": 1,
        "hidden_size": model["hidden"],
        "num_attention_heads": model["heads"],
        "num_query_groups": model.get("kv_heads", model["heads"]),
        "ffn_hidden_size": model["ffn_hidden"],
        "tensor_model_parallel_size": plan["tp"],
        "sequence_parallel": plan.get("sequence_parallel", False),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "use_cpu_initialization": True,
        "bias_activation_fusion": True,
        "normalization": "RMSNorm" if model.get("gated_mlp") else "LayerNorm",
        **(gated if model.get("gated_mlp") else {}),
        **recompute,
        **case.options,
    }
    return TransformerConfig(**given)


class Norm:
    """In the place of apex's norms, which need CUDA: torch's, whose gradients are marked to be summed as theirs are."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:
        norm = (nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm)(hidden_size, eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _layers(config: TransformerConfig) -> TransformerBlockSubmodules:
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = Norm
    return TransformerBlockSubmodules([spec], Norm)


def _block(case: Case, config: TransformerConfig, mask: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    length, batch, hidden = case.shape
    block = TransformerBlock(config, _layers(config), post_layer_norm=False).bfloat16()
    local = length // (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    x = torch.randn(local, batch, hidden, dtype=torch.bfloat16, requires_grad=True)
    rotary = RotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=True)(length) if _is_rotary(case) else None
    return block, lambda: block(x, mask, rotary_pos_emb=rotary)


def _whole_model(case: Case, config: TransformerConfig, mask: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    length, batch, _ = case.shape
    model = GPTModel(
        config,
        _layers(config),
        case.model["vocab"],
        length,
        position_embedding_type="rope" if _is_rotary(case) else "learned_absolute",
        share_embeddings_and_output_weights=not _is_rotary(case),
    ).bfloat16()
    ids = torch.randint(case.model["vocab"], (batch, length))
    positions = torch.arange(length).expand(batch, length)
    return model, lambda: model(ids, positions, mask, labels=ids)


def _is_rotary(case: Case) -> bool:
    return case.model.get("gated_mlp", False)


def _finalize(root: nn.Module, config: TransformerConfig) -> None:
    """What `finalize_model_grads` sends within the tensor-parallel group, gradients in fp32 as Megatron keeps them."""
    for parameter in root.parameters():
        parameter.main_grad = parameter.grad.float()
    root.ddp_config = DistributedDataParallelConfig()
    _allreduce_non_tensor_model_parallel_grads([root], config)
