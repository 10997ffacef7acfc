"""A traced module: its operators as a table, and its program under a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.profiles import load_profile
from spsim.program.instructions import Program
from spsim.program.operators import Operator
from spsim.pytorch.modules.costs import bytes_moved, operator_class
from spsim.pytorch.modules.emission import operators_of
from spsim.pytorch.modules.gradients import GRADIENTS, Gradients
from spsim.pytorch.modules.graph import Graph
from spsim.pytorch.modules.optimizers import OPTIMIZERS, OptimizerName
from spsim.pytorch.modules.reading import read_graph
from spsim.pytorch.modules.single import single_gpu_program
from spsim.pytorch.modules.splitting import split_forward, split_program
from spsim.pytorch.modules.tape import Call, Tape
from spsim.pytorch.modules.timing import TracedResult, simulate_program

NOT_SIMULATED = ("pp", "virtual_pp", "dp", "distributed_optimizer", "zero", "tp_overlap", "dp_overlap")
"""Options of a plan that concern more than one micro-batch of one module."""


class PassFlops(NamedTuple):
    """FLOPs by pass, as `torch.utils.flop_counter.FlopCounterMode` counts them."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Both passes."""
        return self.forward + self.backward


@dataclass(frozen=True, repr=False)
class TracedModule:
    """What a module runs and keeps in one forward and backward pass."""

    tape: Tape
    _programs: dict[Plan, Program] = field(default_factory=dict, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"TracedModule({self.name}: {self.parameters:,} parameters, {self.flops.total:,} FLOPs)"

    @property
    def name(self) -> str:
        """Class of the module."""
        return self.tape.name

    @cached_property
    def flops(self) -> PassFlops:
        """FLOPs of the forward and the backward pass."""
        return PassFlops(*(sum(call.flops for call in calls) for calls in (self.tape.forward, self.tape.backward)))

    @property
    def saved_bytes(self) -> int:
        """Bytes of the distinct storages that autograd keeps for the backward pass, parameters excluded."""
        return self.tape.saved_bytes

    @property
    def parameters(self) -> int:
        """Parameters that have gradients."""
        return self.tape.trainable

    @cached_property
    def operators(self) -> pd.DataFrame:
        """One row per operator that launches a kernel or keeps a tensor, in order of execution; a storage counts
        as saved where it is kept first.
        """
        kept: dict[int, int] = defaultdict(int)
        for storage, node in self.tape.kept.items():
            kept[node] += self.tape.storages[storage]
        rows = []
        for call in self.tape.calls:
            saved = kept.pop(call.node, 0) if call.phase == "forward" and call.node is not None else 0
            if call.launches or saved:
                rows.append(_row(call, saved))
        return pd.DataFrame(rows)

    def program(self, plan: Plan | str) -> Program:
        """The program of one rank under a plan; on one GPU the operators as they ran.

        Raises `InputError` for options that are not simulated, and where an operator cannot be split.
        """
        plan = parse_plan(plan) if isinstance(plan, str) else plan
        if plan not in self._programs:
            for option in NOT_SIMULATED:
                if getattr(plan, option) != type(plan).model_fields[option].default:
                    raise InputError(f"plan: {option} is not simulated for a traced module; leave it at its default")
            self._programs[plan] = self._compile(plan)
        return self._programs[plan]

    def _compile(self, plan: Plan) -> Program:
        if plan.gpus == 1 and plan.recompute == "none":
            return single_gpu_program(self.tape)
        if not self.tape.output_gradients:
            return split_forward(self.named_operators, plan, causal=self._graph.causal)
        wanted = any(gradient is not None for gradient in self.tape.input_gradients)
        return split_program(self.named_operators, plan, causal=self._graph.causal, input_gradient=wanted)

    @cached_property
    def _graph(self) -> Graph:
        return read_graph(self.tape)

    @cached_property
    def named_operators(self) -> tuple[Operator, ...]:
        """The forward pass as operators with named dimensions, which a plan splits.

        Raises `InputError` that names the first operator without a rule.
        """
        return operators_of(self._graph)

    def simulate(
        self,
        hardware: HardwareProfile | str | Path,
        plan: Plan | str = "",
        *,
        gradients: Gradients = "set_to_none",
        optimizer: OptimizerName = "adamw",
    ) -> TracedResult:
        """A training step of the module on a hardware profile under a plan: both passes, sums of gradients that ranks
        share, and the optimizer; of a module that was traced `forward_only` that pass.

        `gradients` of weights exist from when the backward pass writes them ("set_to_none", as after torch's
        `zero_grad`), or are there all along, added to, and cleared by a kernel ("kept"). The `optimizer` is torch's
        fused AdamW ("adamw"), its moments in the dtype of the parameters, or there is none: the passes alone ("none").

        Raises `InputError` as `program` does, and where the profile lacks the module's dtype or a curve.
        """
        _check("gradients", gradients, GRADIENTS)
        _check("optimizer", optimizer, OPTIMIZERS)
        plan = parse_plan(plan) if isinstance(plan, str) else plan
        profile = hardware if isinstance(hardware, HardwareProfile) else load_profile(hardware)
        return simulate_program(self.program(plan), self.tape, profile.eager, plan, gradients, optimizer)


def _check(option: str, value: object, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(f"{option}: {value!r} is not known; use one of {', '.join(known)}")


def _row(call: Call, saved: int) -> dict[str, object]:
    return {
        "module": call.module,
        "operator": call.op,
        "part": call.phase,
        "operator_class": operator_class(call),
        "shapes": " x ".join(str(list(value.shape)) for value in call.tensors),
        "dtype": next((value.dtype for value in (*call.results, *call.tensors)), ""),
        "flops": call.flops,
        "bytes_moved": bytes_moved(call),
        "saved_bytes": saved,
    }
