"""Which plans there are for a model on some GPUs: every option that is searched, and what it may be.

What the user's plan names is fixed. Of the rest:

| option | values | unless it is asked for |
|---|---|---|
| tp, ulysses | divisors of the GPUs | their product within a node |
| sequence_parallel | off and on | with tp alone |
| ring | divisors of the GPUs | up to `WIDEST_RING` |
| pp, virtual_pp | into equal chunks, embedding and loss a layer each or not | up to `MOST_CHUNKS` of a stage |
| dp | what is left of the GPUs | |
| ep, expert_tp | of a model with experts, what spreads them over tp (1), ulysses and ring and some of dp | |
| micro_batch | powers of two | up to `LARGEST_MICRO_BATCH` |
| recompute | none, selective, full | |
| how states are sharded | what the library has, see `STATES` | where there are ranks to shard over |
| ring_pass | kv and q | in a prefill over a ring |

Of inference there are neither stages, recomputation nor states, and each replica passes its share of the batch at once.

A plan that breaks a rule of a `Scenario` is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from spsim.errors import InputError
from spsim.inputs.hardware import HardwareProfile
from spsim.inputs.model import Model
from spsim.inputs.plan import Plan
from spsim.inputs.rules import keeps_sizes
from spsim.inputs.scenario import Scenario
from spsim.inputs.words import unknown_key
from spsim.inputs.workload import Workload, Workloads

WIDEST_RING = 64
MOST_CHUNKS = 8
LARGEST_MICRO_BATCH = 8
RECOMPUTE = ("none", "selective", "full")
STATES: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "megatron": ("distributed_optimizer", (False, True)),
    "deepspeed": ("zero", (0, 1, 2, 3)),
    "fsdp": ("zero", (2, 3)),
    "ddp": ("zero", (0,)),
}
"""By `dp_library`, the option that says what is sharded among replicas, and its values."""
MICRO_BATCH = "micro_batch"
"""The one setting of a workload that is searched."""
DEGREES = ("tp", "ulysses", "ring", "pp", "dp")
SPREAD = ("ep", "expert_tp")
"""Options that say where experts lie, searched together."""
Options = dict[str, Any]


def check_count(name: str, value: Any) -> None:
    """That a setting of a search is a whole number from 1 on; `InputError` otherwise."""
    if type(value) is not int or value < 1:
        raise InputError(f"plan: {name} = {value!r} is no whole number from 1 on; write for instance {name} = 512")


def sized(workload: Workload, seq_len: int, micro_batch: int) -> Workload:
    """The same with other sizes."""
    return workload.model_copy(update={"seq_len": seq_len, MICRO_BATCH: micro_batch})


@dataclass(frozen=True)
class Family:
    """A plan with the sizes of workloads that it can have."""

    scenario: Scenario
    """With the first of them."""
    workloads: Workloads
    """All of them, as arrays."""

    @property
    def plan(self) -> Plan:
        """That of the scenario."""
        return self.scenario.plan

    @property
    def micro_batches(self) -> npt.NDArray[np.int64]:
        """That a replica accumulates in a step, for each size."""
        found: npt.NDArray[np.int64] = self.scenario.global_batch // (self.workloads.micro_batch * self.plan.dp)
        return found


@dataclass
class Space:
    """The plans for a model on so many GPUs."""

    hardware: HardwareProfile
    model: Model
    workload: Workload
    """Whose `global_batch` is given; the micro-batch is searched unless it is, too."""
    gpus: int
    fixed: Options
    """Options of the user's plan."""
    values: Mapping[str, Sequence[Any]]
    """Options that are searched among these values."""
    refused: Counter[str] = field(default_factory=Counter, init=False)
    """Why plans are none, and how many, once families have been made."""

    def __post_init__(self) -> None:
        check_count("gpus", self.gpus)
        if self.workload.global_batch is None:
            raise InputError(
                "plan: global_batch is missing; plans are compared by steps of the same number of tokens: give it, on "
                "the command line as --global-batch"
            )
        for name, values in self.values.items():
            self._check(name, values)
        degrees = prod(self.fixed.get(name, 1) for name in DEGREES)
        if self.gpus % degrees:
            raise InputError(
                f"plan: gpus = {self.gpus} is no multiple of {degrees}, the product of the degrees that are fixed; "
                "give another number of GPUs, or leave one out of the plan"
            )

    def _check(self, name: str, values: Any) -> None:
        """That an option may have each of some values; `InputError` says which it may not."""
        if name not in (*Plan.model_fields, MICRO_BATCH):
            raise unknown_key("values", name, (*Plan.model_fields, MICRO_BATCH))
        if name in self.fixed:
            raise InputError(f"values: {name}: is fixed by the plan, too; keep one")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise InputError(f"values: {name} = {values!r} is no list of values; write for instance [1, 2, 4]")
        for place, value in enumerate(values):
            if value in values[:place]:
                raise InputError(f"values: {name}: has {value!r} twice; give each value once")
            if name == MICRO_BATCH:
                Workload(seq_len=self.workload.seq_len, micro_batch=value)
            else:
                Plan(**{name: value})

    @property
    def micro_batches(self) -> Sequence[int]:
        """Sequences of one, as they are searched."""
        powers = [2**n for n in range(LARGEST_MICRO_BATCH.bit_length())]
        given = [self.workload.micro_batch] if MICRO_BATCH in self.workload.model_fields_set else powers
        return self.values.get(MICRO_BATCH, given)

    def families(self, seq_lens: Sequence[int] | None = None) -> Iterator[Family]:
        """Every plan that keeps the rules with one of the sizes at least; of the workload's length unless given."""
        lengths = [self.workload.seq_len] if seq_lens is None else seq_lens
        sizes = [*product(lengths, self.micro_batches)]
        seq_len, micro_batch = (np.array(column, dtype=np.int64) for column in zip(*sizes, strict=True))
        every = Workloads(seq_len, micro_batch, self.workload.precision)
        for options in self._options():
            try:
                yield self._family(Plan(**options), every)
            except InputError as error:
                self.refused[str(error)] += 1

    def _family(self, plan: Plan, every: Workloads) -> Family:
        if self.is_served:
            return self._served(plan)
        keeps = keeps_sizes(self.model, plan, every, self.workload.global_batch)
        kept = Workloads(every.seq_len[keeps], every.micro_batch[keeps], every.precision)
        one = kept if keeps.any() else every
        workload = sized(self.workload, int(one.seq_len[0]), int(one.micro_batch[0]))
        return Family(Scenario(hardware=self.hardware, model=self.model, plan=plan, workload=workload), kept)

    @property
    def is_served(self) -> bool:
        """Whether plans are of inference."""
        return self.workload.phase != "training"

    def _served(self, plan: Plan) -> Family:
        """With the only size of workload that serves the batch."""
        batch = self.workload.global_batch or 1
        workload = sized(self.workload, self.workload.seq_len, max(1, batch // plan.dp))
        scenario = Scenario(hardware=self.hardware, model=self.model, plan=plan, workload=workload)
        seq_len, micro_batch = (np.array([size], dtype=np.int64) for size in (workload.seq_len, workload.micro_batch))
        return Family(scenario, Workloads(seq_len, micro_batch, workload.precision))

    # Options

    def _options(self) -> Iterator[Options]:
        """Options of every plan, none twice."""
        state, states = self._states
        named = (*DEGREES, *SPREAD, "virtual_pp", "sequence_parallel", "recompute", state, MICRO_BATCH)
        further = {name: values for name, values in self.values.items() if name not in named}
        for degrees in self._degrees():
            alone = degrees["dp"] * degrees["ulysses"] * degrees["ring"] == 1
            choices = {
                "sequence_parallel": self._sequence_parallel(degrees["tp"]),
                "recompute": self._of("recompute", RECOMPUTE),
                state: states[:1] if alone else states,
                **further,
            }
            if self.is_served:
                choices = {"sequence_parallel": choices["sequence_parallel"], **self._passes(degrees), **further}
            for spread, *chosen in product(self._spread(degrees), *choices.values()):
                yield {**self.fixed, **degrees, **spread, **dict(zip(choices, chosen, strict=True))}

    def _spread(self, degrees: Options) -> Sequence[Options]:
        """Over how many ranks experts may be spread, and whether ranks of tp are among them."""
        if self.model.experts is None:
            return [{}]
        found = []
        for expert_tp in self._of("expert_tp", (None, 1) if degrees["tp"] > 1 else (None,)):
            within = degrees["ulysses"] * degrees["ring"] * (degrees["tp"] if expert_tp == 1 else 1)
            spread = [within * n for n in range(1, degrees["dp"] + 1) if degrees["dp"] % n == 0]
            usual = [ep for ep in spread if ep > 1 and self.model.experts % ep == 0]
            alone = [] if expert_tp == 1 and degrees["tp"] > 1 else [1]
            found += [{"ep": ep, "expert_tp": expert_tp} for ep in self._of("ep", [*alone, *usual])]
        return found

    def _degrees(self) -> Iterator[Options]:
        """Degrees whose product is the number of GPUs, and chunks of a stage."""
        divisors = [n for n in range(1, self.gpus + 1) if self.gpus % n == 0]
        of = {name: self._of(name, [1] if name == "pp" and self.is_served else divisors) for name in DEGREES}
        rings = self._of("ring", [n for n in divisors if n <= WIDEST_RING])
        within = None if self._is_asked("tp", "ulysses") else self.hardware.gpus_per_node
        for tp, ulysses, ring, pp in product(of["tp"], of["ulysses"], rings, of["pp"]):
            dp, rest = divmod(self.gpus, tp * ulysses * ring * pp)
            if rest or dp not in of["dp"] or (within is not None and tp * ulysses > within):
                continue
            for chunks in self._chunks(pp):
                yield {"tp": tp, "ulysses": ulysses, "ring": ring, "pp": pp, "virtual_pp": chunks, "dp": dp}

    def _passes(self, degrees: Options) -> dict[str, Sequence[Any]]:
        """What goes round a ring of a prefill, unless it is searched anyhow."""
        turns = self.workload.phase == "prefill" and degrees["ring"] > 1
        return {"ring_pass": self._of("ring_pass", ("kv", "q"))} if turns else {}

    def _chunks(self, pp: int) -> Sequence[int]:
        """How many chunks a stage may have: such as make all chunks alike, unless others are asked for."""
        if pp == 1 and not self._is_asked("virtual_pp"):
            return [1]
        found = self._of("virtual_pp", range(1, MOST_CHUNKS + 1))
        if self._is_asked("virtual_pp", "pp_layout"):
            return found
        layers = self.model.layers
        even = [n for n in found if layers % (pp * n) == 0 or (layers + 2) % (pp * n) == 0]
        return even or ([1] if self._is_asked("pp") else [])

    def _sequence_parallel(self, tp: int) -> Sequence[bool]:
        """Without tp it has no effect; with experts it is needed."""
        usual = (True,) if self.model.experts else (False, True)
        return self._of("sequence_parallel", usual if tp > 1 else (self._usual.sequence_parallel,))

    @cached_property
    def _states(self) -> tuple[str, Sequence[Any]]:
        """The option that says what is sharded among replicas, and its values."""
        asked = [name for name in ("zero", "distributed_optimizer") if self._is_asked(name)]
        name, usual = (asked[0], ()) if asked else STATES[self._usual.dp_library]
        return name, self._of(name, usual)

    @cached_property
    def _usual(self) -> Plan:
        """What the user's plan says, and else its library."""
        return Plan(**self.fixed)

    def _is_asked(self, *names: str) -> bool:
        """Whether the user names an option."""
        return any(name in self.fixed or name in self.values for name in names)

    def _of(self, name: str, usual: Sequence[Any]) -> Sequence[Any]:
        """Values of an option."""
        return [self.fixed[name]] if name in self.fixed else self.values.get(name, usual)
