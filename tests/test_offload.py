"""Activations that wait in host memory: hand-worked timelines, memory by the formulas, and the exact properties."""

from collections import Counter

import pytest

from spsim import Scenario, Workload, simulate
from spsim.errors import InputError
from spsim.inputs.model import LayerType
from spsim.inputs.plan import parse_plan
from spsim.inputs.profiles import load_profile
from spsim.program.assembly import layer_program
from spsim.program.instructions import HostCopy
from spsim.program.recompute import LayerKind, layer_kinds
from spsim.program.sizes import Template, every_workload
from tests.cases import model, result
from tests.test_folding import assert_equal

pytestmark = pytest.mark.slow

STATE = ("activation", "mask", "norm statistics", "log-sum-exp")


def linked(gb_per_s):
    """H100 with another link to its host."""
    profile = load_profile("dgx-h100")
    datasheet = profile.datasheet
    link = datasheet.host_link_gb_per_s.model_copy(update={"value": gb_per_s})
    return profile.model_copy(update={"datasheet": datasheet.model_copy(update={"host_link_gb_per_s": link})})


def run(plan, hardware, *, fold=True, layers=4, **traits):
    case = model(layers=layers, hidden=512, heads=8, **traits)
    return simulate(Scenario(hardware=hardware, model=case, plan=plan, workload=Workload(seq_len=2048)), fold=fold)


def copies(found):
    """(part, layer, start, end) of the copies of a rank, in picoseconds."""
    tasks = found.trace.tasks
    own = [span for span in found.trace.spans if span.rank == 0 and span.lane == "host"]
    return [(tasks[s.task].part, tasks[s.task].layer, s.start_ps, s.end_ps) for s in own]


def kernels(found, part, layer):
    """(first start, last end) of the kernels of a pass of a layer."""
    tasks = found.trace.tasks
    parts = {"forward": {"forward"}, "backward": {"dgrad", "wgrad", "backward", "accumulate"}}[part]
    own = [
        span
        for span in found.trace.spans
        if span.rank == 0
        and span.lane == "compute"
        and tasks[span.task].layer == layer
        and tasks[span.task].part in parts
    ]
    return min(span.start_ps for span in own), max(span.end_ps for span in own)


def test_kinds_of_layers():
    """The first layer fetches for none; the first that stays fetches for the last that left."""
    away, kept = LayerKind(leaves=True), LayerKind()
    fetching = LayerKind(fetches=True)
    kinds = layer_kinds(parse_plan("cpu_offload_layers=3"), 8 * [LayerType()])
    assert kinds == [(away, 1), (away._replace(fetches=True), 2), (fetching, 1), (kept, 4)]
    assert layer_kinds(parse_plan("cpu_offload_layers=1"), 2 * [LayerType()]) == [(away, 1), (fetching, 1)]


def test_copies_behind_kernels():
    """With a fast link a copy starts where the pass of its layer has ended; the copy back where that of the layer above
    starts. Nothing waits.
    """
    found, without = (run(plan, linked(10_000)) for plan in ("cpu_offload_layers=2", ""))
    size = without.program.saved_bytes(*STATE)
    length = round(size / 10)  # picoseconds at 10 bytes each
    assert found.step_time_s == without.step_time_s
    starts = [("forward", 0, kernels(found, "forward", 0)[1]), ("forward", 1, kernels(found, "forward", 1)[1])]
    starts += [("backward", 2, kernels(found, "backward", 2)[0]), ("backward", 1, kernels(found, "backward", 1)[0])]
    assert copies(found) == [(part, layer, start, start + length) for part, layer, start in starts]


def test_copies_over_a_slow_link_pace_the_backward_pass():
    """Copies queue on one lane; the layer whose activations come back starts what reads them when they are there."""
    found = run("cpu_offload_layers=2", linked(0.5))
    own = copies(found)
    length = own[0][3] - own[0][2]
    first = kernels(found, "forward", 0)[1]
    assert own[:2] == [("forward", 0, first, first + length), ("forward", 1, first + length, first + 2 * length)]
    assert own[2] == ("backward", 2, first + 2 * length, first + 3 * length)
    assert own[2][2] > kernels(found, "backward", 2)[1], "the link is busy with what leaves"
    assert kernels(found, "backward", 1)[1] > own[2][3]
    (_, layer, begin, end) = own[3]
    assert (layer, begin) == (1, own[2][3])
    assert kernels(found, "backward", 0)[1] > end
    assert found.exposed_comm_s > 0


@pytest.mark.parametrize(
    "traits", [{}, {"attention": "unfused", "dropout": 0.1}, {"gated_mlp": True, "ffn_hidden": 704}]
)
def test_memory_of_what_has_left(traits):
    """After the forward pass only the layers that stay are held; a fetched layer has its bytes again."""
    plan, layers = "tp=2,sequence_parallel", 5
    found = result(
        f"{plan},cpu_offload_layers=3", layers=layers, fold=False, hardware="dgx-h100", seq_len=512, **traits
    )
    size = result(plan, layers=layers, seq_len=512, **traits).program.saved_bytes(*STATE)
    tasks = found.trace.tasks
    forward = max(task for task, info in enumerate(tasks) if info.part == "forward")
    held = Counter()
    for change in found.trace.memory:
        held[change.rank] += change.bytes if change.task <= forward else 0
    assert held == {0: 2 * size, 1: 2 * size}
    assert sum(change.bytes for change in found.trace.memory) == 0
    copied = [info.message_bytes for info in tasks if info.purpose == "offload"]
    assert copied == 6 * [size]


PLANS = ["", "tp=4,sequence_parallel,tp_overlap", "ulysses=2,ring=2", "ring=4,ring_cut=contiguous"]


@pytest.mark.parametrize("link", [1000, 0.05])
@pytest.mark.parametrize("plan", PLANS)
def test_folded_equals_unfolded(plan, link):
    """Also where copies fall behind."""
    text = ",".join(filter(None, [plan, "cpu_offload_layers=3"]))
    run = {"hardware": linked(link), "layers": 6, "seq_len": 384, "global_batch": 2}
    assert_equal(*(result(text, fold=fold, **run) for fold in (True, False)))


def test_a_template_has_the_sizes_of_what_is_copied():
    """Of any workload."""
    kind = LayerKind(leaves=True, fetches=True)
    template = Template(layer_program(model(), parse_plan("tp=2"), every_workload(1), kind), 1)
    workload = Workload(seq_len=768, micro_batch=3)
    numbers = template.at(workload)
    program = layer_program(model(), parse_plan("tp=2"), workload, kind)
    steps = [step for step in program.instructions if isinstance(step, HostCopy)]
    assert [step.part for step in steps] == ["forward", "backward"]
    assert [numbers.values[template.index.messages[step.id]] for step in steps] == [s.message_bytes for s in steps]
    assert steps[0].message_bytes == layer_program(model(), parse_plan("tp=2"), workload).saved_bytes(*STATE)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("cpu_offload_layers=2,recompute=full", ["cpu_offload_layers", "recompute = 'full'", "keep one"]),
        ("cpu_offload_layers=4", ["cpu_offload_layers = 4", "use at most 3"]),
    ],
)
def test_refused(plan, words):
    with pytest.raises(InputError) as caught:
        run(plan, "dgx-h100")
    assert all(word in str(caught.value) for word in words)


def test_a_profile_without_a_link():
    with pytest.raises(InputError, match="host_link_gb_per_s"):
        run("cpu_offload_layers=1", "cpu-2")
