"""Equal steps of a ring as a section that repeats: written out, it is the ring step by step."""

from dataclasses import replace

import pytest

from spsim.inputs.plan import parse_plan
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.blocks.transformer import LAYER_INPUT, transformer_layer
from spsim.program.compiler import compile_region
from spsim.program.instructions import Buffer, Communication, Compute, Program, Section
from spsim.program.lowerings.ring import lower_ring
from spsim.program.mesh import mesh_of
from spsim.program.operators import Operand, Operator
from spsim.program.region import Region
from spsim.program.sizes import Template, every_workload
from spsim.program.strategies import split_rules
from tests.cases import model

OPTIONS = ["", "recompute=selective", "recompute=full", "ulysses=2,recompute=selective", "tp=2,sequence_parallel"]
FORWARD = ["send_receive", "elementwise", "attention"]
BACKWARD = ["send_receive", "attention", "elementwise", "elementwise", "send_receive"]


def ring(plan, *, loops, causal=True, workload=None, operators=transformer_layer):
    """The program of a layer under a plan, with its rings as loops wherever there is one, or step by step."""
    plan = parse_plan(plan)
    written_out = 1 if loops else plan.ring
    layer = operators(model(heads=16, kv_heads=8, causal=causal), workload or Workload(seq_len=5040 * 16))
    region = Region(layer, split_rules(plan), mesh_of(plan))
    program = compile_region(region, plan, causal=causal)
    for op in (op for op in layer if op.kind == "attention"):
        kernels = region.kernels[op.name]
        program = lower_ring(program, plan, region.mesh, kernels, causal=causal, written_out=written_out)
    return program


def numbered_anew(program):
    """Instructions and buffers in order of appearance, and all else of a program with these numbers."""
    buffers, steps = {}, {}

    def buffer(found):
        alias = None if found.alias_of is None else buffers[found.alias_of]
        return replace(found, id=buffers.setdefault(found.id, len(buffers)), alias_of=alias)

    def instruction(step):
        reads = tuple(buffers[read] for read in step.reads)
        after = {"issued_after": tuple(steps[s] for s in step.issued_after)} if isinstance(step, Communication) else {}
        writes = tuple(map(buffer, step.writes))
        return replace(step, id=steps.setdefault(step.id, len(steps)), reads=reads, writes=writes, **after)

    outside = [tuple(map(buffer, own)) for own in (program.inputs, program.output_gradients)]
    passes = [tuple(map(instruction, own)) for own in (program.forward, program.backward)]
    ends = [tuple(map(buffer, own)) for own in (program.outputs, program.input_gradients)]
    assert len(steps) == len(program.instructions), "every instruction has a number of its own"
    return outside, passes, ends


def kinds(section):
    """What the instructions of a section are."""
    return [step.kind if isinstance(step, Compute) else step.collective for step in section.instructions]


def loops_of(sections):
    """(instructions, runs) of the sections that repeat."""
    return [(kinds(section), section.count) for section in sections if section.count > 1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("degree", range(2, 10))
def test_written_out_it_is_the_ring_step_by_step(degree, option, causal):
    """Kinds, sizes, order, what is read and written, categories, aliases, and what messages wait for."""
    plan = f"ring={degree},{option}"
    looped, flat = (ring(plan, loops=loops, causal=causal) for loops in (True, False))
    assert numbered_anew(looped) == numbered_anew(flat)
    assert [len(own) for own in (flat.forward_sections, flat.backward_sections)] == [1, 1]
    again = [(FORWARD, degree - 3)] if degree > 4 else []
    assert loops_of(looped.forward_sections) == again
    expected = [*(again if "recompute" in option else []), *([(BACKWARD, degree - 4)] if degree > 5 else [])]
    assert loops_of(looped.backward_sections) == expected


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("messages", ["joint", "concatenated", "separate"])
@pytest.mark.parametrize("option", ["ring_gradients=fp32", "ring_kind=gather_permute,recompute=full", ""])
@pytest.mark.parametrize("degree", [2, 3, 4, 7])
def test_rings_of_other_libraries_step_by_step(degree, option, messages, causal):
    """The same of gradients in fp32, of K and V that are gathered, and of messages of their own."""
    plan = f"ring={degree},ring_messages={messages},{option}"
    looped, flat = (ring(plan, loops=loops, causal=causal) for loops in (True, False))
    assert numbered_anew(looped) == numbered_anew(flat)
    assert len(loops_of(looped.backward_sections)) == (degree > 6) * (1 + ("recompute" in option)) or degree < 6


def test_few_equal_steps_are_written_out():
    """Which is less than the program of a long ring, whose equal steps stand there once."""
    short, long_ = (layer_program(model(heads=16, kv_heads=8), parse_plan(plan), Workload(seq_len=5040 * 16))
                    for plan in ("ring=10", "ring=14"))  # fmt: skip
    assert [len(own) for own in (short.forward_sections, short.backward_sections)] == [1, 1]
    assert [loops_of(own)[0][1] for own in (long_.forward_sections, long_.backward_sections)] == [11, 10]


@pytest.mark.parametrize("degree", [3, 8])
def test_a_contiguous_ring_has_no_equal_steps(degree):
    """Under a causal mask; without one its steps are those of any ring."""
    plan = f"ring={degree},ring_cut=contiguous"
    assert ring(plan, loops=True) == ring(plan, loops=False)
    assert bool(loops_of(ring(plan, loops=True, causal=False).forward_sections)) == (degree > 4)


def test_the_cuts_are_behind_attention_kernels():
    """A section ends with its last kernel; a run of the loop posts the next keys, merges what the kernel before left,
    and attends. The backward pass cuts behind the message of a whole step.
    """
    looped = ring("ring=8", loops=True)
    first, loop, last = looped.forward_sections
    assert kinds(first)[-4:] == ["send_receive", "attention", "send_receive", "attention"]
    assert kinds(last)[:3] == ["elementwise", "attention", "elementwise"]
    post, merge, attend = loop.instructions
    assert (post.issued_after, len(merge.writes)) == ((), 0)
    (found_keys, left_keys), (found_output, left_output) = loop.carried
    assert (post.reads, post.writes[0].id) == ((found_keys,), left_keys)
    assert found_output in merge.reads
    assert (attend.reads[-1], attend.writes[0].id) == (found_keys, left_output)
    first, loop, last = looped.backward_sections
    assert kinds(first)[-5:] == BACKWARD
    assert kinds(last)[:5] == ["attention", "elementwise", "elementwise", "send_receive", "elementwise"]
    assert [len(pair) for pair in loop.carried] == [2, 2]


def test_neither_program_nor_template_grows_with_the_ring():
    plans = ["ring=8", "ring=64", "ring=4096"]
    workload = every_workload(8192)
    programs = [ring(plan, loops=True, workload=workload) for plan in plans]
    templates = [Template(program, 8192) for program in programs]
    assert len({sum(len(section.instructions) for section in program.sections) for program in programs}) == 1
    assert len({(t.num_slots, len(t.index.buffers), len(t.coefficients), t.nbytes) for t in templates}) == 1


@pytest.mark.parametrize("plan", ["ring=3", "ring=9,recompute=full", "tp=2,ring=6"])
def test_a_template_knows_every_section_once(plan):
    """Sizes of each instruction of each section, loops not written out."""
    workload = Workload(seq_len=5040 * 48, micro_batch=3)
    looped = ring(plan, loops=True, workload=workload)
    template = Template(ring(plan, loops=True, workload=every_workload(5040)), 5040)
    values = template.at(workload).values
    steps = [step for section in looped.sections for step in section.instructions]
    assert template.index.slots.keys() == {step.id for step in steps}
    for step in steps:
        if isinstance(step, Communication):
            assert values[template.index.messages[step.id]] == step.message_bytes
        for buffer in step.writes:
            assert values[template.index.buffers[buffer.id]] == buffer.bytes


def two_layers(settings, workload):
    """Two layers in a row as one block."""
    first = transformer_layer(settings, workload)
    out = first[-1].results[0].tensor

    def renamed(name):
        return out.name if name == LAYER_INPUT else f"{name} again"

    def again(operands):
        return tuple(Operand(o.tensor._replace(name=renamed(o.tensor.name)), o.subscript) for o in operands)

    def names(own):
        return type(own)(map(renamed, own))

    second = (
        Operator(
            f"{op.name} again", op.kind, again(op.inputs), again(op.outputs), op.mixes, names(op.saves),
            names(op.owns_gather), names(op.passthrough), op.kernel,
        )
        for op in first
    )  # fmt: skip
    return (*first, *second)


@pytest.mark.parametrize("plan", ["ring=7", "ring=8,recompute=selective"])
def test_two_rings_in_a_block(plan):
    """Each has its own loop."""
    looped, flat = (ring(plan, loops=loops, operators=two_layers) for loops in (True, False))
    assert numbered_anew(looped) == numbered_anew(flat)
    assert len(loops_of(looped.forward_sections)) == 2


def test_a_loop_may_hand_on_what_its_runs_alias():
    """Runs have their own buffers; what comes after the loop reads those of the last."""
    start, sums = (Compute(n, "f", "elementwise", "forward", (None,), (), ()) for n in (0, 1))
    found, left = (Buffer(n, "x", 1, "temporary") for n in (0, 1))
    view = replace(left, id=2, alias_of=1)
    forward = (
        Section((replace(start, writes=(found,)),)),
        Section((replace(sums, reads=(0,), writes=(left, view)),), 3, ((0, 1),)),
        Section((Compute(2, "g", "elementwise", "forward", (None,), (1, 2), ()),)),
    )
    steps = Program(forward, (), (), (), 0, (), (), (), ()).forward
    assert [step.id for step in steps] == [0, 1, 3, 4, 2]
    assert [step.reads for step in steps] == [(), (0,), (1,), (3,), (5, 6)]
    assert [[(b.id, b.alias_of) for b in step.writes] for step in steps[1:4]] == [
        [(1, None), (2, 1)], [(3, None), (4, 3)], [(5, None), (6, 5)]
    ]  # fmt: skip
