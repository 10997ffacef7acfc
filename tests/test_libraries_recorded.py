"""spsim sends and keeps what libraries were seen to send and keep, collective by collective and byte by byte.

`experiments/data/libraries.csv` was recorded of real libraries under gloo, without spsim; `experiments/libraries` holds
the scripts, the cases and what the words of the file mean.
"""

import csv
import runpy
from collections import Counter, defaultdict

import pytest

from spsim import Model, Scenario, Workload
from spsim.program.assembly import EMBEDDING, HEAD, step_programs
from spsim.program.blocks.optimizer import parameter_state
from spsim.program.instructions import LAYER, Communication
from spsim.program.mesh import world_of
from spsim.step.closing import Optimizer, closings
from spsim.step.gradients import Sync, gradient_syncs, read_again, sums_beside
from spsim.step.groups import replica_groups
from spsim.step.issue import block_passes
from spsim.step.replicas import parameters_of, synchronisation
from spsim.step.variants import ReplicaPasses
from tests.cases import H100
from tests.test_docs import ROOT

EXPERIMENTS = ROOT / "experiments"
CASES = {
    (case.library, case.name, case.ranks): case
    for case in runpy.run_path(str(EXPERIMENTS / "libraries" / "cases.py"))["read_cases"]()
}
ROWS = defaultdict(list)
with (EXPERIMENTS / "data" / "libraries.csv").open() as file:
    for row in csv.DictReader(file):
        ROWS[row["library"], row["case"], int(row["ranks"])].append(row)

CASE = pytest.mark.parametrize("key", CASES, ids=lambda key: " ".join(map(str, key)))


def test_all_cases_are_recorded():
    assert ROWS.keys() == CASES.keys()
    assert len({library for library, *_ in ROWS}) == 7
    assert sum(len(rows) for rows in ROWS.values()) >= 60


def derived(key):
    """The checked scenario of a case, and the programs of the blocks that it runs, in order."""
    case = CASES[key]
    scenario = Scenario(
        hardware=H100,
        model=Model(**case.model),
        plan=f"library={case.library},{case.plan}",
        workload=Workload(**case.workload),
    )
    found = step_programs(scenario.model, scenario.plan, scenario.workload)
    return scenario, {name: found[name] for name in ((EMBEDDING, LAYER, HEAD) if case.part == "model" else (LAYER,))}


# ------------------------------------------------------------ collectives of the passes


def recorded_calls(key, *passes):
    """Kind, bytes, dtype and pass of each collective in order."""
    return [
        (row["collective"].replace("permute", "send_receive"), int(row["message_bytes"]), row["dtype"], row["pass"])
        for row in ROWS[key]
        if row["pass"] in passes
        for _ in range(int(row["count"]))
    ]


def derived_calls(scenario, blocks, phase):
    """The same of a pass of the blocks, with what replicas send within it."""
    if scenario.plan.dp > 1:
        return [*calls_of_replicas(scenario, blocks, phase)]
    every = [getattr(program, phase) for program in blocks.values()]
    steps = (step for steps in every[:: 1 if phase == "forward" else -1] for step in steps)
    return [call_of(step, scenario.plan) for step in steps if isinstance(step, Communication)]


def call_of(step, plan):
    return step.collective, step.message_bytes, dtype_of(step, plan), step.part


def synchronised(scenario, blocks):
    """What replicas send for the weights of some blocks, the ends of the model first and last."""
    parameters = parameters_of(blocks.values())
    return synchronisation(parameters, scenario.plan, "bf16", root=frozenset({0, len(blocks) - 1}))


def calls_of_replicas(scenario, blocks, phase):
    """Of a pass of a micro-batch. A gather of the forward pass stands where it is waited for: torch's host issues it
    there, ahead of the device, on which it may begin as soon as the one before has arrived. That of the backward pass
    of a unit the host issues at the beginning of the unit before, as the device does.
    """
    sync = synchronised(scenario, blocks)
    passes = [block_passes(program, scenario.plan, name) for name, program in blocks.items()]
    woven = ReplicaPasses(sync, passes, replica_groups(scenario.plan))
    own = woven.forward(first=True) if phase == "forward" else woven.backward(last=True)
    segments = [own.before, *(part.segment for block in own.blocks for part in block.parts)]
    messages = (*sync.forward, *(message for own in sync.reductions for message in own.messages))
    types = {message.message_bytes: NAMES[message.itemsize] for message in messages}
    gathers = []
    for segment in segments:
        of_program = iter(segment.instructions)
        for task in segment.tasks:
            awaited = [need for need in task.needs if isinstance(need, str) or need in segment.added]
            if phase == "forward" and awaited and gathers:
                yield gathers.pop(0)
            if task.id not in segment.added:
                step = next(of_program)
                if isinstance(step, Communication):
                    yield call_of(step, scenario.plan)
                continue
            added = segment.added[task.id]
            call = (added.collective, added.message_bytes, types[added.message_bytes], phase)
            if phase == "forward":
                gathers.append(call)
            else:
                yield call


ITEMSIZE = {"bf16": 2, "fp32": 4}
NAMES = {size: name for name, size in ITEMSIZE.items()}
OF_LOSS = ("logits_max", "target_logit", "sum_exp")


def dtype_of(step, plan):
    """Activations and their gradients are in bf16, but for these."""
    if step.tensor == "position_ids":
        return "int64"
    in_fp32 = step.tensor in OF_LOSS or (step.tensor.endswith("gradient") and plan.sends_fp32_gradients)
    return "fp32" if in_fp32 else "bf16"


@CASE
def test_collectives_are_those_of_the_library(key):
    """In both passes, with what a recomputation issues within the backward pass, all in the order of issue."""
    scenario, blocks = derived(key)
    assert derived_calls(scenario, blocks, "forward") == recorded_calls(key, "forward")
    assert derived_calls(scenario, blocks, "backward") == recorded_calls(key, "backward", "recompute")


@CASE
def test_sums_of_gradients_are_those_of_the_library(key):
    """Of weights whose gradients are partial over tp: how many messages of how many bytes, in the type of gradients,
    which Megatron-Core has in fp32 and torchtitan without FSDP in bf16; with it they are summed before. Messages of the
    norm of all gradients are no sums of weights: as many numbers as there are parameters.
    """
    scenario, blocks = derived(key)
    summed = synchronised(scenario, blocks).summed_over_tp if scenario.plan.dp > 1 else frozenset()
    size = parameter_state(scenario.plan, ITEMSIZE["bf16"]).gradient
    syncs = sums_beside(gradient_syncs(blocks, scenario.plan, size), summed, blocks)
    found = Counter()
    for sync in (*syncs, *read_again(syncs)):
        elements = sum(blocks[block].weight_sync[index].elements for block, index in sync.weights)
        found[size * elements, NAMES[size]] += sync.readers or 1
    seen = Counter((moved, dtype) for _, moved, dtype, _ in recorded_calls(key, "step"))
    least = size * scenario.model.hidden
    assert found == Counter({call: count for call, count in seen.items() if call[0] >= least})


@pytest.mark.parametrize("key", [key for key, case in CASES.items() if "dp=" in case.plan], ids=str)
def test_norms_are_those_of_fsdp(key):
    """What clipping sums: a number of each weight, along each axis of the mesh."""
    scenario, blocks = derived(key)
    messages = synchronised(scenario, blocks).before_update
    assert [(m.collective, m.message_bytes) for m in messages] == [call[:2] for call in recorded_calls(key, "step")]


DTENSORS = [key for key, case in CASES.items() if case.library == "torchtitan" and "dp=" not in case.plan]


@pytest.mark.parametrize("key", DTENSORS, ids=str)
def test_a_step_of_dtensors_sums_as_the_library_does(key):
    """In order and bytes: partial gradients for clipping, a number of each weight, and the gradients for AdamW."""
    scenario, blocks = derived(key)
    size = parameter_state(scenario.plan, ITEMSIZE["bf16"]).gradient
    closed = closings(blocks, scenario.plan, world_of(scenario.plan), size, Optimizer(scenario.plan, "bf16"))
    found = []
    for sync in (step for own in closed for step in own.steps if isinstance(step, Sync)):
        weights = sum(blocks[block].weight_sync[index].elements for block, index in sync.weights)
        elements = weights + sync.elements + sum(count for _, count in sync.of_each)
        found += [(sync.collective, sync.itemsize * elements, NAMES[sync.itemsize], "step")] * (sync.readers or 1)
    assert found == recorded_calls(key, "step")


# ------------------------------------------------------------ what is kept


def recorded_bytes(key, word, dtype=None):
    """Kept of a kind, in a dtype or all."""
    own = (row for row in ROWS[key] if row["pass"] == "kept" and row["collective"] == word)
    return sum(int(row["kept_bytes"]) for row in own if dtype in (None, row["dtype"]))


def derived_bytes(key, category):
    """Kept of a category, of attention alone where that is all that a case runs."""
    _, blocks = derived(key)
    saved = (saved for program in blocks.values() for saved in program.saved if saved.category == category)
    return sum(own.bytes for own in saved if CASES[key].part != "attention" or own.operator == "attention")


@CASE
def test_activations_kept_are_those_of_the_library(key):
    """To the byte, once what only a CPU keeps is in the size that a GPU has: torch's RMSNorm has two fp32 copies there
    of the 16-bit input that its kernel keeps; a softmax that is a kernel of its own on a GPU has an fp32 output.
    """
    scenario, _ = derived(key)
    seen = recorded_bytes(key, "activations") + recorded_bytes(key, "norm in fp32 (CPU)") // 4
    if scenario.model.kernels == "eager":
        seen += recorded_bytes(key, "softmax in fp32 (CPU)")
    assert derived_bytes(key, "activation") == seen


@CASE
def test_statistics_kept_are_those_of_the_library(key):
    """Of norms, of a LayerNorm on the CPU in bf16 and on a GPU in fp32, and of fused attention."""
    of_norms = recorded_bytes(key, "norm statistics", "fp32") + 2 * recorded_bytes(key, "norm statistics", "bf16")
    assert derived_bytes(key, "norm statistics") == of_norms
    assert derived_bytes(key, "log-sum-exp") == recorded_bytes(key, "log-sum-exp")


@CASE
def test_probabilities_kept_are_those_of_the_library(key):
    assert derived_bytes(key, "probabilities") == recorded_bytes(key, "loss")
