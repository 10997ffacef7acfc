"""The parallel plan: degrees of the mesh axes and the options of the schedule."""

import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from spsim.errors import InputError
from spsim.inputs.configuration import Configuration, read_value
from spsim.inputs.libraries import LibraryName, library_defaults
from spsim.inputs.plan_words import label_options, plan_options
from spsim.inputs.schedules import Library, Schedule

Degree = Annotated[int, Field(ge=1, le=2**16)]
Dispatcher = Literal["alltoall", "allgather", "deepep", "hybridep"]
"""Of tokens to experts, as Megatron-Core names them."""
WHOLE_GRAPHS = ("none", "per_layer", "full_iteration")
GRAPH_MODULES = ("attn", "mlp", "moe_router", "moe_preprocess")
"""Of a layer, that CUDA graphs may hold: up to the first residual; a dense MLP; norm and router of experts; and what
Megatron-Core does between that and the exchange, of which there is no kernel here."""
MESH_ORDER = "tp-ulysses-ring-dp-pp"
"""Megatron's, whose cp is ulysses and ring."""


class Plan(Configuration):
    """Degrees and options; the number of GPUs is the product of the degrees."""

    library: LibraryName = "megatron-core"
    """Whose implementation it is: what all other options are unless given."""
    tp: Degree = 1
    sequence_parallel: bool = False
    """Megatron sequence parallelism over the `tp` axis (Korthikanti et al. 2022)."""
    ulysses: Degree = 1
    """All-to-all sequence parallelism (DeepSpeed-Ulysses, Jacobs et al. 2023)."""
    ring: Degree = 1
    """Ring attention or context parallelism (Liu et al. 2023; Megatron-Core)."""
    ring_kind: Literal["p2p", "all_gather", "gather_permute"] = "p2p"
    """Circulate K and V; gather them before attention; or gather them behind its first step and circulate their
    gradients in fp32, as torch's `context_parallel` does by default.
    """
    ring_gradients: Literal["model_dtype", "fp32"] = "model_dtype"
    """dK and dV that circulate: P - 1 trips in the model's dtype (Transformer Engine), or P trips in fp32."""
    ring_messages: Literal["joint", "concatenated", "separate"] = "joint"
    """K and V in one buffer (Transformer Engine), copied into one for each message (torch), or two sends in a batch."""
    ring_cut: Literal["zigzag", "contiguous"] = "zigzag"
    ring_pass: Literal["kv", "q"] = "kv"
    """What goes round in a prefill: K and V, or Q, whose partial results are exchanged behind the last step and merged
    (Yang et al. 2024).
    """
    ep: Degree = 1
    """Ranks over which the experts of a layer are spread: those of tp, ulysses and ring, and replicas."""
    expert_tp: Degree | None = None
    """Ranks that share an expert (`expert_tensor_parallel_size`): `tp`, or 1; as many as tp unless given."""
    moe_dispatcher: Dispatcher = "alltoall"
    """Tokens exchanged by NCCL, one for each expert; all gathered by all ranks; or kernels of a library that send one
    copy to each rank with experts of a token (`moe_token_dispatcher_type`, `moe_flex_dispatcher_backend`)."""
    moe_capacity_factor: Annotated[float, Field(ge=0.125, le=64)] | None = None
    """Of the mean tokens of an expert: each has so many, dropped or padded, whatever a router picks
    (`moe_expert_capacity_factor` with `moe_pad_expert_input_to_capacity`); none dropped unless given."""
    expert_imbalance: Annotated[float, Field(ge=1, le=64)] = 1.0
    """Tokens of the rank whose experts have the most, over the mean; balanced unless given."""
    expert_concentration: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    """In place of that, of a Dirichlet distribution of which each layer draws how popular its experts are: evenly the
    more the larger it is."""
    routing_seed: Annotated[int, Field(ge=0, le=2**31)] = 0
    """Of these draws."""
    moe_a2a_overlap: bool = False
    """Exchanges with experts behind passes of another micro-batch (`overlap_moe_expert_parallel_comm`)."""
    delay_wgrad: bool = False
    """Weight gradients behind the exchange that follows, where that is so (`delay_wgrad_compute`)."""
    fused_grouped_mlp: bool = False
    """Products of experts with activation and casts in their epilogues, as cuDNN has them in MXFP8
    (`use_transformer_engine_op_fuser`)."""
    heads_k_stride: Degree | None = None
    """KV heads of a rank that `ring_kind = "all_gather"` gathers at once, behind attention of those before; all unless
    given (ring-flash-attn's form of Llama 3)."""
    pp: Degree = 1
    virtual_pp: Degree = 1
    """Chunks of each pipeline stage: above 1 the schedule is interleaved."""
    pp_schedule: Schedule = "1f1b"
    """As torch.distributed.pipelining calls them; `1f1b` with `virtual_pp` is Megatron's interleaved one."""
    pp_group: Degree | None = None
    """Micro-batches that a chunk runs before the next one takes over; as many as stages unless given."""
    pp_layout: str | None = None
    """Chunks in order with `/` between them: E embedding, t layer, L loss, such as `Et3/t4/t4/t3L`."""
    pp_sends: Library | None = None
    """Whose way to post messages and wait for them; Megatron's for `1f1b`, torch's for its own schedules."""
    pp_overlap: bool | None = None
    """Messages behind passes (`overlap_p2p_comm`); as Megatron's training script, where `virtual_pp` is above 1."""
    pp_warmup_flush: bool = False
    """Overlap messages of warm-up and cool-down, too (`overlap_p2p_comm_warmup_flush`)."""
    pp_deallocate: bool = True
    """Free the output of a stage once it is sent (`deallocate_pipeline_outputs`)."""
    dp: Degree = 1
    mesh_order: str = MESH_ORDER
    """Axes by how their ranks are numbered, neighbours first: those that come first share nodes, the last lie across
    nodes. Megatron's order unless given.
    """
    distributed_optimizer: bool = False
    """Shard the optimizer state over dp x ulysses x ring, as Megatron does: ZeRO stage 1."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    dp_library: Literal["megatron", "ddp", "fsdp", "deepspeed"] = "megatron"
    """Whose buckets and collectives synchronise replicas."""
    shard_group: Degree | None = None
    """Replicas that share one copy of what is sharded (HSDP); all unless given."""
    fsdp_ends: Literal["root", "units"] = "root"
    """Embedding, and norm with output, sharded with the root of the model, which stays whole between its passes, or as
    units of FSDP of their own (torchtitan)."""
    bucket_elements: Annotated[int, Field(ge=1, le=2**40)] | None = None
    """Elements at which a bucket of gradients is closed; what the library does unless given."""
    grad_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are accumulated and reduced (`grad_reduce_in_fp32`)."""
    moment_dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the two moments of Adam."""
    precision_aware_optimizer: bool = False
    """The fp32 master weight kept as what the 16-bit weight leaves of it."""
    loss_fusion: bool = False
    """Cross-entropy in one kernel that keeps no fp32 copy of the logits (`cross_entropy_loss_fusion`)."""
    loss_parallel: bool = True
    """Cross-entropy of logits split over tp, else of gathered ones (`disable_loss_parallel` of torchtitan)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute core attention (selective) or the whole layer (full) in the backward pass."""
    recompute_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Layers of each chunk that are recomputed (`recompute_num_layers`); all unless given."""
    recompute_method: Literal["block", "uniform"] = "block"
    """The first layers of a chunk, or units of so many layers of which the first input is kept."""
    recompute_modules: str | None = None
    """Modules of a layer that `selective` recomputes, such as `core_attn+mlp`; core attention unless given."""
    recompute_early_stop: bool = False
    """Recompute up to the last tensor that the backward pass reads (`early_stop` of torch.utils.checkpoint)."""
    recompute_reentrant: bool = True
    """Recompute once the gradient of the result is there (Megatron's own function; `use_reentrant` of
    torch.utils.checkpoint), else when the backward pass first reads what was not kept."""
    cpu_offload_layers: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Layers of a rank whose activations wait in host memory between their passes."""
    fp8_dot_product_attention: bool = False
    """Core attention in 8 bits, too, under a recipe of 8 bits; its result and gradients of activations stay in 16."""
    fp8_output_proj: bool = False
    """The output layer in 8 bits, too, under mxfp8."""
    cuda_graphs: str = "none"
    """`per_layer`, `full_iteration`, or modules of a layer, such as `attn+moe_router` (`cuda_graph_scope`)."""
    tp_backward_overlap: bool = True
    """Megatron's default: gradient communication behind the weight gradient, re-gather behind the data gradient."""
    tp_overlap: bool = False
    tp_scatter: Literal["ring_exchange", "pipeline", "pipeline_fp8"] | None = None
    """How `tp_overlap` scatters what projection and fc2 make: pieces from rank to rank, or four whole reduce-scatters,
    which hold more SMs, in 16 bits or 8; unless given the first in 8 or 4 bits, as in recipes of Megatron-Bridge."""
    dp_overlap: bool | Literal["gradients", "parameters"] = False
    """Reduce gradients behind the backward pass, gather parameters behind the forward pass, or both."""
    keep_gathered: bool = False
    """Keep the gathered input of a linear instead of its shard, as DTensor does; no re-gather in backward."""
    projections: Literal["fused", "separate"] = "fused"
    """Q, K and V as one product, gate and up as another, or each as its own."""
    input_gradients: Literal["summed", "each"] = "summed"
    """Gradients of one input of several products are summed before they move over tp, or each is moved."""
    few_kv_heads: Literal["gather", "replicate", "refuse"] = "gather"
    """With fewer KV heads than tp: the fused Q, K and V of all positions gathered, or K and V replicated."""
    norm_gradients: Literal["coalesced", "each_reader"] = "coalesced"
    """Gradients of norms summed over tp once, or again by each that reads them: clipping and the optimizer."""
    uneven_heads: Literal["refuse", "by_group"] = "refuse"
    """Heads that `ulysses` does not divide: refused, or whole groups of them that share a head of K and V dealt out, to
    the first ranks one more (DeepSpeed's `DistributedAttention`).
    """
    ulysses_few_kv_heads: Literal["replicate", "refuse"] = "replicate"
    """With fewer KV heads than `ulysses`: replicated, one a rank, or refused."""
    ulysses_gradients: Literal["forward", "reverse"] = "forward"
    """Whether those of Q, K and V go back in this order, as of one function of autograd (Transformer Engine), or the
    last first, as of one for each exchange (DeepSpeed, yunchang).
    """
    gathers_position_ids: bool = False
    """Before the heads of `ulysses` are exchanged, in every layer (DeepSpeed's ALST)."""
    batch_first: bool = False
    """Activations [b, s, h], as torchtitan has them, not [s, b, h]: copied before each reduce-scatter of a sequence and
    behind each gather of several."""

    @model_validator(mode="before")
    @classmethod
    def _of_library(cls, settings: Any) -> Any:
        """What is not given is as in the library."""
        if not isinstance(settings, Mapping):
            return settings
        return {**library_defaults(settings.get("library"), settings.get("pp", 1)), **settings}

    @field_validator("mesh_order")
    @classmethod
    def _names_each_axis(cls, value: str) -> str:
        if sorted(value.split("-")) != sorted(MESH_ORDER.split("-")):
            raise ValueError(f"{value!r} does not name each axis once; write the axes of {MESH_ORDER} in another order")
        return value

    @field_validator("cuda_graphs")
    @classmethod
    def _names_what_graphs_hold(cls, value: str) -> str:
        modules = value.removeprefix("te:").split("+")
        if value not in WHOLE_GRAPHS and (unknown := [name for name in modules if name not in GRAPH_MODULES]):
            raise ValueError(
                f"{unknown[0]!r} is none of {', '.join((*WHOLE_GRAPHS, *GRAPH_MODULES))}; use one, or modules with +"
            )
        return "+".join(modules)

    @classmethod
    def example(cls) -> str:
        """Of two options."""
        return "Plan(tp=8, sequence_parallel=True)"

    @classmethod
    def own_words(cls, settings: Mapping[str, Any]) -> Mapping[str, Any]:
        """Megatron's and others' words too; see `plan_words`."""
        return super().own_words(plan_options(settings, cls.model_fields.keys()))

    @cached_property
    def gpus(self) -> int:
        """Product of the degrees."""
        return self.tp * self.ulysses * self.ring * self.pp * self.dp

    @cached_property
    def expert_axes(self) -> tuple[Literal["ring", "ulysses", "tp"], ...]:
        """Axes besides replicas over which experts are spread, if they are."""
        if self.ep == 1:
            return ()
        return ("ring", "ulysses") if self.expert_tp in (None, self.tp) else ("ring", "ulysses", "tp")

    @cached_property
    def expert_replicas(self) -> int:
        """Of all replicas, those over which experts are spread."""
        within = self.ulysses * self.ring * (self.tp if "tp" in self.expert_axes else 1)
        return max(1, self.ep // within) if self.ep > 1 else 1

    @property
    def copies(self) -> int:
        """Ranks that use the same weights: what libraries shard, they share."""
        return self.dp * self.ulysses * self.ring

    @property
    def sends_fp32_gradients(self) -> bool:
        """Whether dK and dV go round in fp32."""
        return self.ring_gradients == "fp32" or self.ring_kind == "gather_permute"

    @cached_property
    def zero_stage(self) -> int:
        """ZeRO stage; the distributed optimizer is stage 1."""
        return max(self.zero, int(self.distributed_optimizer))

    @cached_property
    def recomputed_modules(self) -> tuple[str, ...]:
        """Modules of a layer that a selective recomputation runs again, by Megatron-LM's names."""
        given = self.recompute_modules or "core_attn"
        return tuple(re.split(r"[+,\s]+", given)) if self.recompute == "selective" else ()

    @cached_property
    def differing(self) -> dict[str, Any]:
        """Options that are not those of its library."""
        return self.unlike(library_defaults(self.library, self.pp))

    @cached_property
    def text(self) -> str:
        """The plan as the command line writes it: what differs from one GPU without options of its library."""
        return plan_text(self.differing)

    @property
    def summary(self) -> tuple[str, ...]:
        """Ring cut and recomputation, for subtitles."""
        parts = [f"{self.ring_cut} ring"] if self.ring > 1 else []
        return (*parts, *([f"{self.recompute} recompute"] if self.recompute != "none" else []))

    @property
    def label(self) -> str:
        """Short name for titles and tables, such as `TP8+SP × PP8×VP3 × DP4+ZeRO-1` or `Ulysses 8 (deepspeed)`."""
        parts = [f"TP{self.tp}" + ("+SP" if self.sequence_parallel else "")] if self.tp > 1 else []
        parts += [f"Ulysses {self.ulysses}"] if self.ulysses > 1 else []
        parts += [f"Ring {self.ring}"] if self.ring > 1 else []
        parts += [f"EP{self.ep}"] if self.ep > 1 else []
        parts += [f"PP{self.pp}" + (f"×VP{self.virtual_pp}" if self.virtual_pp > 1 else "")] if self.pp > 1 else []
        sharded = [f"ZeRO-{self.zero_stage}"] if self.zero_stage > (self.dp == 1) else []
        alone = [stage for stage in sharded if "zero" in self.differing]
        parts += ["+".join([f"DP{self.dp}", *sharded])] if self.dp > 1 else alone
        own = "" if self.library == "megatron-core" else f" ({self.library})"
        return (" × ".join(parts) or "single GPU") + own


KEPT = 1024
"""Plans by their text: it is read for each row of a sweep."""


@lru_cache(KEPT)
def parse_plan(text: str) -> Plan:
    """A plan from the form of the command line: `tp=8,sequence_parallel,recompute=selective`; labels as `TP8+SP` and
    the names of Megatron-LM and others are taken too.
    """
    return Plan(**parse_options(text))


def parse_options(text: str) -> dict[str, Any]:
    """Options of a plan from `key=value,flag,…` and labels, under their own names; a bare key is true.

    Values are integers, numbers, `true`/`false` or words. Raises `InputError` on an empty key or a key given twice.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        label = label_options(item)
        for key, value in [_option(item)] if label is None else label:
            if key in options:
                raise InputError(f"plan: {key} is given twice; keep one")
            options[key] = value
    return plan_options(options, Plan.model_fields.keys())


def _option(item: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in item.partition("="))
    if not key or (equals and not value):
        raise InputError(f"plan: {item!r} is not key=value or a bare flag; write for instance tp=8")
    if len(value.split()) > 1:
        raise InputError(f"plan: {item!r} has a blank in its value; divide options by commas, as in tp=8,ring=2")
    return key, read_value(value) if equals else True


def plan_text(options: Mapping[str, Any]) -> str:
    """Options as the command line writes them."""
    return ",".join(name if value is True else f"{name}={_text(value)}" for name, value in options.items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
