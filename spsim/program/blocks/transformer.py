"""The transformer layer, written once as operators with named dimensions; no plan is known here.

What each operator keeps for its backward pass follows Korthikanti et al. 2022 (arXiv:2205.05198, section
4.1) for the unfused GPT layer, and Dao et al. 2022 (arXiv:2205.14135) for flash attention.
"""

from __future__ import annotations

from fractions import Fraction
from operator import attrgetter
from typing import Literal

from spsim.inputs.model import Model
from spsim.inputs.workload import Workload
from spsim.program.blocks.block import ModelBlock
from spsim.program.blocks.experts import expert_sizes, routed_experts
from spsim.program.blocks.latent import latent_qkv, latent_sizes
from spsim.program.blocks.ways import Way
from spsim.program.launches import Launches
from spsim.program.operators import Operator, Tensor, TensorKind
from spsim.program.placement import Extent
from spsim.program.recompute import SHARED_OUT, SHARED_SUM
from spsim.program.routing import USUAL, Routing
from spsim.work import AttentionKernel, Framework, KernelClass

Projections = Literal["fused", "separate", "gathered"]
"""Q, K and V as one product and gate and up as another, each as its own, or fused with Q, K and V gathered."""


class Layer(ModelBlock):
    """The operators of one layer."""

    def __init__(
        self,
        model: Model,
        workload: Workload,
        replicas: int,
        projections: Projections = "fused",
        routing: Routing = USUAL,
    ) -> None:
        super().__init__(model, workload, replicas, **expert_sizes(model, routing), **latent_sizes(model))
        self.routing = routing
        self.projections = projections
        self.heads: dict[str, Extent] = {"q": self.sizes["a"], "k": model.kv_heads, "v": model.kv_heads}

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three projections as one GEMM, as Megatron's fused column-parallel linear, or as three."""
        if self.projections == "gathered":
            return self.gathered_qkv(x)
        if self.projections == "fused":
            q, k, v = self.projected("qkv", x, *self.heads)
        else:
            q, k, v = (self.projected(name, x, name)[0] for name in self.heads)
        return q, k, v

    def projected(self, name: str, x: Tensor, *made: str) -> list[Tensor]:
        """One product for some of Q, K and V."""
        heads = {own: self.heads[own] for own in made}
        outs = [self.tensor(own, "s b a d", heads=n) for own, n in heads.items()]
        weights = [self.weight(f"{own}_weight", "h a d", heads=n) for own, n in heads.items()]
        biases = [self.weight(f"{own}_bias", "a d", heads=n) for own, n in heads.items() if self.model.qkv_bias]
        left = ["s b h"] + ["h a d"] * len(weights) + ["a d"] * len(biases)
        self.add(
            name, "gemm", f"{', '.join(left)} -> {', '.join(['s b a d'] * len(outs))}", [x, *weights, *biases], outs,
            saves=[x], owns_gather=[x],
        )  # fmt: skip
        return outs

    def gathered_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One product whose width is cut evenly, whatever heads that separates. The next operator reads all of it, as
        dimension w, and takes its heads: the gather of Megatron-Core with fewer KV heads than tp.
        """
        width = sum(self.heads.values()) * self.model.head_dim

        def wide(name: str, dims: str, kind: TensorKind = "activation") -> Tensor:
            made = self.tensor(name, dims, kind)
            return made._replace(sizes=(*made.sizes[:-1], Fraction(width)))

        fused, weight = wide("qkv", "s b a*d"), wide("qkv_weight", "h a*d", "weight")
        biases = [wide("qkv_bias", "a*d", "weight")] if self.model.qkv_bias else []
        left = ", ".join(["s b h, h a*d", *["a*d"] * len(biases)])
        self.add("qkv", "gemm", f"{left} -> s b a*d", [x, weight, *biases], [fused], saves=[x], owns_gather=[x])
        q, k, v = (self.tensor(name, "s b a d", heads=n) for name, n in self.heads.items())
        self.add("qkv_heads", "elementwise", "s b w -> s b a d, s b a d, s b a d", [fused], [q, k, v], mixes="w d")
        return q, k, v

    def head_norm(self, name: str, x: Tensor) -> Tensor:
        """RMSNorm of each head of q or k (Qwen Team 2025, arXiv:2505.09388, section 2): one weight of [d] for all. Or
        of all heads together, which tp cannot split.
        """
        heads, together = x.sizes[2], self.model.qk_norm_over == "heads"
        out = self.tensor(f"{x.name}_normed", "s b a d", heads=heads)
        rows, normed = ("s b", "a d") if together else ("s b a", "d")
        statistics = self.tensor(f"{name}_statistics", rows, "norm statistics", itemsize=4, heads=heads)
        weight = self.weight(f"{name}_weight", normed, heads=heads)
        kept, further = self.kept(self.ways.head_norm, out, x)
        self.add(
            name, "norm", f"s b a d, {normed} -> s b a d", [x, weight], [out, statistics, *further],
            mixes=normed, saves=[*kept, statistics], kernel="rms_norm", launches=self.ways.head_norm.launches,
        )  # fmt: skip
        return out

    def fused_attention(self, kernel: AttentionKernel | Framework, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Core attention in one kernel; keeps q, k, v, its output and the log-sum-exp of each row."""
        context = self.tensor("context", "s b a d")
        log_sum_exp = self.tensor("log_sum_exp", "a s b", "log-sum-exp", itemsize=4)
        c, sinks = q.dims[-1], self.sinks()
        self.add(
            "attention", "attention", f"s b a {c}, j b a {c}, j b a d{', a' * len(sinks)} -> s b a d",
            [q, k, v, *sinks], [context, log_sum_exp],
            mixes=f"j d {c}", saves=[q, k, v, context, log_sum_exp], owns_gather=[k, v],
            attention_kernel=kernel, window=self.model.sliding_window, documents=self.model.documents,
        )  # fmt: skip
        return context

    def sinks(self) -> list[Tensor]:
        """One learned number a head, if the softmax has them."""
        return [self.weight("sinks", "a")] if self.model.attention_sinks else []

    def unfused_attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Core attention as QK^T, scaled and masked softmax, dropout and AV, the scores in memory."""
        if self.ways.repetition:
            k, v = (self.repeated(name, x, self.ways.repetition) for name, x in (("k", k), ("v", v)))
        scores, c = self.tensor("scores", "b a s j"), q.dims[-1]
        self.add("qk", "gemm", f"s b a {c}, j b a {c} -> b a s j", [q, k], [scores], saves=[q, k], owns_gather=[k])
        weights = self.tensor("probabilities", "b a s j")
        kept, further = self.kept(self.ways.softmax, weights, weights)
        sinks = self.sinks()
        self.add(
            "softmax", "softmax", f"b a s j{', a' * len(sinks)} -> b a s j", [scores, *sinks], [weights, *further],
            mixes="j", saves=kept, kernel="masked_softmax" if self.model.causal else "softmax",
            launches=self.ways.softmax.launches,
        )  # fmt: skip
        if self.model.dropout:
            weights = self.dropout("attention_dropout", weights)
        context = self.tensor("context", "s b a d")
        self.add(
            "av",
            "gemm",
            "b a s j, j b a d -> s b a d",
            [weights, v],
            [context],
            saves=[weights, v],
            owns_gather=[v],
        )
        return context

    def repeated(self, name: str, x: Tensor, way: Way) -> Tensor:
        """K or V for each head of Q, at the positions that core attention reads: `repeat_interleave` of Megatron-Core,
        `repeat_kv` of transformers.
        """
        out = self.tensor(f"repeated_{name}", "s b a d")
        self.add(
            f"repeat_{name}", "elementwise", "j b a d -> j b a d", [x], [out], mixes="j", owns_gather=[x],
            launches=way.launches,
        )  # fmt: skip
        return out

    def rotated_qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V with their norms and rotations."""
        q, k, v = self.qkv(x)
        if self.model.qk_norm:
            q, k = self.head_norm("q_norm", q), self.head_norm("k_norm", k)
        if self.model.positions == "rope":
            q, k = self.rope("rope_q", q), self.rope("rope_k", k)
        return q, k, v

    def self_attention(self, x: Tensor) -> Tensor:
        """Projections, norms and rotations of q and k, core attention and the output projection."""
        q, k, v = latent_qkv(self, x) if latent_sizes(self.model) else self.rotated_qkv(x)
        kernel = self.model.attention_kernel
        context = self.fused_attention(kernel, q, k, v) if kernel else self.unfused_attention(q, k, v)
        out = self.tensor("projection_out", "s b h")
        self.add(
            "projection", "gemm", "s b a d, a d h -> s b h", [context, self.weight("projection_weight", "a d h")],
            [out], saves=[context], owns_gather=[context],
        )  # fmt: skip
        return out

    def residual(self, name: str, x: Tensor, residual: Tensor) -> Tensor:
        """Bias, dropout and residual in one kernel; without dropout the gradient passes through untouched."""
        bias, out, mask = self.residual_parts(name)
        self.add(
            name, "elementwise", f"s b h, s b h{', h' * len(bias)} -> s b h", [x, residual, *bias], [out, *mask],
            saves=mask, passthrough=[residual] if mask else [x, residual],
            kernel="bias_dropout_add" if mask else "bias_add" if bias else "add", launches=self.ways.residual.launches,
        )  # fmt: skip
        return out

    def residual_parts(self, name: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """A bias if there is one, the sum, and the mask of dropout if there is one."""
        biased = self.model.mlp_bias and self.model.experts is None if name == "residual2" else self.model.bias
        bias = [self.weight(f"{name}_bias", "h")] if biased else []
        mask = [self.tensor(f"{name}_mask", "s b h", "mask", itemsize=1)] if self.model.dropout else []
        return bias, self.tensor(f"{name}_out", "s b h"), mask

    def residual_and_norm(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The first residual and the norm that reads it in one kernel, and their gradients in another."""
        bias, out, mask = self.residual_parts("residual1")
        weights, normed, statistics, kernel = self.norm_parts("norm2")
        self.add(
            "norm2", "norm", f"s b h, s b h{', h' * (len(bias) + len(weights))} -> s b h, s b h",
            [x, residual, *bias, *weights], [out, normed, statistics, *mask],
            mixes="h", saves=[out, statistics, *mask], passthrough=[] if mask else [residual], kernel=kernel,
        )  # fmt: skip
        return out, normed

    def experts(self, x: Tensor) -> Tensor:
        """The experts that a router picks, and those that all tokens go through, if there are any."""
        if not self.model.shared_ffn_hidden:
            return routed_experts(self, x, self.routing)
        # Megatron-Core runs the shared ones before the router, to the end: no kernel, but all that is sent.
        shared, out = self.tensor("shared_out", "s b h"), self.tensor("experts_out", "s b h")
        made = self.mlp(x, "u", "shared_")
        self.add(
            SHARED_OUT, "elementwise", "s b h -> s b h", [made], [shared], passthrough=[made],
            launches=Launches((), ()),
        )  # fmt: skip
        routed = routed_experts(self, x, self.routing)
        self.add(
            SHARED_SUM, "elementwise", "s b h, s b h -> s b h", [routed, shared], [out],
            passthrough=[routed, shared], kernel="add",
        )  # fmt: skip
        return out

    def mlp(self, x: Tensor, f: str = "f", of: str = "") -> Tensor:
        """fc1, or gate and up, activation and fc2; the bias is fused into the activation, which keeps its input. `f` is
        the dimension of its width, `of` begins the names of its operators.
        """
        apart = self.model.gated_mlp and self.projections == "separate"
        names = [of + own for own in (("gate", "up") if apart else ("fc1",))]
        width = f"g {f}" if self.model.gated_mlp and len(names) == 1 else f
        hidden = [self.tensor(f"{name}_out", f"s b {width}") for name in names]
        for name, made in zip(names, hidden, strict=True):
            weight = self.weight(f"{name}_weight", f"h {width}")
            self.add(name, "gemm", f"s b h, h {width} -> s b {width}", [x, weight], [made], saves=[x], owns_gather=[x])
        bias = [self.weight(f"{name}_bias", width) for name in names if self.model.mlp_bias]
        left = ", ".join(" ".join(read.dims) for read in (*hidden, *bias))
        active = self.tensor(f"{of}activation_out", f"s b {f}")
        way = self.ways.activation_of_two if len(hidden) > 1 else self.ways.activation
        kept, further = self.kept(way, active, *([active] if self.model.activation == "relu" else hidden))
        self.add(
            f"{of}{self.model.activation}", "elementwise", f"{left} -> s b {f}", [*hidden, *bias], [active, *further],
            mixes="g" if "g" in width else "", saves=kept,
            kernel="bias_gelu" if bias and self.model.activation == "gelu" else self.model.activation,
            launches=way.launches,
        )  # fmt: skip
        out = self.tensor(f"{of}fc2_out", "s b h")
        # Of a dense MLP the residual adds it.
        added = [self.weight(f"{of}fc2_bias", "h")] if of and self.model.mlp_bias else []
        self.add(
            f"{of}fc2", "gemm", f"s b {f}, {f} h{', h' * len(added)} -> s b h",
            [active, self.weight(f"{of}fc2_weight", f"{f} h"), *added], [out], saves=[active], owns_gather=[active],
        )  # fmt: skip
        return out


LAYER_INPUT = "layer_input"
LAYER_CLASSES: tuple[KernelClass, ...] = ("gemm", "attention", "norm", "softmax", "dropout", "elementwise", "cast")
"""Of the kernels of a layer."""


layer_traits = attrgetter(
    "hidden", "ffn_hidden", "heads", "kv_heads", "head_dim", "gated_mlp", "activation", "norm", "norm_bias", "norms",
    "positions", "bias", "qkv_bias", "mlp_bias", "qk_norm", "qk_norm_over", "parallel_residual", "shared_norm",
    "attention", "causal", "dropout", "runs_as", "repeats_kv",
    "experts", "experts_per_token", "expert_ffn_hidden", "shared_ffn_hidden",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "sliding_window", "attention_sinks", "documents",
)  # fmt: skip
"""What of a model one layer depends on."""


def transformer_layer(
    model: Model,
    workload: Workload,
    replicas: int = 1,
    projections: Projections = "fused",
    routing: Routing = USUAL,
) -> tuple[Operator, ...]:
    """The operators of one layer in forward order; the first reads the tensor `layer_input`.

    Sizes are those of a micro-batch of all data-parallel replicas, which the dp axis of a mesh divides again.
    """
    return operators_of(Layer(model, workload, replicas, projections, routing))


def operators_of(layer: Layer) -> tuple[Operator, ...]:
    """The operators of a layer in forward order."""
    model = layer.model
    x = layer.tensor(LAYER_INPUT, "s b h")
    before, behind = model.norms != "post", model.norms != "pre"
    given = layer.norm("norm1", x) if before else x
    out = layer.self_attention(given)
    if behind:
        out = layer.norm("post_norm1", out)
    if layer.ways.joins_residual:
        attended, read = layer.residual_and_norm(out, x)
    else:
        attended = layer.residual("residual1", out, x)
        read = x if model.parallel_residual else attended
        read = given if model.shared_norm else layer.norm("norm2", read) if before else read
    made = layer.experts(read) if expert_sizes(model, layer.routing) else layer.mlp(read)
    layer.residual("residual2", layer.norm("post_norm2", made) if behind else made, attended)
    return tuple(layer.operators)
