"""What is recomputed: modules by closed forms and against real torch, units of layers against layers one by one."""

from collections import Counter
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from spsim import Scenario, simulate
from spsim.inputs.grid import Grid
from spsim.inputs.model import LayerType, Model
from spsim.inputs.plan import Plan, parse_plan
from spsim.inputs.rules import sequence_unit
from spsim.inputs.step_rules import MODULES as NAMES
from spsim.inputs.workload import Workload
from spsim.program.assembly import layer_program
from spsim.program.blocks.transformer import Layer
from spsim.program.compiler import compile_region
from spsim.program.instructions import Communication, Compute
from spsim.program.mesh import Mesh
from spsim.program.recompute import MODULES, LayerKind, layer_kinds
from spsim.program.region import Region
from spsim.program.sizes import Template, every_workload
from spsim.program.strategies import split_rules
from spsim.simulation import simulate_many
from tests.cases import model, program, result, scenario
from tests.test_activation_bytes import FLASH, GPT, LLAMA, SHAPES, few_shapes, random_shapes
from tests.test_folding import assert_equal
from tests.test_template import assert_equals_program

pytestmark = pytest.mark.slow

FULL, KEPT = LayerKind(("layer",)), LayerKind()


# ------------------------------------------------------------ modules


@random_shapes
@given(SHAPES)
def test_bytes_kept_beside_modules(x):
    """Of 34S: the MLP keeps its input alone, 18S (of GeLU 8S and fc2 8S nothing); its activation keeps what GeLU reads,
    26S; of the norms only the inputs stay, 30S. Statistics go with the norms.
    """
    kept = {"core_attn": 34, "mlp": 18, "mlp_act": 26, "layernorm": 30, "layernorm+mlp_act": 22, "core_attn+mlp": 18}
    for modules, of_s in {**kept, "core_attn+mlp+layernorm": 14, "mlp+mlp_act": 18}.items():
        plan = f"recompute=selective,recompute_modules={modules}"
        assert x.kept(plan, **FLASH) == of_s * x.S
        assert x.t * x.kept(f"tp={{t}},sequence_parallel,{plan}", **FLASH) == of_s * x.S
        assert x.kept(plan, **GPT) == of_s * x.S + (0 if "core_attn" in modules else 5 * x.A)
        statistics = 0 if "layernorm" in modules else 16 * x.s * x.b
        assert x.program(plan, **FLASH).saved_bytes("norm statistics") == statistics


@few_shapes
@given(SHAPES)
def test_bytes_kept_beside_modules_of_a_gated_mlp(x):
    """SwiGLU keeps gate and up, 4 s b f, and fc2 its input, 2 s b f; the norms' results are 4S, whole under tp."""
    f = 3 * x.t
    base = x.kept("tp={t}", ffn_hidden=f, **LLAMA)
    saved = {"mlp": 6 * x.s * x.b * f, "mlp_act": 2 * x.s * x.b * f, "layernorm": 4 * x.t * x.S}
    for modules, less in saved.items():
        plan = f"tp={{t}},recompute=selective,recompute_modules={modules}"
        assert x.t * (base - x.kept(plan, ffn_hidden=f, **LLAMA)) == less


PLANS = ["", "tp=4", "tp=4,sequence_parallel", "tp=4,sequence_parallel,keep_gathered", "ulysses=2,ring=2"]


@pytest.mark.parametrize("modules", ["mlp", "layernorm", "layernorm+mlp_act", "core_attn+layernorm+mlp"])
@pytest.mark.parametrize("plan", PLANS)
def test_the_engine_holds_what_is_kept(plan, modules):
    """After three layers three times the saved bytes; folded as not."""
    text = ",".join(filter(None, [plan, f"recompute=selective,recompute_modules={modules}"]))
    found, folded = (result(text, layers=3, gated_mlp=True, ffn_hidden=704, fold=fold) for fold in (False, True))
    last = 3 * len(found.program.forward) - 1
    held = Counter()
    for change in found.trace.memory:
        held[change.rank] += change.bytes if change.task <= last else 0
    expected = 3 * found.program.saved_bytes("activation", "mask", "norm statistics", "log-sum-exp")
    assert dict(held) == dict.fromkeys(range(found.scenario.plan.gpus), expected)
    assert folded.to_json()["peak_memory_gib"] == found.to_json()["peak_memory_gib"]
    assert folded.step_time_s == found.step_time_s


def test_hardware_flops_count_what_runs_again():
    """A gated MLP is three products of h x f, forward once more; recomputed norms and activations count nothing."""
    plans = ("none", "selective,recompute_modules=mlp", "selective,recompute_modules=layernorm+mlp_act")
    none, mlp, others = (
        result(f"recompute={plan}", gated_mlp=True, ffn_hidden=704, layers=2).amounts.executed for plan in plans
    )
    assert mlp - none == 2 * 2 * 256 * 256 * 704 * 3
    assert others == none


def sublayer():
    """Norm, MLP and residual, without biases or dropout: 8 tokens of 16, MLP of 32."""
    layer = Layer(model(hidden=16, heads=2, ffn_hidden=32, bias=False), Workload(seq_len=8), 1, "fused")
    x = layer.tensor("layer_input", "s b h")
    layer.residual("residual2", layer.mlp(layer.norm("norm2", x)), x)
    return layer.operators


def of_spsim(modules):
    """(bytes kept, operators of the backward pass in order, those run again apart)."""
    plan = Plan(recompute="selective" if modules else "none", recompute_modules=modules)
    program = compile_region(Region(sublayer(), split_rules(plan), Mesh({})), plan, causal=False)
    steps = [
        (step.operator, step.part == "recompute")
        for step in program.backward
        if isinstance(step, Compute)
        and step.kind in ("gemm", "norm", "elementwise")
        and "gradient" not in step.operator
    ]
    return program.saved_bytes("activation"), [step for step, _ in groupby(steps)]


@pytest.mark.parametrize("modules", [None, "mlp", "mlp_act", "layernorm", "layernorm+mlp_act", "layernorm+mlp"])
def test_a_sublayer_of_torch(modules):
    """Kept bytes and the order of kernels in the backward pass, as Megatron-Core builds its checkpoints."""
    torch = pytest.importorskip("torch")
    assert of_spsim(modules) == of_torch(torch, (modules or "").split("+"))


def of_torch(torch, modules):
    """The same of modules of torch: `torch.utils.checkpoint` for the MLP, `_discarding` for norm and activation."""
    dtype = torch.bfloat16
    norm = torch.nn.LayerNorm(16, bias=True, dtype=dtype)
    fc1, fc2 = (torch.nn.Linear(*sides, bias=False, dtype=dtype) for sides in ((16, 32), (32, 16)))
    weights = {p.untyped_storage().data_ptr() for module in (norm, fc1, fc2) for p in module.parameters()}
    kept = {}

    def pack(tensor):
        own = tensor.untyped_storage().data_ptr() not in weights
        if own and tensor.numel() > 8:  # beyond one number a token: on a CPU statistics are of the same dtype
            kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    def mlp(x):
        inner = fc1(x)
        active, discard = _discarding(torch, torch.nn.functional.gelu, inner, on="mlp_act" in modules)
        out = fc2(active)
        discard(out)
        return out

    again = torch.utils.checkpoint.checkpoint if "mlp" in modules else lambda run, x, **_: run(x)
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        normed, discard = _discarding(torch, norm, x, on="layernorm" in modules)
        made = again(mlp, normed, use_reentrant=True)
        discard(made)
        out = made + x
    size = sum(storage.nbytes() for storage in {s.data_ptr(): s for s in kept.values()}.values())
    with _recorded(torch, fc1, fc2) as steps:
        out.backward(torch.ones_like(out))
    return size, [step for step, _ in groupby(steps)]


def _discarding(torch, run, x, *, on):
    """A result that is discarded when its reader has run, and made again before the gradient of what that made: the
    rules of Megatron-Core's `CheckpointWithoutOutput`.
    """
    if not on:
        return run(x), lambda _: None
    made = SimpleNamespace()

    class Checkpoint(torch.autograd.Function):
        @staticmethod
        def forward(ctx, given):
            ctx.save_for_backward(given)
            made.ctx = ctx
            return run(given)

        @staticmethod
        def backward(ctx, gradient):
            torch.autograd.backward(made.again, gradient)
            return made.given.grad

    def recompute(_):
        (given,) = made.ctx.saved_tensors
        made.given = given.detach().requires_grad_()
        with torch.enable_grad():
            made.again = run(made.given)
        made.output.untyped_storage().resize_(made.again.untyped_storage().nbytes())
        with torch.no_grad():
            made.output.copy_(made.again)

    def discard(reader):
        made.output = output.detach()
        output.untyped_storage().resize_(0)
        reader.register_hook(recompute)

    output = Checkpoint.apply(x)
    return output, discard


def _recorded(torch, fc1, fc2):
    """A list of (operator, whether it runs forward again) while it lasts."""
    from torch.utils._python_dispatch import TorchDispatchMode

    steps = []
    tables = {fc1.weight.untyped_storage().data_ptr(): "fc1", fc2.weight.untyped_storage().data_ptr(): "fc2"}
    sides = {(32, 16): "fc1", (16, 32): "fc2"}
    named = {
        "native_layer_norm": ("norm2", True), "native_layer_norm_backward": ("norm2", False),
        "gelu": ("gelu", True), "gelu_backward": ("gelu", False),
    }  # fmt: skip

    class Mode(TorchDispatchMode):
        def __enter__(self):
            super().__enter__()
            return steps

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.__name__.partition(".")[0]
            out = function(*args, **(kwargs or {}))
            if name in named:
                steps.append(named[name])
            elif name == "mm":
                table = tables.get(args[1].untyped_storage().data_ptr())
                forward = table is not None and tuple(args[1].shape) == {"fc1": (16, 32), "fc2": (32, 16)}[table]
                steps.append((table or sides[tuple(out.shape)], forward))
            return out

    return Mode()


# ------------------------------------------------------------ kinds of layers


@pytest.mark.parametrize(
    ("plan", "layers", "kinds"),
    [
        ("", 4, [(KEPT, 4)]),
        ("recompute=full", 4, [(FULL, 4)]),
        ("recompute=selective", 4, [(LayerKind(("core_attn",)), 4)]),
        ("recompute=selective,recompute_modules=layernorm+mlp", 4, [(LayerKind(("mlp", "layernorm")), 4)]),
        ("recompute=full,recompute_layers=1", 4, [(FULL, 1), (KEPT, 3)]),
        ("recompute=full,recompute_layers=4", 4, [(FULL, 4)]),
        ("recompute=full,recompute_layers=9", 4, [(FULL, 4)]),
        ("recompute=full,recompute_layers=1,recompute_method=uniform", 4, [(FULL, 4)]),
        ("recompute=full,recompute_layers=2,recompute_method=uniform", 4, [(FULL._replace(layers=2), 2)]),
        ("recompute=full,recompute_layers=3,recompute_method=uniform", 8, [
            (FULL._replace(layers=3), 2), (FULL._replace(layers=2), 1),
        ]),
        ("recompute=full,recompute_layers=9,recompute_method=uniform", 4, [(FULL._replace(layers=4), 1)]),
    ],
)  # fmt: skip
def test_kinds_of_the_layers_of_a_chunk(plan, layers, kinds):
    """Megatron-Core's `TransformerBlock._checkpointed_forward`, layer by layer."""
    assert layer_kinds(parse_plan(plan), [LayerType()] * layers) == kinds
    assert sum(kind.layers * count for kind, count in kinds) == layers


def test_modules_have_one_list():
    assert {*NAMES, "layer"} == MODULES.keys()


UNIT_PLANS = ["", "tp=4", "tp=4,sequence_parallel", "ulysses=4", "ring=4", "ring=16", "ring=4,ring_cut=contiguous"]


@pytest.mark.parametrize("plan", UNIT_PLANS)
def test_a_unit_runs_its_layers_forward_again(plan):
    """Kernels and messages of a unit of three: three times those of a layer, forward twice; its first input is kept."""
    parsed, workload = parse_plan(plan), Workload(seq_len=512)
    case = model(heads=16)
    layer, whole = (layer_program(case, parsed, workload, kind) for kind in (KEPT, FULL))
    unit = layer_program(case, parsed, workload, FULL._replace(layers=3))
    assert labels(unit.forward) == labels(layer.forward) * 3
    again = [(*label[:-1], "recompute") for label in labels(layer.forward)]
    assert labels(unit.backward) == again * 3 + labels(layer.backward) * 3
    assert unit.saved == whole.saved
    assert unit.parameters == 3 * layer.parameters
    assert [s.layer for s in unit.backward_sections[:: len(layer.backward_sections)]][-3:] == [2, 1, 0]


def labels(steps):
    """What each instruction is and how large, without numbers."""
    return [
        (s.operator, s.collective, s.tensor, s.message_bytes, s.purpose, s.part)
        if isinstance(s, Communication)
        else (s.operator, s.kind, s.work, s.part)
        for s in steps
    ]


@pytest.mark.parametrize("plan", ["", "tp=4,sequence_parallel", "ring=4"])
def test_a_template_of_a_unit_equals_compilation(plan):
    parsed, case = parse_plan(plan), model(heads=16)
    kind, unit = FULL._replace(layers=2), sequence_unit(case, parsed)
    template = Template(layer_program(case, parsed, every_workload(unit), kind), unit)
    workload = Workload(seq_len=unit * 96, micro_batch=3)
    assert_equals_program(template, workload, layer_program(case, parsed, workload, kind))


def simulated(plan, layers, *, fold=True, **traits):
    """Layers of the small model, two micro-batches."""
    return result(plan, fold=fold, layers=layers, heads=16, seq_len=384, global_batch=2, **traits)


HOW = [
    "recompute_layers=2",
    "recompute_layers=2,recompute_method=uniform",
    "recompute_layers=3,recompute_method=uniform",
]


KIND_PLANS = [
    ("", HOW[0]), ("", HOW[2]), ("tp=4,sequence_parallel", HOW[0]), ("tp=4,sequence_parallel", HOW[1]),
    ("ulysses=4", HOW[1]), ("ring=12", HOW[1]), ("ring=4,ring_cut=contiguous", HOW[1]),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "how"), KIND_PLANS)
def test_layers_of_several_kinds_fold_as_they_run(plan, how):
    """Times, spans and memory of five layers, folded and not."""
    text = ",".join(filter(None, [plan, "recompute=full", how]))
    folded, unfolded = (simulated(text, 5, fold=fold) for fold in (True, False))
    assert_equal(folded, unfolded)
    assert set(unfolded.spans["layer"].dropna()) == set(range(5))


@pytest.mark.parametrize("how", HOW)
def test_memory_of_layers_of_several_kinds(how):
    """Two of five layers keep 2S of 34S and the others all; units of n keep 2S each, so that after the forward pass of
    five layers 2 x 2S + 3 x 34S are held, or 3 x 2S, or 2 x 2S.
    """
    found = simulated(f"recompute=full,{how}", 5, fold=False, **FLASH)
    first = [task for task, info in enumerate(found.trace.tasks) if info.micro_batch == 0 and info.part == "forward"]
    held = sum(change.bytes for change in found.trace.memory if change.task <= max(first))
    s = 384 * 256
    extra = 2 * 8 * 384 + 4 * 16 * 384
    expected = {HOW[0]: 4 * s + 3 * (34 * s + extra), HOW[1]: 6 * s, HOW[2]: 4 * s}
    assert held == expected[how]


def test_units_take_the_time_of_their_kernels():
    """On one GPU a unit adds a forward pass to each layer, whatever its size."""
    times = {how: simulated(f"recompute=full,{how}", 6).step_time_s for how in HOW[1:]}
    whole, none = (simulated(f"recompute={recompute}", 6) for recompute in ("full", "none"))
    assert set(times.values()) == {whole.step_time_s}
    forward = none.spans[none.spans["part"] == "forward"]
    passes = forward.groupby(["layer", "micro_batch"])
    again = (passes["end_us"].max() - passes["start_us"].min()).sum()
    assert 1e6 * (whole.step_time_s - none.step_time_s) == pytest.approx(again, rel=1e-9)


@pytest.mark.parametrize("how", HOW)
def test_many_workloads_of_layers_of_several_kinds(how):
    """At once what each gives by itself."""
    sizes = [(384, 1, 2), (1536, 2, 2), (768, 1, None)]
    case = scenario(f"tp=4,sequence_parallel,recompute=full,{how}", layers=5, seq_len=384)
    found = simulate_many(Grid.of(case, sizes))
    assert found.exact.all()
    for place, (seq_len, micro_batch, batch) in enumerate(sizes):
        one = simulate(case.model_copy(update={
            "workload": Workload(seq_len=seq_len, micro_batch=micro_batch, global_batch=batch)
        }))  # fmt: skip
        assert found.step_time_s[place] == one.step_time_s
        assert found.peak_memory_gib[place] == one.peak_memory_gib
        assert found.hfu[place] == one.hfu


def whole_step(plan):
    """Of ten layers, four micro-batches."""
    workload = Workload(seq_len=256, global_batch=4)
    return simulate(
        Scenario(hardware="dgx-a100-80gb", model=model(layers=10), plan=plan, workload=workload, scope="step")
    )


@pytest.mark.parametrize(("how", "again"), [(HOW[0], 8), (HOW[1], 10), (HOW[2], 10)])
def test_stages_of_layers_of_several_kinds(how, again):
    """A whole step on two stages of two chunks, of two and of three layers: what is recomputed is counted chunk by
    chunk, and takes longer than nothing and less long than all of it.
    """
    plan = "pp=2,virtual_pp=2,pp_layout=Ett/ttt/ttt/ttL"
    none, some, full = (whole_step(f"{plan},recompute={kind}") for kind in ("none", f"full,{how}", "full"))
    forward = (full.amounts.executed - none.amounts.executed) // 10
    assert some.amounts.executed - none.amounts.executed == again * forward
    assert none.step_time_s < some.step_time_s <= full.step_time_s * (1 + 1e-12)
    assert some.peak_memory_gib < none.peak_memory_gib


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("how", HOW)
def test_what_lasts_does_not_depend_on_what_is_recomputed(how, precision):
    """Weights, their casts, gradients and optimizer states of five layers, and the messages that synchronise them."""
    found, none = (
        simulate(
            Scenario(
                hardware="dgx-h100", model=model(layers=5), plan=f"ulysses=2,recompute={kind}",
                workload=Workload(seq_len=256, precision=precision),
            )
        )
        for kind in (f"full,{how}", "none")
    )  # fmt: skip
    assert found.statics == none.statics
    closing = [
        [(task.name, task.message_bytes) for task in own.trace.tasks if task.part in ("weight_sync", "optimizer")]
        for own in (found, none)
    ]
    assert closing[0] == closing[1]
    assert closing[0]


@pytest.mark.parametrize(
    ("plan", "last"),
    [
        ("tp=2,recompute=full", {"fc2", "residual2"}),
        ("tp=2,recompute=selective,recompute_modules=mlp", {"fc2"}),
        ("ulysses=2,recompute=selective", {"av"}),
    ],
)
def test_a_recomputation_may_stop_at_what_the_backward_pass_reads(plan, last):
    """Nobody reads results of the last product of a module, and what is added to them; what that product keeps of what
    it reads is there again.
    """
    whole, early = (again(f"{plan}{stop}") for stop in ("", ",recompute_early_stop"))
    assert early == [name for name in whole if name not in last]
    assert last <= {*whole}


def again(plan):
    steps = program(plan, hidden=128, heads=8, ffn_hidden=512, attention="unfused").backward
    return [step.operator for step in steps if step.part == "recompute" and isinstance(step, Compute)]


@pytest.mark.parametrize("early", [False, True])
def test_torch_stops_at_what_the_backward_pass_reads(early):
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten.addmm.default
            return func(*args, **(kwargs or {}))

    mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
    with set_checkpoint_early_stop(early):
        out = checkpoint(mlp, torch.zeros(2, 4, requires_grad=True), use_reentrant=False)
    with Products() as products:
        out.sum().backward()
    assert products.count == 2 - early


def test_a_norm_that_attention_and_mlp_share_is_made_again_before_both():
    """The MLP is the last that reads it, and the first to run backward."""
    shared = Model(
        layers=2, hidden=512, ffn_hidden=1024, heads=8, vocab=1000, gated_mlp=True, parallel_residual=True,
        shared_norm=True,
    )  # fmt: skip
    plan = parse_plan("recompute=selective,recompute_modules=layernorm")
    steps = [s for s in layer_program(shared, plan, Workload(seq_len=64)).backward if isinstance(s, Compute)]
    again = next(place for place, step in enumerate(steps) if step.part == "recompute")
    assert steps[again].operator == "norm1"
    assert again < next(place for place, step in enumerate(steps) if (step.operator, step.part) == ("fc1", "wgrad"))
