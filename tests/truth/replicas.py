"""A small model trained by replicas on gloo, and the collectives that torch issues in its steps.

The model is that of `tests.test_replicas`: embedding, 4 pre-norm blocks, norm and head, in width 64.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCKS, WIDTH, VOCABULARY, TOKENS, MICRO_BATCHES = 4, 64, 512, 8, 2
NAMES = {
    "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce", "all_reduce": "all_reduce",
}  # fmt: skip
Calls = list[tuple[str, str, int]]
"""(micro-batch, collective, bytes of the whole), as `tests.test_variants` walks them."""


class Recorder(TorchDispatchMode):
    """Collectives of one rank in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = []
        self.micro_batch = "-"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a collective, and call it; of a DTensor those of its shards."""
        if DTensor in types:
            return NotImplemented
        if name := NAMES.get(func.overloadpacket.__name__):
            size = max(leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.calls.append((self.micro_batch, name, size))
        return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    """A pre-norm block with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.projection, self.norm2 = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[b s h]."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (12, -1)).transpose(1, 2).chunk(3, dim=1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Language(nn.Module):
    """Token ids to logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The loss of predicting each next token."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return nn.functional.cross_entropy(self.head(self.norm(x))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batches(step: int, rank: int) -> Iterator[Tensor]:
    """The token ids of each micro-batch of a replica."""
    for micro_batch in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(1000 * step + 10 * micro_batch + rank)
        yield torch.randint(VOCABULARY, (1, TOKENS), generator=generator)


def accumulate(
    model: nn.Module,
    step: int,
    recorder: Recorder,
    before_last: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Forward and backward pass of each micro-batch, those before the last under a context."""
    for number, ids in enumerate(batches(step, dist.get_rank()), start=1):
        recorder.micro_batch = str(number)
        with before_last() if number < MICRO_BATCHES else nullcontext():
            (model(ids) / MICRO_BATCHES).backward()
    recorder.micro_batch = "-"


def ddp(options: Mapping[str, Any]) -> Calls:
    """The third step under DDP, which has its buckets from the second on."""
    model = DistributedDataParallel(Language(), **options)
    for step in range(3):
        recorder = Recorder()
        with recorder:
            accumulate(model, step, recorder, model.no_sync)
        model.zero_grad()
    return recorder.calls


def fsdp(options: Mapping[str, Any]) -> Calls:
    """The second step under `fully_shard` of each layer and the rest."""
    model, mesh = Language(), init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, **(options if module is not model else {}))
    for step in range(2):
        recorder = Recorder()
        with recorder:
            accumulate(model, step, recorder)
            clip_grad_norm_(model.parameters(), 1.0)
        model.zero_grad()
    return recorder.calls


class ShardedAdam:
    """ZeRO stage 1 in torch's words: gradients in buckets of one buffer, each reduce-scattered as soon as it is whole
    in the last micro-batch; Adam on a shard, whose weights all ranks gather.
    """

    def __init__(self, model: nn.Module, bucket: int) -> None:
        """`bucket` is the number of elements at which one closes."""
        self.ranks, self.rank, self.ready, self.reducing = dist.get_world_size(), dist.get_rank(), 0, False
        self.buckets: list[list[nn.Parameter]] = [[]]
        for parameter in [*model.parameters()][::-1]:
            if sum(p.numel() for p in self.buckets[-1]) >= bucket:
                self.buckets.append([])
            self.buckets[-1].append(parameter)
            parameter.register_post_accumulate_grad_hook(self.arrived)
        self.waiting = [len(bucket) for bucket in self.buckets]
        self.place = {p: number for number, own in enumerate(self.buckets) for p in own}
        self.masters = [self.shard(self.flat(own)).clone().requires_grad_() for own in self.buckets]
        self.adam = torch.optim.Adam(self.masters, lr=1e-2)

    def flat(self, tensors: list[Any]) -> Tensor:
        """Of a bucket, its end padded to a multiple of 128."""
        whole = parameters_to_vector(tensors).detach()
        return nn.functional.pad(whole, (0, -len(whole) % 128))

    def shard(self, whole: Tensor) -> Tensor:
        """Of this rank."""
        return whole.chunk(self.ranks)[self.rank]

    def arrived(self, parameter: nn.Parameter) -> None:
        """The gradient of a weight has been accumulated."""
        number = self.place[parameter]
        if self.reducing:
            self.waiting[number] -= 1
            if not self.waiting[number]:
                whole = self.flat([p.grad for p in self.buckets[number]]) / self.ranks
                self.masters[number].grad = torch.empty_like(self.masters[number])
                dist.reduce_scatter_tensor(self.masters[number].grad, whole)

    def step(self) -> None:
        """The norm of all gradients, the update, and the gathers of what it wrote."""
        norm = sum((master.grad.square().sum() for master in self.masters), torch.zeros(()))
        dist.all_reduce(norm)
        self.adam.step()
        for own, master in zip(self.buckets, self.masters, strict=True):
            whole = torch.empty(len(master) * self.ranks)
            dist.all_gather_into_tensor(whole, master.detach())
            vector_to_parameters(whole, own)
            for parameter in own:
                parameter.grad = None
        self.waiting = [len(bucket) for bucket in self.buckets]


def zero_1(bucket: int) -> tuple[Calls, float, float]:
    """The second step under ZeRO stage 1, and by how much weights are then and would have moved, at most, beside those
    of one process that has all batches.
    """
    model = Language()
    optimizer = ShardedAdam(model, bucket)
    for step in range(2):
        recorder = Recorder()
        with recorder:
            for number, ids in enumerate(batches(step, dist.get_rank()), start=1):
                recorder.micro_batch, optimizer.reducing = str(number), number == MICRO_BATCHES
                (model(ids) / MICRO_BATCHES).backward()
            recorder.micro_batch = "-"
            optimizer.step()
    alone, start = Language(), parameters_to_vector(Language().parameters())
    adam = torch.optim.Adam(alone.parameters(), lr=1e-2)
    for step in range(2):
        losses = [alone(ids) for rank in range(dist.get_world_size()) for ids in batches(step, rank)]
        (sum(losses, torch.zeros(())) / len(losses)).backward()
        adam.step()
        adam.zero_grad()
    expected = parameters_to_vector(alone.parameters())
    found = parameters_to_vector(model.parameters())
    return recorder.calls, float((found - expected).abs().max()), float((start - expected).abs().max())
