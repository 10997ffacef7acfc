"""A layer with experts on real ranks, as Megatron-Core's `MoELayer` runs it with a router in fp32. Its all-to-all
dispatcher: permute, exchange, gather over tp, sort by expert, grouped products, and the same back; and the one that
gathers all tokens.

Functions here keep what kernels of Transformer Engine keep: of top-k its softmax and its map, of a permutation where
each row went. Sorting by `split` and `cat` keeps nothing. How many tokens go where is gathered unseen by recorders: 8
bytes an expert of each rank, which the simulator leaves out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.program.mesh import Axis
from spsim.pytorch.layers import Groups, ParallelLayer, operator
from spsim.pytorch.layers.collectives import reduce, start_all_gather, start_reduce_scatter
from spsim.pytorch.layers.elementwise import _Fused
from spsim.pytorch.layers.layer import _recomputed
from spsim.pytorch.layers.linears import column_parallel
from spsim.pytorch.layers.weights import WeightShape, weight_shapes

REPLICAS: tuple[Axis, ...] = ("dp", "ep")
Sent = tuple[str, int, int]
"""A collective, and the bytes that this rank gave to it and got of it."""


def expert_shapes(model: Model) -> dict[str, WeightShape]:
    """Of all weights of a layer; of experts the first dimension is which."""
    h, e, m, u = model.hidden, model.experts, model.expert_ffn_hidden, model.shared_ffn_hidden
    shapes = {name: shape for name, shape in weight_shapes(model).items() if not name.startswith("fc")}
    if u:
        shapes["shared_fc1_weight"] = WeightShape((2, u, h), 1, h**-0.5)
        shapes["shared_fc2_weight"] = WeightShape((h, u), 1, u**-0.5)
    return shapes | {
        "router_weight": WeightShape((e, h), None, h**-0.5),
        "expert_fc1_weight": WeightShape((e, 2, m, h), 2, h**-0.5),
        "expert_fc2_weight": WeightShape((e, h, m), 2, m**-0.5),
    }


@dataclass(frozen=True)
class Splits:
    """Rows that go to each rank of ep, that come from each, that each rank of tp then has, that are of each rank and
    local expert, and of each local expert.
    """

    given: list[int]
    got: list[int]
    of_tp: list[int]
    chunks: list[int]
    counts: list[int]


class ExpertLayer(ParallelLayer):
    """The layer of this rank, whose replica has a part of the batch. Experts have the largest logits of a token."""

    def __init__(self, model: Model, plan: Plan, groups: Groups, dtype: torch.dtype = torch.float32) -> None:
        spread = groups.mesh.of_experts
        self.spread: Axis | None = None if not spread else "experts" if len(spread) > 1 else spread[0]
        self.place = 0
        for axis in spread:
            self.place = self.place * groups.degree(axis) + groups.coordinate(axis)
        super(ParallelLayer, self).__init__(model, plan, groups, expert_shapes(model), dtype)
        self.ep = groups.part(self.spread, groups.degree(self.spread)) if self.spread else None
        self.expert_tp = None if "tp" in plan.expert_axes else groups.group("tp")
        self.sent: list[Sent] = []
        self.rows = 0
        """That came to the experts of this rank."""

    # Whole tensors and their parts

    def local_weight(self, name: str, whole: Tensor) -> Tensor:
        """Of experts those of this rank."""
        if not name.startswith("expert"):
            return super().local_weight(name, whole)
        part = whole if "tp" in self.plan.expert_axes else super().local_weight(name, whole)
        return part.chunk(self.groups.degree(self.spread))[self.place] if self.spread else part

    def local_input(self, whole: Tensor) -> Tensor:
        """Of the sequences of this replica its part."""
        for axis in REPLICAS:
            whole = whole.chunk(self.groups.degree(axis), 1)[self.groups.coordinate(axis)]
        return super().local_input(whole)

    def whole_output(self, part: Tensor) -> Tensor:
        """Of all replicas."""
        whole = super().whole_output(part)
        for axis in reversed(REPLICAS):
            whole = start_all_gather(whole.transpose(0, 1), self.groups.group(axis)).wait().transpose(0, 1)
        return whole

    # The layer

    def _mlp(self, x: Tensor) -> Tensor:
        if not self.model.shared_ffn_hidden:
            return self._experts(x)
        shared = self._shared(x)
        return self._experts(x) + shared

    def _residual(self, name: str, x: Tensor, residual: Tensor) -> Tensor:
        """What experts make is no partial sum over tp."""
        return super()._residual(name, x, residual) if name == "residual1" else residual + x

    def _shared(self, x: Tensor) -> Tensor:
        with operator("shared_fc1"):
            weight = self.weight("shared_fc1")
            (hidden,) = column_parallel(x, [weight.flatten(0, -2)], [None], self.tp)
        with operator("shared_swiglu"):
            active = _Fused.apply(_swiglu, hidden)
        with operator("shared_fc2"):
            out = functional.linear(active, self.weight("shared_fc2"))
            return reduce(out, self.tp.group, scatter=True) if self.tp.group else out

    def _experts(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        with operator("router"):
            logits = _Router.apply(tokens, self.weight("router"))
        with operator("top_k"):
            probabilities, routing_map = _TopK.apply(logits, self._picks(x, logits))
        if self.plan.moe_dispatcher == "allgather":
            return self._all_tokens(tokens, probabilities, routing_map).view_as(x)
        with operator("dispatch"):
            dealt, weights, went = _Permute.apply(tokens, probabilities, routing_map)
        with operator("expert_fc1"):
            splits = self._splits(routing_map)
            dealt, weights = self._dispatched(dealt, weights, splits)
        made = self._products(dealt, weights, splits.counts)
        with operator("combine"):
            made = self._returned(made, splits, weights.dtype)
            return _Unpermute.apply(made, went, len(tokens)).view_as(x)

    def _all_tokens(self, x: Tensor, probabilities: Tensor, routing_map: Tensor) -> Tensor:
        """Of all ranks, of which the experts here take theirs (`MoEAllGatherTokenDispatcher`); summed over all ranks in
        the type of the probabilities.
        """
        own = slice(self.place * self._local_experts(), (self.place + 1) * self._local_experts())
        with operator("dispatch"):
            routing_map = start_all_gather(routing_map, self.ep).wait()[:, own].contiguous()
            equal = [len(x)] * (self.ep.size() if self.ep else 1)
            probabilities = _Gather.apply(probabilities, equal, self.ep, self.sent)
            x = _Gather.apply(x, equal, self.ep, self.sent)
            dealt, weights, went = _Permute.apply(x, probabilities[:, own], routing_map)
        made = self._products(dealt, weights, routing_map.sum(0).tolist())
        with operator("combine"):
            made = _Unpermute.apply(made, went, len(x))
            return _Scatter.apply(made.to(weights.dtype), equal, self.ep, self.sent).to(made.dtype)

    def _products(self, dealt: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """Of the rows of each expert."""
        self.rows = len(dealt)
        with operator("expert_fc1"):
            inner = _grouped(dealt, counts, self.weight("expert_fc1").flatten(1, 2))
        with operator("expert_swiglu"):
            active = _Fused.apply(_weighted_swiglu, inner, weights)
        with operator("expert_fc2"):
            return _grouped(active, counts, self.weight("expert_fc2"))

    def _picks(self, x: Tensor, logits: Tensor) -> Tensor:
        """Of each token k experts."""
        return logits.detach().topk(self.model.experts_per_token, dim=1).indices

    def _splits(self, routing_map: Tensor) -> Splits:
        own = routing_map.sum(0)
        with _disable_current_modes():
            of_ep = start_all_gather(own.unsqueeze(0), self.ep).wait()
            every = start_all_gather(of_ep.unsqueeze(0), self.expert_tp).wait()
        local = every.unflatten(2, (-1, self._local_experts()))[:, :, self.place]
        tp = self.groups.coordinate("tp") if self.expert_tp else 0
        given = own.unflatten(0, (-1, self._local_experts())).sum(1)
        sums = (given, local[tp].sum(1), local.sum((1, 2)), local.flatten(), local.sum((0, 1)))
        return Splits(*(each.tolist() for each in sums))

    def _local_experts(self) -> int:
        return self.model.experts // (self.ep.size() if self.ep else 1)

    def _dispatched(self, x: Tensor, weights: Tensor, splits: Splits) -> tuple[Tensor, Tensor]:
        """From where tokens lie to the order of experts."""
        both = [_Exchange.apply(part, splits.given, splits.got, self.ep, self.sent) for part in (x, weights)]
        both = [_Gather.apply(part, splits.of_tp, self.expert_tp, self.sent) for part in both]
        order = _by_expert(len(splits.chunks), self._local_experts())
        x, weights = (_in_order(part, splits.chunks, order) for part in both)
        return x, weights

    def _returned(self, x: Tensor, splits: Splits, exact: torch.dtype) -> Tensor:
        """Back; over tp summed in the type of the probabilities."""
        order = _by_expert(len(splits.chunks), self._local_experts())
        back = torch.tensor(order).argsort().tolist()
        x = _in_order(x, [splits.chunks[i] for i in order], back)
        if self.expert_tp:
            x = _Scatter.apply(x.to(exact), splits.of_tp, self.expert_tp, self.sent).to(x.dtype)
        return _Exchange.apply(x, splits.got, splits.given, self.ep, self.sent)


class BalancedLayer(ExpertLayer):
    """Each expert is picked as often, on each rank: one after the other along the sequence."""

    def _picks(self, x: Tensor, logits: Tensor) -> Tensor:
        k, tokens = self.model.experts_per_token, x.shape[0]
        for axis in self.shards.axes:
            tokens *= self.groups.degree(axis)
        positions = self.shards.local(torch.arange(tokens)).repeat_interleave(x.shape[1])
        return (k * positions.unsqueeze(1) + torch.arange(k)) % self.model.experts


class RecomputedLayer(BalancedLayer):
    """All between the norm and the residual runs again in the backward pass (`recompute_modules` with `moe`)."""

    def _mlp(self, x: Tensor) -> Tensor:
        return _recomputed(super()._mlp)(x)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return functional.silu(gate) * up


def _weighted_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    return (_swiglu(x) * weights.unsqueeze(-1)).to(x.dtype)


def _grouped(x: Tensor, counts: list[int], weight: Tensor) -> Tensor:
    """Rows of each expert with its weight [e n h]."""
    parts = zip(x.split(counts), weight, strict=True)
    return torch.cat([functional.linear(part, own) for part, own in parts])


def _by_expert(chunks: int, experts: int) -> list[int]:
    """Chunks of each rank in turn -> of each expert in turn."""
    return torch.arange(chunks).view(-1, experts).T.flatten().tolist()


def _in_order(x: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    if order == sorted(order):
        return x
    chunks = x.split(sizes)
    return torch.cat([chunks[i] for i in order])


class _Router(Function):
    """Logits in fp32 at least (`RouterGatingLinearFunction`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        exact = torch.promote_types(x.dtype, torch.float32)
        return x.to(exact) @ weight.to(exact).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (g,) = gradients
        return (g @ weight.to(g.dtype)).to(x.dtype), (g.T @ x.to(g.dtype)).to(weight.dtype)


class _TopK(Function):
    """Probabilities [tokens, experts], zero where not picked, and where they are picked."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, picks: Tensor) -> Any:
        routing_map = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, picks, True)
        probabilities = logits.masked_fill(~routing_map, -torch.inf).softmax(1)
        ctx.save_for_backward(routing_map, probabilities.clone())
        ctx.mark_non_differentiable(routing_map)
        return probabilities, routing_map

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        routing_map, kept = ctx.saved_tensors
        weighed = torch.where(routing_map, gradients[0] * kept, 0)
        return weighed - kept * weighed.sum(1, keepdim=True), None


def _sources(went: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token and expert of each row, and its place."""
    experts = went.shape[1] // 2
    rows, which = went[:, :experts], went[:, experts : 2 * experts]
    token, slot = (rows >= 0).nonzero(as_tuple=True)
    place = rows[token, slot].long()
    return token, which[token, slot].long(), place


class _Permute(Function):
    """Rows in the order of experts, their probabilities, and where each went: of a token the rows, the experts, and how
    many (`row_id_map` of Transformer Engine, 2e + 1 numbers).
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, probabilities: Tensor, routing_map: Tensor) -> Any:
        experts = routing_map.shape[1]
        number = routing_map.T.flatten().cumsum(0).view(experts, -1).T - 1
        picks = [mask.nonzero().flatten() for mask in routing_map]
        went = torch.full((len(tokens), 2 * experts + 1), -1, dtype=torch.int32)
        for token, own in enumerate(picks):
            went[token, : len(own)] = number[token, own].int()
            went[token, experts : experts + len(own)] = own.int()
            went[token, -1] = len(own)
        ctx.save_for_backward(went)
        ctx.mark_non_differentiable(went)
        token, expert, place = _sources(went)
        order = place.argsort()
        token, expert = token[order], expert[order]
        return tokens[token], probabilities[token, expert], went

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (went,) = ctx.saved_tensors
        token, expert, place = _sources(went)
        of_rows, of_weights, _ = gradients
        of_tokens = of_rows.new_zeros(len(went), of_rows.shape[1]).index_add_(0, token, of_rows[place])
        of_probabilities = of_weights.new_zeros(len(went), went.shape[1] // 2)
        of_probabilities[token, expert] = of_weights[place]
        return of_tokens, of_probabilities, None


class _Unpermute(Function):
    """The sum of the rows of each token."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, went: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(went)
        token, _, place = _sources(went)
        return rows.new_zeros(tokens, rows.shape[1]).index_add_(0, token, rows[place])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        token, _, place = _sources(*ctx.saved_tensors)
        return gradients[0][token][place.argsort()], None, None


def _exchanged(x: Tensor, given: list[int], got: list[int], group: Any, sent: list[Sent]) -> Tensor:
    result = x.new_empty(sum(got), *x.shape[1:])
    dist.all_to_all_single(result, x.contiguous(), got, given, group=group)
    sent.append(("all_to_all", x.nbytes, result.nbytes))
    return result


class _Exchange(Function):
    """All-to-all of so many rows to and from each rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, given: list[int], got: list[int], group: Any, sent: list[Sent]) -> Tensor:
        ctx.plan = (got, given, group, sent)
        return _exchanged(x, given, got, group, sent) if group else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        given, got, group, sent = ctx.plan
        moved = _exchanged(gradients[0], given, got, group, sent) if group else gradients[0]
        return moved, None, None, None, None


def _gathered(x: Tensor, sizes: list[int], group: Any, sent: list[Sent]) -> Tensor:
    """Gloo gathers equal parts only: they are padded, which the recorder sees; `sent` has the rows themselves."""
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    whole = start_all_gather(padded, group).wait().split(max(sizes))
    result = torch.cat([part[:size] for part, size in zip(whole, sizes, strict=True)])
    sent.append(("all_gather", x.nbytes, result.nbytes))
    return result


def _scattered(x: Tensor, sizes: list[int], group: Any, sent: list[Sent]) -> Tensor:
    parts = x.split(sizes)
    padded = x.new_zeros(len(sizes), max(sizes), *x.shape[1:])
    for place, part in enumerate(parts):
        padded[place, : len(part)] = part
    result = start_reduce_scatter(padded.flatten(0, 1), group).wait()[: sizes[dist.get_rank(group)]].clone()
    sent.append(("reduce_scatter", x.nbytes, result.nbytes))
    return result


class _Gather(Function):
    """Rows of all ranks of a group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Any, sent: list[Sent]) -> Tensor:
        ctx.plan = (sizes, group, sent)
        return _gathered(x, sizes, group, sent) if group else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        moved = _scattered(gradients[0], *ctx.plan) if ctx.plan[1] else gradients[0]
        return moved, None, None, None


class _Scatter(Function):
    """The sum over all ranks of a group of the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], group: Any, sent: list[Sent]) -> Tensor:
        ctx.plan = (sizes, group, sent)
        return _scattered(x, sizes, group, sent) if group else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        moved = _gathered(gradients[0], *ctx.plan) if ctx.plan[1] else gradients[0]
        return moved, None, None, None
