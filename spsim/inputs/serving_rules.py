"""The rules of inference: what of a plan it has, and what cuts the tokens that pass; each error names the fix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from spsim.errors import InputError
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.workload import Workload

OF_TRAINING = frozenset({
    "distributed_optimizer", "zero", "dp_library", "shard_group", "fsdp_ends", "bucket_elements", "grad_dtype",
    "moment_dtype", "precision_aware_optimizer", "loss_fusion", "loss_parallel", "recompute", "recompute_layers",
    "recompute_method", "recompute_modules", "recompute_early_stop", "recompute_reentrant", "cpu_offload_layers",
    "dp_overlap", "tp_backward_overlap", "keep_gathered", "input_gradients", "norm_gradients", "ulysses_gradients",
    "ring_gradients", "pp_schedule", "pp_group", "pp_layout", "pp_sends", "pp_overlap", "pp_warmup_flush",
    "pp_deallocate", "virtual_pp",
})  # fmt: skip
"""Options of a plan that concern gradients, the optimizer, or what is kept for a backward pass."""
NOT_YET = ("pp", "tp_overlap", "fp8_dot_product_attention", "fp8_output_proj")
"""Options that inference may have, and that are not simulated of it."""
OF_INFERENCE = ("chunk_tokens", "kv_cache_dtype", "kv_block_tokens")
"""Of a workload."""


def served(plan: Plan) -> Plan:
    """As inference has it: K and V of fewer heads than ranks are replicated, as vLLM, SGLang and TensorRT-LLM do."""
    return plan.model_copy(update={"few_kv_heads": "replicate"}) if plan.few_kv_heads == "gather" else plan


def check_serving(model: Model, plan: Plan, workload: Workload) -> None:
    """The rules of a workload's phase; `InputError` names the first broken."""
    if workload.phase == "training":
        _check_training(plan, workload)
        return
    for check in (_check_options, _check_one_batch, _check_ring, _check_chunks, _check_one_token, _check_model):
        check(model, plan, workload)


def _phase(workload: Workload) -> str:
    return f"with phase {workload.phase!r}"


def _refused(owner: str, text: str) -> InputError:
    return InputError(f"{owner}: {text}")


def _check_training(plan: Plan, workload: Workload) -> None:
    differing = workload.differing
    for name in (name for name in OF_INFERENCE if name in differing):
        raise _refused(
            "workload", f"{name} = {getattr(workload, name)!r} is of inference; set phase = 'prefill' or leave it out"
        )
    if plan.ring_pass == "q":
        raise _refused("plan", "ring_pass = 'q' is of a prefill: gradients go round with K and V; leave it out")


def _check_options(model: Model, plan: Plan, workload: Workload) -> None:
    for name, value in plan.differing.items():
        if name in OF_TRAINING:
            raise _refused("plan", f"{_setting(name, value)} {_phase(workload)} is of training; leave it out")
        if name in NOT_YET:
            raise _refused("plan", f"{_setting(name, value)} {_phase(workload)}: not simulated yet; leave it out")


def _check_model(model: Model, plan: Plan, workload: Workload) -> None:
    where = _phase(workload)
    if model.experts is not None and workload.phase == "decode" and plan.ring > 1:
        raise _refused("plan", f"ring = {plan.ring} with experts {where}: not simulated yet; use tp, ulysses or dp")
    if model.experts is not None and plan.tp > 1 and plan.expert_tp != 1:
        raise _refused(
            "plan",
            f"tp = {plan.tp} with experts {where}: experts that ranks of tp share are summed behind the combination, "
            "which is not simulated yet; use expert_tp=1 with ep, or ulysses or ring",
        )
    window = model.sliding_window
    if window is not None and window < workload.seq_len and (plan.ring > 1 or workload.chunk_tokens):
        name = "chunk_tokens" if workload.chunk_tokens else f"ring = {plan.ring}"
        raise _refused(
            "plan",
            f"{name} {where} under sliding_window = {window} of the model, shorter than {workload.seq_len} tokens: not "
            "simulated yet; leave it out",
        )
    if model.kv_lora_rank is not None:
        _check_latents(model, plan, workload)
    if model.attention == "unfused":
        raise _refused("model", f"attention = 'unfused' {where}: a cache is read by fused kernels; use flash")
    if not model.causal:
        raise _refused("model", f"causal = false {where}: what is kept is for later tokens; use a causal model")


def _check_latents(model: Model, plan: Plan, workload: Workload) -> None:
    """A prompt that passes at once attends to keys and values, all else to latents, by kernels of their own."""
    for given, what in (
        (workload.phase == "decode", "phase 'decode'"),
        (workload.chunk_tokens is not None, "chunk_tokens"),
        (plan.ring_pass == "q" and plan.ring > 1, "ring_pass = 'q'"),
    ):
        if given:
            raise _refused(
                "model",
                f"kv_lora_rank = {model.kv_lora_rank} with {what}, which reads latents from the cache: not simulated "
                "yet; use a prefill at once, or another model",
            )


def _check_one_batch(model: Model, plan: Plan, workload: Workload) -> None:
    whole = workload.micro_batch * plan.dp
    if workload.global_batch not in (None, whole):
        raise _refused(
            "workload",
            f"global_batch = {workload.global_batch} {_phase(workload)}: sequences that are served together are "
            f"micro_batch x dp = {whole}; change these or leave it out",
        )


def _check_ring(model: Model, plan: Plan, workload: Workload) -> None:
    if plan.ring == 1 or workload.phase == "decode":
        return
    contiguous = plan.ring_cut == "contiguous"
    if plan.ring_pass == "q" and (plan.ring_kind != "p2p" or contiguous):
        name = "ring_cut = 'contiguous'" if contiguous else f"ring_kind = {plan.ring_kind!r}"
        raise _refused("plan", f"{name} with ring_pass = 'q', which sends Q round a zigzag ring; leave one of them out")
    if workload.chunk_tokens and contiguous:
        raise _refused("plan", "ring_cut = 'contiguous' with chunk_tokens: the last rank would do most; use zigzag")


def _check_chunks(model: Model, plan: Plan, workload: Workload) -> None:
    size = workload.chunk_tokens
    if size is None:
        return
    if workload.phase == "decode":
        raise _refused("workload", f"chunk_tokens = {size} with phase 'decode', of one token; leave it out")
    unit = prompt_unit(plan)
    for name, tokens in (("chunk_tokens", size), ("the last chunk", workload.passages[-1].tokens)):
        if tokens % unit:
            raise _refused(
                "workload",
                f"chunk_tokens = {size}: {name} of {tokens} tokens is not divisible by {unit}, the product of the "
                f"sequence shards (x 2 for a zigzag ring); use multiples of {unit}",
            )
    if len(workload.passages) > 1 and workload.passages[-1].tokens == 1:
        raise _refused(
            "workload",
            f"chunk_tokens = {size} leaves a last chunk of one token, which a kernel of decode would pass: not "
            "simulated yet; use another",
        )
    if len(workload.passages) > MAX_CHUNKS:
        raise _refused("workload", f"chunk_tokens = {size} makes over {MAX_CHUNKS} chunks; use a larger one")


MAX_CHUNKS = 4096
"""Of a prompt; each is simulated."""


def _check_one_token(model: Model, plan: Plan, workload: Workload) -> None:
    """What cuts the sequence in training cuts the batch here, or the cache."""
    if workload.phase != "decode":
        return
    over_tp = plan.tp if plan.sequence_parallel else 1
    cut, batch = batch_unit(plan, workload), workload.micro_batch
    if batch % cut:
        names = " x ".join(
            [*(["ulysses"] if plan.ulysses > 1 else []), *(["tp of sequence_parallel"] if over_tp > 1 else [])]
        )
        raise _refused(
            "plan",
            f"{plan.label} with phase 'decode': one new token has no sequence to shard, so that {names} = {cut} cuts "
            f"the batch, of which micro_batch = {batch} is no multiple; use tp without sequence_parallel for weights "
            f"and heads, ring for the cache, or a micro_batch of {-(-batch // cut) * cut}",
        )
    shards = plan.tp * plan.ring
    for name, size in (("heads", model.heads), ("ffn_hidden", model.ffn_hidden)) if plan.ring > 1 else ():
        if size % shards:
            raise _refused(
                "plan",
                f"tp x ring = {shards} with phase 'decode' cuts the weights, but does not divide {name} = {size}; "
                f"use a divisor, such as {math.gcd(size, shards)}",
            )
    if plan.ring > 1 and model.kv_heads % shards and shards % model.kv_heads:
        raise _refused(
            "plan",
            f"tp x ring = {shards} neither divides kv_heads = {model.kv_heads} nor is a multiple of it; use a divisor",
        )


def prompt_unit(plan: Plan) -> int:
    """What must divide the tokens that pass in a prefill."""
    shards = plan.ulysses * plan.ring * (plan.tp if plan.sequence_parallel else 1)
    return shards * (2 if plan.ring > 1 and plan.ring_cut == "zigzag" else 1)


def batch_unit(plan: Plan, workload: Workload) -> int:
    """Ranks of one replica that have different sequences of a batch."""
    over_tp = plan.tp if plan.sequence_parallel else 1
    return plan.ulysses * over_tp if workload.phase == "decode" else 1


def served_unit(plan: Plan, workload: Workload) -> int:
    """What must divide the sequence length."""
    return plan.ring if workload.phase == "decode" else prompt_unit(plan)


def serving_notes(model: Model, plan: Plan, workload: Workload) -> Iterator[str]:
    """What a reader of a result should know of inference."""
    if workload.phase == "training":
        return
    if model.mtp_layers:
        yield f"mtp_layers = {model.mtp_layers} train the model, and make no token here"
    if model.dropout:
        yield f"dropout = {model.dropout} is off in inference"
    if workload.phase == "decode" and plan.ring > 1:
        yield (
            f"ring = {plan.ring} with phase 'decode': ranks share the cache by its tokens, and weights as ranks of tp; "
            "partial results of attention are exchanged and merged"
        )
        for name in [name for name in ("ring_pass", "ring_kind", "ring_cut") if name in plan.differing]:
            yield f"{_setting(name, getattr(plan, name))} has no effect with phase 'decode': nothing goes round a ring"
    if batch_unit(plan, workload) > 1:
        yield f"{plan.label} with phase 'decode': one new token has no sequence to shard; the batch is cut instead"


def _setting(name: str, value: Any) -> str:
    return name if value is True else f"{name} = {value!r}"
