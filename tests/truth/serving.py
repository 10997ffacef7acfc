"""A model served by hand under every strategy: what each rank sends, and logits that equal those of one process."""

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from spsim import Model, Plan, Workload
from spsim.inputs.serving_rules import served
from spsim.program.instructions import Communication
from spsim.program.serving import serving_programs
from spsim.pytorch.layers import Groups, record_collectives
from spsim.pytorch.layers.collectives import (
    all_to_all,
    start_all_gather,
    start_all_reduce,
    start_exchange,
    start_reduce_scatter,
)
from tests.truth.processes import groups_of

HIDDEN, HEADS, WIDTH, MLP, VOCAB, LAYERS, TOKENS, BATCH = 32, 8, 4, 48, 512, 2, 32, 4
Calls = dict[str, list[tuple[str, int, int]]]
"""Axis -> (collective, message bytes, ranks) in issue order."""


@dataclass(frozen=True)
class Served:
    """A plan, and how a prompt of `TOKENS` passes under it, or the last token of it."""

    plan: Plan
    phase: str = "prefill"
    chunk: int | None = None
    kv_heads: int = 4

    @property
    def model(self) -> Model:
        return Model(
            layers=LAYERS, hidden=HIDDEN, heads=HEADS, kv_heads=self.kv_heads, ffn_hidden=MLP, gated_mlp=True,
            norm="rmsnorm", positions="rope", vocab=VOCAB, bias=False, tied_embeddings=False,
        )  # fmt: skip

    @property
    def workload(self) -> Workload:
        return Workload(seq_len=TOKENS, micro_batch=BATCH, phase=self.phase, precision="fp32", chunk_tokens=self.chunk)

    def expected(self) -> tuple[Calls, int]:
        """The collectives that the simulator derives, and bytes of a token of a sequence in the cache of a layer."""
        programs = serving_programs(self.model, served(self.plan), self.workload)
        found: Calls = defaultdict(list)
        for place, _ in enumerate(self.workload.passages):
            suffix = f" {place}" if place else ""
            blocks = [f"embedding{suffix}", *[f"layer{suffix}"] * LAYERS]
            last = place == len(self.workload.passages) - 1
            for block in (*blocks, *(["head"] if last else [])):
                for step in programs[block].forward:
                    if isinstance(step, Communication):
                        found[step.axis].append((step.collective, step.message_bytes, step.ranks))
        return dict(found), programs["layer"].cache_token_bytes


def weights(kv_heads: int) -> dict[str, Tensor]:
    """Of the whole model, the same on every rank."""
    made = torch.Generator().manual_seed(7)
    shapes = {
        "table": (VOCAB, HIDDEN), "q": (LAYERS, HEADS, WIDTH, HIDDEN), "k": (LAYERS, kv_heads, WIDTH, HIDDEN),
        "v": (LAYERS, kv_heads, WIDTH, HIDDEN), "out": (LAYERS, HIDDEN, HEADS, WIDTH), "fc1": (LAYERS, 2, MLP, HIDDEN),
        "fc2": (LAYERS, HIDDEN, MLP), "output": (VOCAB, HIDDEN),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=made) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def prompt() -> Tensor:
    """Ids [s b]."""
    return torch.randint(VOCAB, (TOKENS, BATCH), generator=torch.Generator().manual_seed(3))


def normed(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (HIDDEN,))


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """[s b a d], a rotation of pairs by the position."""
    angle = positions[:, None, None, None] / 100 ** torch.arange(0, 1, 2 / WIDTH)
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1).flatten(-2)


def attended(q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of queries to keys at no later positions, and its log-sum-exp [s b a]; nothing where there are none."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("sbad,jbad->sbaj", q, k) / WIDTH**0.5
    scores = scores.masked_fill((of_k > of_q[:, None])[:, None, None], -torch.inf)
    total = scores.logsumexp(-1)
    shares = (scores - total[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("sbaj,jbad->sbad", shares, v), total


def merged(outs: Tensor, totals: Tensor) -> Tensor:
    """Partial results [p s b a d] weighted by their log-sum-exp [p s b a]."""
    return (outs * torch.softmax(totals, 0)[..., None]).sum(0)


def alone(kv_heads: int) -> Tensor:
    """Logits [b v] of the last token of the prompt, of one process."""
    own, x, places = weights(kv_heads), weights(kv_heads)["table"][prompt()], torch.arange(TOKENS)
    for layer in range(LAYERS):
        q, k, v = (torch.einsum("sbh,adh->sbad", normed(x), own[name][layer]) for name in "qkv")
        out, _ = attended(rotated(q, places), rotated(k, places), v, places, places)
        x = x + torch.einsum("sbad,had->sbh", out, own["out"][layer])
        gate, up = torch.einsum("sbh,gfh->gsbf", normed(x), own["fc1"][layer])
        x = x + (functional.silu(gate) * up) @ own["fc2"][layer].T
    return normed(x)[-1] @ own["output"].T


class Rank:
    """One rank; weights, heads and tokens that it has follow from its coordinates."""

    def __init__(self, case: Served, groups: Groups) -> None:
        self.case, self.plan, self.groups = case, case.plan, groups
        self.decodes = case.phase == "decode"
        self.spread = self.plan.sequence_parallel and self.plan.tp > 1
        axis = "ring" if self.decodes and self.plan.ring > 1 else "tp"
        if axis == "ring" and self.plan.tp > 1:
            groups._groups["model", dist.get_world_size()] = dist.group.WORLD
            self.joint = dist.group.WORLD
        else:
            self.joint = groups.group(axis)
        self.own = {name: self._part(name, weight) for name, weight in weights(case.kv_heads).items()}
        self.keys: list[Tensor] = []
        self.cache: list[tuple[Tensor, Tensor]] = []

    def at(self, axis: str) -> int:
        return self.groups.coordinate(axis)

    @property
    def head_blocks(self) -> tuple[int, int]:
        """Blocks of heads that weights are cut in, and which is the own: ranks of a ring are neighbours."""
        inner = self.plan.ring if self.decodes else 1
        return self.plan.tp * inner, self.at("tp") * inner + (self.at("ring") if self.decodes else 0)

    def _part(self, name: str, weight: Tensor) -> Tensor:
        """Of a weight the part of this rank."""
        blocks, own = self.head_blocks
        if name in ("q", "out"):
            return weight.chunk(blocks, 1 if name == "q" else 2)[own]
        if name in ("k", "v"):
            return weight.chunk(min(blocks, weight.shape[1]), 1)[own * min(blocks, weight.shape[1]) // blocks]
        dim = {"table": 0, "output": 0, "fc1": 2, "fc2": 2}[name]
        return weight.chunk(blocks, dim)[self.place]

    @property
    def place(self) -> int:
        """In the group that cuts MLP and vocabulary."""
        return (self.at("ring") * self.plan.tp if self.decodes else 0) + self.at("tp")

    # Tokens

    def positions(self, begin: int, tokens: int, ring: int | None = None) -> Tensor:
        """Of a rank of the ring, before tp and ulysses cut them: pairs of chunks, first and last."""
        whole = torch.arange(begin, begin + tokens)
        if self.plan.ring == 1 or self.decodes:
            return whole
        ring, chunks = self.at("ring") if ring is None else ring, whole.chunk(2 * self.plan.ring)
        return torch.cat((chunks[ring], chunks[2 * self.plan.ring - 1 - ring]))

    def cut(self, x: Tensor) -> Tensor:
        """Tokens of a rank of ulysses, or of a decode its sequences."""
        dim = 1 if self.decodes else 0
        return x.chunk(self.plan.ulysses, dim)[self.at("ulysses")]

    # Collectives

    def summed(self, x: Tensor) -> Tensor:
        """Over ranks that share weights; with sequence parallelism each keeps a part of the tokens."""
        x = x.contiguous()
        if not self.spread:
            return start_all_reduce(x, self.joint).wait()
        x = x.transpose(0, 1) if self.decodes else x
        x = start_reduce_scatter(x, self.groups.group("tp")).wait()
        return x.transpose(0, 1) if self.decodes else x

    def whole(self, x: Tensor) -> Tensor:
        """All tokens that sequence parallelism has cut."""
        if not self.spread:
            return x
        x = x.transpose(0, 1) if self.decodes else x
        x = start_all_gather(x, self.groups.group("tp")).wait()
        return x.transpose(0, 1) if self.decodes else x

    def to_heads(self, x: Tensor, heads: int) -> Tensor:
        """From a part of the tokens to a part of the heads over ulysses; over a ring of a decode to all of `heads`
        that tp leaves.
        """
        if self.decodes and self.plan.ring > 1:
            if x.shape[2] == heads // self.plan.tp:
                return x  # all ranks of the ring have the same
            return start_all_gather(x.movedim(2, 0), self.groups.group("ring")).wait().movedim(0, 2)
        if self.plan.ulysses == 1:
            return x
        dim = 1 if self.decodes else 0
        parts = torch.stack(x.repeat_interleave(max(1, self.plan.ulysses // x.shape[2]), 2).chunk(self.plan.ulysses, 2))
        return torch.cat([*all_to_all(parts, self.groups.group("ulysses"))], dim)

    def to_tokens(self, x: Tensor) -> Tensor:
        if self.plan.ulysses == 1:
            return x
        parts = torch.stack(x.chunk(self.plan.ulysses, 1 if self.decodes else 0))
        return torch.cat([*all_to_all(parts, self.groups.group("ulysses"))], 2)

    def exchanged(self, outs: Tensor, totals: Tensor) -> Tensor:
        """Partial results [p ...], one part for each rank of the ring, merged."""
        ring, (p, *shape) = self.groups.group("ring"), outs.shape
        sent = torch.cat((outs.reshape(p, -1), totals.reshape(p, -1)), 1)
        got = all_to_all(sent, ring)
        size = outs[0].numel()
        return merged(got[:, :size].reshape(p, *shape), got[:, size:].reshape(p, *shape[:-1]))

    # Core attention

    def attend(self, q: Tensor, layer: int, places: Tensor, begin: int, tokens: int) -> Tensor:
        k, v = self.cache[layer]
        if self.plan.ring == 1:
            return attended(q, k, v, places, self.keys[layer])[0]
        if self.decodes:
            out, total = attended(q, k, v, places, self.keys[layer])
            return self.exchanged(*(torch.stack(x.chunk(self.plan.ring, 2)) for x in (out, total)))
        return (self._pass_q if self.plan.ring_pass == "q" else self._pass_kv)(q, layer, begin, tokens)

    def _pass_kv(self, q: Tensor, layer: int, begin: int, tokens: int) -> Tensor:
        ring, here = self.groups.group("ring"), self.at("ring")
        message, found = torch.stack(self.cache[layer]), []
        for step in range(self.plan.ring):
            ends = self.case.chunk or TOKENS
            source = (here - step) % self.plan.ring
            places = torch.cat([self.positions(at, min(ends, TOKENS - at), source) for at in range(0, begin + 1, ends)])
            own = self.positions(begin, tokens)
            found.append(attended(q, *message, own, places))
            if step < self.plan.ring - 1:
                message = start_exchange(message, ring).wait()
        return merged(torch.stack([out for out, _ in found]), torch.stack([total for _, total in found]))

    def _pass_q(self, q: Tensor, layer: int, begin: int, tokens: int) -> Tensor:
        ring, here = self.groups.group("ring"), self.at("ring")
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for step in range(self.plan.ring):
            source = (here - step) % self.plan.ring
            places = self.positions(begin, tokens, source)
            found[source] = attended(q, *self.cache[layer], places, self.keys[layer])
            if step < self.plan.ring - 1:
                q = start_exchange(q.contiguous(), ring).wait()
        ordered = [found[rank] for rank in range(self.plan.ring)]
        return self.exchanged(*(torch.stack(list(own)) for own in zip(*ordered, strict=True)))

    # Passes

    def embedded(self, ids: Tensor) -> Tensor:
        table = self.own["table"]
        if self.joint is None:
            return table[ids]
        local = ids - self.place * table.shape[0]
        inside = (local >= 0) & (local < table.shape[0])
        return self.summed(table[local.clamp(0, table.shape[0] - 1)] * inside[..., None])

    def layer(self, x: Tensor, layer: int, begin: int, tokens: int) -> Tensor:
        own = self.positions(begin, tokens)  # of all that heads are attended with
        cut = own if self.decodes else self.cut(own)
        wide = self.whole(normed(x))
        q, k, v = (torch.einsum("sbh,adh->sbad", wide, self.own[name][layer]) for name in "qkv")
        q, k = rotated(q, cut), rotated(k, cut)
        self.keep(layer, *(self.to_heads(new, self.case.kv_heads) for new in (k, v)), own)
        out = self.to_tokens(self.attend(self.to_heads(q, HEADS), layer, own, begin, tokens))
        x = x + self.reduced(torch.einsum("sbad,had->sbh", out, self.own["out"][layer]))
        gate, up = torch.einsum("sbh,gfh->gsbf", self.whole(normed(x)), self.own["fc1"][layer])
        return x + self.reduced((functional.silu(gate) * up) @ self.own["fc2"][layer].T)

    def reduced(self, x: Tensor) -> Tensor:
        return x if self.joint is None else self.summed(x)

    def keep(self, layer: int, k: Tensor, v: Tensor, places: Tensor) -> None:
        """What is new joins the cache, of a ring that decodes on the rank that has the last positions."""
        if self.decodes and self.at("ring") < self.plan.ring - 1:
            return
        before = self.cache[layer] if layer < len(self.cache) else None
        new = (k, v) if before is None else tuple(torch.cat(pair) for pair in zip(before, (k, v), strict=True))
        self.cache[layer : layer + 1] = [new]
        self.keys[layer : layer + 1] = [places if before is None else torch.cat((self.keys[layer], places))]

    def logits(self, x: Tensor, begin: int, tokens: int) -> Tensor:
        """[b v] of the last token, of a batch that is cut of the own sequences."""
        x = self.whole(normed(x))
        if self.decodes:
            x = x[0]
        else:
            mine = self.cut(self.positions(begin, tokens)) == begin + tokens - 1
            x = (x * mine[:, None, None]).sum(0)
            for axis in ("ulysses", "ring"):
                x = start_all_reduce(x, self.groups.group(axis)).wait()
        parts = start_all_gather((x @ self.own["output"].T).T, self.joint).wait()
        return parts.T

    def prefill(self) -> Tensor:
        size, ids = self.case.chunk or TOKENS, prompt()
        for begin in range(0, TOKENS, size):
            tokens = min(size, TOKENS - begin)
            x = self.embedded(self.cut(ids[self.positions(begin, tokens)]))
            for layer in range(LAYERS):
                x = self.layer(x, layer, begin, tokens)
        return self.logits(x, begin, tokens)

    def decode(self) -> Tensor:
        last = TOKENS - 1
        x = self.embedded(self.cut(prompt()[last:]))
        for layer in range(LAYERS):
            x = self.layer(x, layer, last, 1)
        return self.logits(x, last, 1)

    def fill(self) -> None:
        """The cache of all tokens before, as a prefill of one process leaves it."""
        whole = weights(self.case.kv_heads)
        x, places = whole["table"][prompt()[:-1]], torch.arange(TOKENS - 1)
        share = TOKENS // self.plan.ring
        begin = self.at("ring") * share
        blocks, block = self.plan.tp * self.plan.ulysses, self.at("tp") * self.plan.ulysses + self.at("ulysses")
        for layer in range(LAYERS):
            q, k, v = (torch.einsum("sbh,adh->sbad", normed(x), whole[name][layer]) for name in "qkv")
            q, k = rotated(q, places), rotated(k, places)
            heads = self.case.kv_heads
            parts = min(blocks, heads)
            own = [y[begin : begin + share].chunk(parts, 2)[block * parts // blocks] for y in (k, v)]
            self.cache.append((own[0], own[1]))
            self.keys.append(places[begin : begin + share])
            x = x + torch.einsum("sbad,had->sbh", attended(q, k, v, places, places)[0], whole["out"][layer])
            gate, up = torch.einsum("sbh,gfh->gsbf", normed(x), whole["fc1"][layer])
            x = x + (functional.silu(gate) * up) @ whole["fc2"][layer].T


def serve_here(case: Served) -> tuple[Tensor, Calls, int]:
    """Logits, collectives by axis, and bytes of the cache of a layer, in a process of `Processes`."""
    groups = groups_of(case.plan)
    rank = Rank(case, groups)
    if case.phase == "decode":
        rank.fill()
    with record_collectives(groups) as calls, torch.no_grad():
        logits = rank.decode() if case.phase == "decode" else rank.prefill()
    found: Calls = defaultdict(list)
    for call in calls:
        found[call.axis].append((call.collective, call.message_bytes, call.ranks))
    return logits, dict(found), sum(own.numel() * own.element_size() for own in rank.cache[0])
