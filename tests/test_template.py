"""Templates against direct compilation: every size of every program, and durations kernel by kernel."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spsim.costs.models import cost_models
from spsim.inputs.model import Model
from spsim.inputs.plan import parse_plan
from spsim.inputs.rules import check_shapes, sequence_unit
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.instructions import LAYER, Communication, Compute, Program
from spsim.program.mesh import mesh_of
from spsim.program.sizes import Template, every_workload
from spsim.step.itinerary import Run
from spsim.step.prepared import prepared_layer
from spsim.units import picoseconds
from spsim.work import MemoryBound
from tests.cases import A100, H100, random_plans, scenario

pytestmark = pytest.mark.slow

HUGE = Workload(seq_len=2**30, micro_batch=2**20)


@st.composite
def layers(draw):
    """(model, plan): any plan, GPT or Llama traits one by one, sizes without common factors."""
    text, any_attention = draw(random_plans())
    plan = parse_plan(text)
    degree = plan.tp * plan.ulysses
    heads = degree * draw(st.sampled_from([1, 2, 3]))
    fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (n % degree == 0 or degree % n == 0)]
    # With fewer than tp all of Q, K and V are cut evenly.
    fitting = [n for n in fitting if n >= plan.tp or (heads + 2 * n) % plan.tp == 0]
    gated = draw(st.booleans())
    model = Model(
        layers=2,
        hidden=draw(st.integers(1, 300)),
        heads=heads,
        kv_heads=draw(st.sampled_from(fitting)),
        head_dim=draw(st.integers(1, 40)),
        ffn_hidden=plan.tp * draw(st.integers(1, 99)),
        vocab=512,
        gated_mlp=gated,
        activation=draw(st.sampled_from(["swiglu", "geglu"] if gated else ["gelu", "squared_relu"])),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        positions=draw(st.sampled_from(["learned", "rope", "none"])),
        bias=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        parallel_residual=draw(st.booleans()),
        attention=draw(st.sampled_from(["flash", "unfused"] if any_attention else ["flash"])),
        causal=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        kernels=draw(st.sampled_from(["fused", "eager", "compiled"])),
        composite_norm=draw(st.booleans()),
        glu_offset=draw(st.booleans()),
        repeat_kv=draw(st.booleans()),
    )
    return model, plan


@st.composite
def cases(draw, longest=100):
    """(model, plan, workload) that pass the checks of a scenario."""
    model, plan = draw(layers())
    unit = sequence_unit(model, plan)
    workload = Workload(seq_len=unit * draw(st.integers(1, longest)), micro_batch=draw(st.integers(1, 9)))
    check_shapes(model, plan, workload)
    return model, plan, workload


def structure(step):
    """A step without its sizes."""
    writes = tuple(replace(buffer, bytes=0) for buffer in step.writes)
    if isinstance(step, Communication):
        return replace(step, message_bytes=0, sent_bytes=0, writes=writes)
    return replace(step, work=tuple(work and type(work) for work in step.work), writes=writes)


def kernels_of(template, values):
    """{slot: kernel}, each taken out of the arrays of its group; every slot belongs to one group."""
    found = {}
    for group in template.groups:
        many = group.work(values)
        for place, slot in enumerate(group.slots.tolist()):
            columns = {field.name: getattr(many, field.name) for field in fields(many)}
            own = {name: col[place] if isinstance(col, np.ndarray | tuple) else col for name, col in columns.items()}
            assert slot not in found
            found[slot] = type(many)(**own)
    return found


def assert_equals_compilation(model, plan, workload):
    """The same of the layer of a model."""
    template = prepared_layer(model, plan, True).template
    assert_equals_program(template, workload, layer_program(model, plan, workload))


def assert_equals_program(template, workload, program):
    """All that a template says of a workload is what compiling it gives, as integers."""
    numbers = template.at(workload)
    index, kernels, used = template.index, kernels_of(template, numbers.values), set()
    assert list(map(structure, template.program.instructions)) == list(map(structure, program.instructions))
    for step in program.instructions:
        if isinstance(step, Communication):
            assert numbers.values[index.messages[step.id]] == step.message_bytes
        else:
            used |= set(index.slots[step.id])
            assert [kernels[slot] if slot else None for slot in index.slots[step.id]] == list(step.work)
    assert used - {0} == kernels.keys(), "no kernel is left over"
    buffers = [*program.inputs, *program.output_gradients, *(b for step in program.instructions for b in step.writes)]
    assert {b.id: numbers.values[index.buffers[b.id]] for b in buffers} == {b.id: b.bytes for b in buffers}
    assert index.buffers.keys() == {buffer.id for buffer in buffers}
    assert numbers.saved == [saved.bytes for saved in program.saved]
    assert [replace(s, bytes=0) for s in template.program.saved] == [replace(s, bytes=0) for s in program.saved]
    assert numbers.at(numbers.template.indices[LAYER].weight_sync) == [sync.elements for sync in program.weight_sync]
    assert numbers.parameters() == program.parameters


@settings(max_examples=75, deadline=None, derandomize=True)
@given(cases())
def test_a_template_equals_compilation(case):
    """Random models, plans and workloads, number by number."""
    assert_equals_compilation(*case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers(), st.sampled_from([(2**30, 1), (2**30, 2**20), (2**24, 2**7), (2**16, 2**20)]))
def test_huge_workloads_are_exact(layer, sizes):
    """Sequences of 2^30 and batches of 2^20, whose scores have more than 2^63 bytes; integers, not floats."""
    model, plan = layer
    workload = Workload(seq_len=sizes[0], micro_batch=sizes[1])
    check_shapes(model, plan, workload)
    assert_equals_compilation(model, plan, workload)


def test_a_number_beyond_64_bits():
    """Unfused scores of HUGE: two bytes for each of 2^60 pairs, 2^20 sequences and 8 heads are 2^84 bytes."""
    model = Model(layers=1, hidden=64, heads=8, vocab=512, attention="unfused")
    template = prepared_layer(model, parse_plan(""), True).template
    numbers = template.at(HUGE)
    assert max(numbers.saved) == 2**84
    assert {type(value) for value in numbers.values} == {int}


def program_of_size(size):
    """A program without instructions whose parameters are of some size."""
    return Program((), (), (), (), size, (), (), (), ())


EVERY = every_workload(unit=6)
X, B = EVERY.seq_len // 6, EVERY.micro_batch


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=6, max_size=6), st.integers(1, 2**27), st.integers(1, 2**20))
def test_coefficients_are_read_off_the_bits(coefficients, x, b):
    """Of 1, x, x^2, b, xb and x^2b, up to 63 bits each, from one number."""
    sizes = (sum(c * m for c, m in zip(coefficients, basis(x, b), strict=True)) for x, b in ((X, B), (x, b)))
    template = Template(program_of_size(next(sizes)), 6)
    assert template.coefficients.tolist() == [coefficients]
    assert template.at(Workload(seq_len=6 * x, micro_batch=b)).parameters() == next(sizes)


def basis(x, b):
    return 1, x, x * x, b, x * b, x * x * b


@pytest.mark.parametrize("size", [B * B, X * B * B, X // 3, X - 1, (X - 1) * B, -X, 2**63, X * 2**64, math.isqrt(X)])
def test_what_is_no_polynomial_is_refused(size):
    """Higher powers, divisions that leave a rest, differences, and coefficients beyond 63 bits."""
    with pytest.raises(ArithmeticError):
        Template(program_of_size(size), 6)


@pytest.mark.parametrize("plan", ["", "tp=8,sequence_parallel", "ulysses=8", "ring=8", "ring=8,ring_cut=contiguous"])
def test_a_template_is_compiled_once(plan):
    """Workloads of one (model, plan) share it; another model or plan has its own."""
    small, large = scenario(plan, seq_len=1024), scenario(plan, seq_len=4096, micro_batch=3)
    layer = prepared_layer(small.model, small.plan, True)
    assert layer is prepared_layer(large.model, large.plan, True)
    assert layer is not prepared_layer(small.model, small.plan, False)
    assert layer is not prepared_layer(scenario(plan, hidden=512).model, small.plan, True)


# ------------------------------------------------------------ durations


def durations(model, plan, workload, hardware):
    """Seconds of every task by phase and ring position, one kernel and one collective at a time, and those of
    the prepared layer in picoseconds.
    """
    compute, comm = cost_models(hardware, "bf16")
    layer = prepared_layer(model, plan, False)
    numbers = layer.template.at(workload)
    chunk = [Run(LAYER, model.layers)]
    program, mesh = layer_program(model, plan, workload), mesh_of(plan)
    per_node = hardware.gpus_per_node
    arrays = layer.durations(numbers, compute, comm, gpus_per_node=per_node, chunk=chunk)

    def one(step, rank):
        if isinstance(step, Compute):
            work = step.work[mesh.coordinate(rank, "ring") if len(step.work) > 1 else 0]
            return float(compute.duration(work)) if work else 0.0
        nodes = {other // per_node for other in mesh.group(rank, (step.axis,))}
        if step.sends_before:  # so many sends of one batch start once
            before, both = (comm.time("send_receive", step.message_bytes, step.ranks, len(nodes), n) for n in (1, 2))
            return both - before
        return comm.duration(step.collective, step.message_bytes, step.ranks, len(nodes))

    phases = {"forward": program.forward, "backward": program.backward}
    slower = slowdown(compute, [step for steps in phases.values() for step in steps if isinstance(step, Compute)])

    def settled(step, rank):
        products = isinstance(step, Compute) and not any(isinstance(work, MemoryBound) for work in step.work)
        return one(step, rank) * (slower if products else 1.0)

    alone = {
        phase: {rank: [settled(step, rank) for step in steps] for rank in range(plan.gpus)}
        for phase, steps in phases.items()
    }
    prepared = {
        phase: {rank: list(times_of(layer.passes[phase], arrays, rank)) for rank in range(plan.gpus)}
        for phase in phases
    }
    return alone, prepared


def slowdown(compute, steps):
    """Of products and attention, by their share of the time of all kernels, a mean over the ring."""
    bound, free = (
        sum(
            sum(compute.duration(work) for work in step.work if work and isinstance(work, MemoryBound) == memory)
            / len(step.work)
            for step in steps
        )
        for memory in (False, True)
    )
    return float(compute.power.factor(bound, bound + free)) if compute.burst and bound else 1.0


def times_of(block, arrays, rank):
    """Picoseconds of the tasks of a rank in a pass, parts that repeat written out."""
    for part in block.parts:
        yield from part.runs * arrays[part.segment.name][rank]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases(longest=1000), st.sampled_from([A100, H100]))
def test_arrays_give_the_durations_of_single_kernels(case, name):
    """To the picosecond, on every rank."""
    alone, arrays = durations(*case, scenario(hardware=name).hardware)
    assert arrays == {
        phase: {rank: [picoseconds(s) for s in times] for rank, times in ranks.items()}
        for phase, ranks in alone.items()
    }


@pytest.mark.parametrize("plan", ["tp=8,ring=2", "ulysses=2,ring=8", "ring=16,ring_cut=contiguous", "ulysses=16"])
def test_durations_of_groups_over_nodes(plan):
    """Groups of ranks on as many nodes as their ranks are on, eight to a node."""
    case = scenario(plan, heads=16, hardware=H100)
    alone, arrays = durations(case.model, case.plan, case.workload, case.hardware)
    for phase, ranks in alone.items():
        assert arrays[phase] == {rank: list(map(picoseconds, times)) for rank, times in ranks.items()}


@pytest.mark.parametrize("plan", ["", "tp=8,sequence_parallel", "ulysses=8", "ring=8,ring_cut=contiguous"])
def test_durations_of_huge_workloads(plan):
    """Beyond 2^53 FLOPs a float is no longer exact: equal to twelve digits, and whole picoseconds."""
    model = Model(layers=1, hidden=1024, heads=8, vocab=512)
    alone, arrays = durations(model, parse_plan(plan), HUGE, scenario().hardware)
    for phase, ranks in alone.items():
        for rank, times in ranks.items():
            assert {type(ps) for ps in arrays[phase][rank]} == {int}
            assert arrays[phase][rank] == pytest.approx([s * 10**12 for s in times], rel=1e-12, abs=1)


def test_weight_gradients_of_all_layers_are_synchronised_together():
    """tp=2, ulysses=2, ring=2 of 3 layers: fp32 gradients of every weight over the 4 ranks that hold the same
    part of it; under sequence parallelism norms and biases that tp replicates also over tp.
    """
    case = scenario("tp=2,sequence_parallel,ulysses=2,ring=2", layers=3)
    layer = prepared_layer(case.model, case.plan, True)
    data, tp = layer.closing_messages(layer.template.at(case.workload), [Run(LAYER, case.model.layers)]).values()
    h, f = case.model.hidden, case.model.ffn_hidden
    split = (3 * h * h + 3 * h + h * h + h * f + f + f * h) // 2
    replicated = 2 * 2 * h + h + h
    assert data == 3 * 4 * (split + replicated)
    assert tp == 3 * 4 * replicated
