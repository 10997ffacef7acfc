"""Small scenarios for the tests: one place that fills in what a test does not care about."""

from functools import cache

from hypothesis import strategies as st

from spsim import Model, Scenario, Workload, simulate
from spsim.program.assembly import layer_program
from spsim.program.compiler import compile_region
from spsim.program.region import Region
from spsim.program.strategies import split_rules
from spsim.studies.measured_cases import load_cases
from spsim.studies.validation import validate

A100 = "dgx-a100-80gb"
H100 = "dgx-h100"


def model(**changes):
    """A GPT of two layers: hidden 256, 8 heads, flash attention, no dropout, unless changed."""
    return Model(**{"layers": 2, "hidden": 256, "heads": 8, "vocab": 512, **changes})


def scenario(plan="", *, seq_len=256, micro_batch=1, global_batch=None, hardware=A100, scope="layers", **model_changes):
    """A scenario of the layers of the small model under a plan, an object or text."""
    return Scenario(
        hardware=hardware,
        model=model(**model_changes),
        plan=plan,
        workload=Workload(seq_len=seq_len, micro_batch=micro_batch, global_batch=global_batch),
        scope=scope,
    )


def result(plan="", *, fold=True, **settings):
    """The simulation of a small scenario."""
    return simulate(scenario(plan, **settings), fold=fold)


def figures(found):
    """The document of a result without the plan, the engine, and the effects of assumed numbers: the step walked again
    twice for each of them, which hangs on durations alone, that what else is compared has.
    """
    vars(found)["assumed_effects"] = None
    own = ("plan", "engine", "assumed_effects")
    return {key: value for key, value in found.to_json().items() if key not in own}


def program(plan="", *, seq_len=256, micro_batch=1, **model_changes):
    """The compiled layer of a small scenario, after the checks of `Scenario`."""
    checked = scenario(plan, seq_len=seq_len, micro_batch=micro_batch, **model_changes)
    return layer_program(checked.model, checked.plan, checked.workload)


def compile_program(operators, plan, mesh, *, causal):
    """The program of some operators under the rules of a plan."""
    return compile_region(Region(operators, split_rules(plan), mesh), plan, causal=causal)


DEGREES = [(t, u, r) for t in (1, 2, 4, 8) for u in (1, 2, 4, 8) for r in (1, 2, 4, 8) if t * u * r <= 8]
FLAGS = ("sequence_parallel", "keep_gathered", "distributed_optimizer", "gathers_position_ids")


@st.composite
def random_plans(draw):
    """(plan, whether attention may be unfused): at most 8 ranks, and every option."""
    tp, ulysses, ring = draw(st.sampled_from(DEGREES))
    flags = draw(st.sets(st.sampled_from(FLAGS)))
    kind = draw(st.sampled_from(["p2p", "all_gather", "gather_permute"]))
    messages = draw(st.sampled_from(["joint", "concatenated", "separate"]))
    plan = (
        f"tp={tp},ulysses={ulysses},ring={ring},ring_kind={kind},"
        f"ring_messages={messages},ring_gradients={draw(st.sampled_from(['model_dtype', 'fp32']))},"
        f"ring_cut={draw(st.sampled_from(['zigzag', 'contiguous']))},"
        f"recompute={draw(st.sampled_from(['none', 'selective', 'full']))},"
        f"tp_backward_overlap={draw(st.sampled_from(['true', 'false']))}," + ",".join(sorted(flags))
    )
    return plan, ring == 1 or kind == "all_gather"


@st.composite
def random_scenarios(draw, *, fold, layers, micro_batches):
    """Arguments of `result`: a random plan of at most 8 ranks, a random small model and sequence."""
    plan, any_attention = draw(random_plans())
    return {
        "plan": plan,
        "fold": draw(fold),
        "hardware": draw(st.sampled_from([A100, H100])),
        "seq_len": draw(st.sampled_from([128, 1024, 4096])),
        "layers": layers,
        "global_batch": micro_batches,
        "heads": 8,
        "kv_heads": draw(st.sampled_from([1, 2, 4, 8])),
        "gated_mlp": draw(st.booleans()),
        "ffn_hidden": 704,
        "attention": draw(st.sampled_from(["flash", "unfused"] if any_attention else ["flash"])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
        "causal": draw(st.booleans()),
    }


@cache
def published():
    """All shipped measurements, predicted once for all tests."""
    return validate(load_cases())
