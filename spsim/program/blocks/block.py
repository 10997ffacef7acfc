"""What all blocks are written with: tensors whose sizes follow from their dimensions, and operators in order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from spsim.inputs.model import Model
from spsim.inputs.workload import Workload
from spsim.program.blocks.ways import Way, ways_of
from spsim.program.launches import Launches
from spsim.program.operators import Grouping, Operand, Operator, Tensor, TensorKind, parse
from spsim.program.placement import Extent, Heads, factors
from spsim.work import FP32_BYTES, AttentionKernel, Framework, KernelClass, KernelName


class Sizes(dict[str, Extent]):
    """Sizes of dimensions; those of products follow: s times b times k over e, of `s*b*k/e`."""

    def __missing__(self, dim: str) -> Extent:
        over = math.prod([self[own] for own in dim.split("/")[1:]])
        self[dim] = Fraction(math.prod([self[own] for own in factors(dim)])) / over
        return self[dim]


class Block:
    """Collects the operators of one block."""

    def __init__(self, sizes: Mapping[str, Extent], element_bytes: int) -> None:
        self.sizes = Sizes(sizes)
        self.element_bytes = element_bytes
        self.operators: list[Operator] = []

    def tensor(
        self,
        name: str,
        dims: str,
        kind: TensorKind = "activation",
        itemsize: int | None = None,
        heads: Extent = 0,
    ) -> Tensor:
        """A tensor whose sizes follow from its dimensions; `heads` overrides the number of heads (K and V),
        `itemsize` the bytes of an element.
        """
        names = tuple(dims.split())
        sizes = tuple(heads if dim == "a" and heads else self.sizes[dim] for dim in names)
        return Tensor(name, names, sizes, itemsize or self.element_bytes, kind)

    def weight(self, name: str, dims: str, heads: Extent = 0) -> Tensor:
        """A weight, likewise."""
        return self.tensor(name, dims, "weight", heads=heads)

    def add(
        self,
        name: str,
        kind: KernelClass,
        signature: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        mixes: str = "",
        saves: Sequence[Tensor] = (),
        owns_gather: Sequence[Tensor] = (),
        passthrough: Sequence[Tensor] = (),
        kernel: KernelName | None = None,
        launches: Launches | None = None,
        attention_kernel: AttentionKernel | Framework = "transformer_engine",
        window: int | None = None,
        documents: tuple[int, ...] | None = None,
        rules: str = "",
        group: Grouping | None = None,
        in_place: bool = False,
    ) -> None:
        """Append an operator; auxiliary outputs (masks, statistics) are read in their own dimensions."""
        left, right = parse(signature)
        right += tuple(tensor.dims for tensor in outputs[len(right) :])
        self.operators.append(
            Operator(
                name=name,
                kind=kind,
                inputs=tuple(Operand(t, s) for t, s in zip(inputs, left, strict=True)),
                outputs=tuple(Operand(t, s) for t, s in zip(outputs, right, strict=True)),
                mixes=frozenset(mixes.split()),
                saves=tuple(tensor.name for tensor in saves),
                owns_gather=frozenset(tensor.name for tensor in owns_gather),
                passthrough=frozenset(tensor.name for tensor in passthrough),
                kernel=kernel,
                launches=launches,
                attention_kernel=attention_kernel,
                window=window,
                documents=documents,
                rules=rules,
                group=group,
                in_place=in_place,
            )
        )


class ModelBlock(Block):
    """A block of a model; sizes come from the model and the workload, of a micro-batch of all replicas."""

    def __init__(self, model: Model, workload: Workload, replicas: int, **sizes: Extent) -> None:
        """`sizes` are those of dimensions that not all blocks have."""
        common = {
            "s": workload.seq_len, "j": workload.seq_len, "b": workload.micro_batch * replicas,
            "h": model.hidden, "a": Heads(model.heads, model.kv_heads), "d": model.v_head_dim, "g": 2,
            "f": model.ffn_hidden,
        }  # fmt: skip
        super().__init__(common | sizes, workload.element_bytes)
        self.model = model
        self.ways = ways_of(model, self.element_bytes)

    def kept(self, way: Way, out: Tensor, *usual: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What a module keeps, `usual` where it is one kernel, and the tensors among that which nobody else reads."""
        further = [
            self.tensor(f"{out.name}_{own.name}", "", "intermediate")._replace(
                dims=out.dims, sizes=out.sizes, itemsize=FP32_BYTES if own.fp32 else self.element_bytes
            )
            for own in (*way.instead, *way.beside)
        ]
        return [*(() if way.instead else usual), *further], further

    def norm(self, name: str, x: Tensor, over: str = "h") -> Tensor:
        """LayerNorm keeps its input and fp32 mean and reciprocal deviation, RMSNorm the latter only."""
        weights, out, statistics, kernel = self.norm_parts(name, over)
        kept, further = self.kept(self.ways.norm, out, x)
        self.add(
            name, "norm", f"s b {over}{f', {over}' * len(weights)} -> s b {over}", [x, *weights],
            [out, statistics, *further], mixes=over, saves=[*kept, statistics], kernel=kernel,
            launches=self.ways.norm.launches,
        )  # fmt: skip
        return out

    def norm_parts(self, name: str, over: str = "h") -> tuple[list[Tensor], Tensor, Tensor, KernelName]:
        """Weights of a norm, what it makes, its statistics, and its kernel."""
        layernorm, own = self.model.norm == "layernorm", ("weight", "bias") if self.model.norm_bias else ("weight",)
        weights = [self.weight(f"{name}_{part}", over) for part in own]
        statistics = self.tensor(f"{name}_statistics", "s b", "norm statistics", itemsize=8 if layernorm else 4)
        return weights, self.tensor(f"{name}_out", f"s b {over}"), statistics, "layer_norm" if layernorm else "rms_norm"

    def rope(self, name: str, x: Tensor) -> Tensor:
        """Rotary positions (Su et al. 2021): runs on a shard, given the global positions of its tokens.

        A rotation of a part of the head reads and writes all of it.
        """
        width = x.dims[-1]
        out = self.tensor(f"{x.name}_rotated", f"s b a {width}", heads=x.sizes[2])
        table = self.tensor("rotations", f"s {width}", "constant")
        self.add(
            name, "elementwise", f"s b a {width}, s {width} -> s b a {width}", [x, table], [out], mixes=width,
            kernel="rope", launches=self.ways.rope.launches,
        )  # fmt: skip
        return out

    def dropout(self, name: str, x: Tensor) -> Tensor:
        """Dropout with a mask of one byte an element."""
        dims = " ".join(x.dims)
        out = self.tensor(f"{name}_out", dims)
        mask = self.tensor(f"{name}_mask", dims, "mask", itemsize=1)
        self.add(name, "dropout", f"{dims} -> {dims}", [x], [out, mask], saves=[mask], kernel="dropout")
        return out
