"""Embedding and head against real ones, as Megatron-Core runs them: collectives, kept bytes, losses and gradients."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from spsim import Plan, Workload
from spsim.inputs.plan import parse_plan
from spsim.inputs.workload import Precision
from spsim.program.assembly import embedding_program, head_program
from spsim.program.instructions import Communication, Program
from spsim.pytorch.layers import Groups, ParallelEmbedding, ParallelHead, record_collectives, record_saved
from tests.cases import model
from tests.truth.processes import Processes, groups_of, pretended_groups

GPT = {"dropout": 0.1, "max_positions": 48}
LLAMA = {"gated_mlp": True, "ffn_hidden": 96}
UNTIED = {"positions": "rope", "tied_embeddings": False, "head_bias": True, "dropout": 0.1}
MODELS = {"gpt": GPT, "llama": LLAMA, "untied": UNTIED}
PLANS = ("tp=2", "tp=2,sequence_parallel", "ulysses=2", "ring=2", "ring=2,ring_cut=contiguous")
TYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
TOLERANCE = 1e-11
S, B, H, V = 32, 3, 64, 512
"""Of the vocabulary 500 are used: the rest is padding, for tp 1, 2 and 4 alike."""


@dataclass(frozen=True)
class Around:
    """What stands around the layers of a small model; the same object goes to every process."""

    plan: Plan
    name: str
    precision: Precision = "bf16"
    dropout: float | None = None

    @property
    def model(self):
        traits = MODELS[self.name] if self.dropout is None else {**MODELS[self.name], "dropout": self.dropout}
        return model(hidden=H, heads=4, vocab=500, **traits)

    @property
    def programs(self) -> tuple[Program, Program]:
        """Of embedding and head."""
        workload = Workload(seq_len=S, micro_batch=B, precision=self.precision)
        return tuple(make(self.model, self.plan, workload) for make in (embedding_program, head_program))

    def blocks(self, groups: Groups, dtype: torch.dtype) -> tuple[ParallelEmbedding, ParallelHead]:
        return ParallelEmbedding(self.model, self.plan, groups, dtype), ParallelHead(
            self.model, self.plan, groups, dtype
        )


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets of all positions [s b]."""
    generator = torch.Generator().manual_seed(2)
    ids, targets = torch.randint(500, (2, S, B), generator=generator)
    return ids, targets


def seen(around: Around, groups: Groups) -> list[tuple[dict, list]]:
    """What is kept of each block, and the collectives of its passes."""
    embedding, head = around.blocks(groups, TYPES[around.precision])
    ids, targets = map(embedding.local_tokens, tokens())
    # As the layers would hand it over, with a storage of its own.
    hidden = embedding(ids).detach().clone().requires_grad_()
    found = []
    for block, inputs in ((embedding, (ids,)), (head, (hidden, targets))):
        with record_collectives(groups) as calls:
            with record_saved(block) as saved:
                out = block(*inputs)
            out.backward(torch.ones_like(out))
        kept: Counter[tuple[str, str]] = Counter()
        for tensor in saved.tensors:
            kept[tensor.operator, tensor.category] += tensor.bytes
        found.append((dict(kept), [(c.collective, c.axis, c.message_bytes, c.ranks, c.phase) for c in calls]))
    return found


def seen_here(around: Around) -> list[tuple[dict, list]]:
    """`seen` in a process of `Processes`."""
    return seen(around, groups_of(around.plan))


def derived(around: Around) -> list[tuple[dict, list]]:
    """The same of the simulator, with two habits of torch: an embedding under tp keeps which tokens are of other ranks,
    one byte each, and LayerNorm on CPU keeps its statistics in bf16 where its weights are.
    """
    found = []
    for program in around.programs:
        kept: Counter[tuple[str, str]] = Counter()
        for saved in program.saved:
            halved = saved.operator == "final_norm" and saved.category == "norm statistics"
            halved &= around.model.norm == "layernorm" and around.precision == "bf16"
            kept[saved.operator, saved.category] += saved.bytes // 2 if halved else saved.bytes
        if around.plan.tp > 1 and ("embedding", "token ids") in kept:
            kept["embedding", "mask"] = kept["embedding", "token ids"] // 8
        steps = [step for step in program.instructions if isinstance(step, Communication)]
        found.append((dict(kept), [(c.collective, c.axis, c.message_bytes, c.ranks, c.part) for c in steps]))
    return found


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_one_process(name: str, precision: Precision) -> None:
    around = Around(Plan(), name, precision)
    assert seen(around, Groups.create(around.plan)) == derived(around)


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", PLANS)
def test_two_processes(pair: Processes, plan: str, name: str, precision: Precision) -> None:
    around = Around(parse_plan(plan), name, precision)
    assert pair.run(seen_here, around) == 2 * [derived(around)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", ["tp=8", "tp=8,sequence_parallel", "tp=2,sequence_parallel,ulysses=2,ring=2"])
def test_degrees_that_no_test_machine_has(plan: str, name: str) -> None:
    """The last rank; groups that pretend."""
    around = Around(parse_plan(plan), name)
    with pretended_groups(around.plan, around.plan.gpus - 1) as groups:
        assert seen(around, groups) == derived(around)


# ------------------------------------------------------------ losses and gradients


@dataclass(frozen=True)
class Errors:
    """Of one rank from one process, relative to the largest value."""

    loss: float
    before_sync: dict[str, float]
    after_sync: dict[str, float]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()


def run(around: Around, groups: Groups) -> tuple[torch.Tensor, ParallelEmbedding, ParallelHead]:
    """Losses of this rank's tokens, after a backward pass; no layers between embedding and head."""
    embedding, head = around.blocks(groups, torch.float64)
    ids, targets = map(embedding.local_tokens, tokens())
    losses = head(embedding(ids), targets)
    losses.sum().backward()
    return losses.detach(), embedding, head


def errors(around: Around) -> Errors:
    """This rank, and the whole model in one process."""
    losses, *parts = run(around, groups_of(around.plan))
    whole, *singles = run(Around(Plan(), around.name, dropout=around.dropout), Groups.create(Plan()))

    def of_weights() -> dict[str, float]:
        found = {}
        for part, single in zip(parts, singles, strict=True):
            for name, parameter in part.named_parameters():
                wanted = part.local_weight(name, single.get_parameter(name).grad)
                found[f"{type(part).__name__} {name}"] = relative(parameter.grad, wanted)
        return found

    before = of_weights()
    for part, program in zip(parts, around.programs, strict=True):
        part.synchronise_gradients(program.weight_sync)
    return Errors(relative(losses, parts[0].local_tokens(whole)), before, of_weights())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("plan", PLANS)
def test_losses_and_gradients(pair: Processes, plan: str, name: str) -> None:
    """Equal on all ranks; and a weight is named by `weight_sync` exactly if its gradient needs it."""
    around = Around(parse_plan(plan), name, dropout=0.0)
    blocks = ("ParallelEmbedding", "ParallelHead")
    named = {f"{b} {s.weight}" for b, p in zip(blocks, around.programs, strict=True) for s in p.weight_sync}
    for rank in pair.run(errors, around):
        assert rank.loss < TOLERANCE
        assert max(rank.after_sync.values()) < TOLERANCE
        assert {name for name, error in rank.before_sync.items() if error > TOLERANCE} == named


def test_a_loss_is_that_of_torch() -> None:
    """Of one process, padding and all."""
    around = Around(Plan(), "untied", dropout=0.0)
    losses, embedding, head = run(around, Groups.create(Plan()))
    ids, targets = tokens()
    x = torch.nn.functional.layer_norm(
        embedding.weight("embedding")[ids], (H,), head.weight("final_norm"), head.bias("final_norm")
    )
    logits = x @ head.weight("output_layer").T + head.bias("output_layer")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    assert relative(losses.flatten(), expected.detach()) < TOLERANCE
    found = {name: weight.grad for name, weight in head.named_parameters()}
    head.zero_grad()
    expected.sum().backward()
    for name, weight in head.named_parameters():
        assert relative(found[name], weight.grad) < TOLERANCE
