"""The strategies, one line each: along which dimension operators are split on each axis of the mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spsim.inputs.plan import Plan
from spsim.inputs.workload import Phase
from spsim.program.mesh import Axis


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Dimensions to split operators along on one axis: the first that an operator has and does not mix."""

    token_wise: tuple[str, ...]
    """For operators that do not mix positions."""
    position_mixing: tuple[str, ...]
    """For operators that have the key positions `j` among their dimensions."""
    shards_weights: bool = False
    """Weights that are used whole rest sharded, and are gathered for each use (ZeRO-3, Rajbhandari et al. 2020)."""


Rules = Mapping[Axis, SplitRule]
"""How the operators of a region are split on each axis."""


def split_rules(plan: Plan) -> dict[Axis, SplitRule]:
    """The whole of the strategies: Megatron tp (Shoeybi et al. 2019, with sequence parallelism Korthikanti
    et al. 2022), Ulysses (Jacobs et al. 2023), ring or context parallelism (Liu et al. 2023), data parallel.
    """
    tp = ("a", "f", "u", "v", "s") if plan.sequence_parallel else ("a", "f", "u", "v")
    return {
        "dp": SplitRule(("b",), ("b",)),
        "shard": SplitRule(("b",), ("b",)),
        "ep": SplitRule(("b",), ("b",)),
        "ring": SplitRule(("s",), ("s",)),
        "ulysses": SplitRule(("s",), ("a",)),
        "tp": SplitRule(tp, ("a",)),
    }


WHOLE_SEQUENCE, WHOLE_VOCABULARY, EXPERTS = "whole sequence", "whole vocabulary", "experts"


def serving_rules(plan: Plan, phase: Phase) -> dict[Axis, SplitRule]:
    """The same of inference. In a prefill the cache lies where its tokens have passed: core attention is split by its
    queries, which K and V go round to (pass-KV), or by its keys, to which queries go (pass-Q; Yang et al. 2024,
    arXiv:2411.01783). One new token has no sequence to split: ulysses, and tp with sequence parallelism, split the
    batch; ranks of a ring share the cache by its tokens and all weights as ranks of tp do (decode context parallelism
    of vLLM; Helix parallelism, Bhatia et al. 2025, arXiv:2507.07120).
    """
    if phase != "decode":
        keys = ("s", "j") if plan.ring_pass == "kv" else ("j",)
        return {**split_rules(plan), "ring": SplitRule(("s",), keys)}
    tp = ("a", "f", "u", "v", "b") if plan.sequence_parallel else ("a", "f", "u", "v")
    return {
        **split_rules(plan),
        "ring": SplitRule(("a", "f", "u", "v"), ("j",)),
        "ulysses": SplitRule(("b",), ("a",)),
        "tp": SplitRule(tp, ("a",)),
    }


def named_serving_rules(plan: Plan, phase: Phase) -> dict[str, Rules]:
    """Those of operators that name theirs: the last token of a prompt is picked from all that tp has, and of a logit
    each rank reads the whole vocabulary.
    """
    own, whole = serving_rules(plan, phase), SplitRule((), ())
    alone = serving_rules(plan.model_copy(update={"sequence_parallel": False}), phase)
    by_vocabulary: list[Axis] = [axis for axis, rule in own.items() if "v" in rule.token_wise]
    return {
        EXPERTS: {**own, **_of_experts(plan)},
        WHOLE_SEQUENCE: alone,
        WHOLE_VOCABULARY: {**own, **dict.fromkeys(by_vocabulary, whole)},
    }


def _of_experts(plan: Plan) -> dict[Axis, SplitRule]:
    """Of experts that are spread over ranks, or split along their width over tp."""
    spread: dict[Axis, SplitRule] = dict.fromkeys(("ep", *plan.expert_axes), SplitRule(("e",), ("e",)))
    return {"tp": SplitRule(("m",), ("m",)), **spread}


def named_rules(plan: Plan) -> dict[str, Rules]:
    """Rules of operators that name theirs. On a whole sequence: Megatron adds learned positions before it scatters the
    sequence over tp. On the whole vocabulary, too: a loss that reads gathered logits. Experts are spread over the ranks
    of ep, or split along their width over tp; their tokens come from wherever they lie.
    """
    return {
        EXPERTS: {**split_rules(plan), **_of_experts(plan)},
        WHOLE_SEQUENCE: split_rules(plan.model_copy(update={"sequence_parallel": False})),
        WHOLE_VOCABULARY: {**split_rules(plan), "tp": SplitRule((), ())},
    }
