"""The order of mesh axes: which ranks share a node, what that costs, and that nothing else changes."""

from itertools import permutations, product

import pytest
from matplotlib.colors import to_hex

import spsim
from spsim import InputError, Plan, Scenario, simulate
from spsim.inputs.launch.megatron.writing import arguments
from spsim.inputs.plan import MESH_ORDER
from spsim.plots.colours import OTHER
from spsim.plots.mapping import Mapping, plot_mapping
from spsim.program.mesh import mesh_of, nodes_of, places_in_node, world_of

SMALL = {"layers": 4, "hidden": 1024, "heads": 16, "kv_heads": 8, "vocab": 32000, "ffn_hidden": 4096}
DEGREES = {"tp": 2, "ulysses": 2, "ring": 2, "dp": 3, "pp": 2}


def scenario(plan, **settings):
    work = {"seq_len": 4096, **settings.pop("workload", {})}
    return Scenario(hardware="dgx-h100", model=SMALL, plan=plan, workload=work, **settings)


@pytest.mark.parametrize("words", [("tp", "pp", "dp"), ("pp", "dp", "tp"), ("dp", "tp", "pp")])
def test_ranks_are_numbered_as_megatron_numbers_them(words):
    """`RankGenerator` of megatron-core: the first word is innermost, so that a rank is the sum of its places times the
    degrees of the words before.
    """
    order = "-".join([*words, "ulysses", "ring"])
    world = world_of(Plan(tp=2, dp=3, pp=4, mesh_order=order))
    degrees = {"tp": 2, "dp": 3, "pp": 4}
    for rank, places in enumerate(product(*(range(degrees[word]) for word in reversed(words)))):
        own = dict(zip(reversed(words), places, strict=True))
        assert {axis: world.coordinate(rank, axis) for axis in degrees} == own
        for axis in degrees:
            alike = [r for r in range(24) if all(world.coordinate(r, a) == own[a] for a in degrees if a != axis)]
            assert [*world.group(rank, (axis,))] == alike


def test_groups_span_the_nodes_that_their_ranks_lie_on():
    """Every order of five axes, against a count of the nodes of each group."""
    for words in permutations(DEGREES):
        world = world_of(Plan(**DEGREES, mesh_order="-".join(words)))
        for axes in [(axis,) for axis in DEGREES] + [("dp", "ring", "ulysses"), ("pp", "tp")]:
            spans = {len({rank // 8 for rank in group}) for group in world.groups(axes)}
            assert nodes_of(world, axes, 8) == max(spans), (words, axes)
            firsts = {group[0] % 8 for group in world.groups(axes)}
            others = [(world.strides[axis], world.degree(axis)) for axis in world.axes if axis not in axes]
            assert places_in_node(others, 8) == firsts, (words, axes)


def test_a_stage_numbers_its_ranks_over_all_stages():
    """Those of the first stage, wherever pp stands."""
    for words in permutations(("tp", "dp", "pp")):
        plan = Plan(tp=2, dp=2, pp=3, mesh_order="-".join([*words, "ulysses", "ring"]))
        world, stage = world_of(plan), mesh_of(plan)
        assert [*stage.numbers] == [r for r in range(12) if world.coordinate(r, "pp") == 0]
        assert sorted(r + n * stage.strides["pp"] for r in stage.numbers for n in range(3)) == [*range(12)]


def test_what_lies_across_nodes_is_a_word():
    """Of two nodes, 8 GPUs each: Ulysses over all of a node and tp within halves, or the other way round."""
    inside, across = (
        simulate(scenario(f"tp=8,ulysses=2{more}", workload={"seq_len": 32768}))
        for more in ("", ",mesh_order=ulysses-tp-ring-dp-pp")
    )
    assert {call.axis: call.nodes for call in inside.collectives} == {"tp": 1, "ulysses": 2}
    assert {call.axis: call.nodes for call in across.collectives} == {"tp": 2, "ulysses": 1}
    for axis, longer, shorter in (("tp", across, inside), ("ulysses", inside, across)):
        times = [max(call.time_s for call in run.collectives if call.axis == axis) for run in (longer, shorter)]
        assert times[0] > 1.3 * times[1], axis
    assert across.peak_memory_gib == inside.peak_memory_gib


@pytest.mark.slow
@pytest.mark.parametrize("order", ["tp-ulysses-ring-pp-dp", "pp-tp-ulysses-ring-dp", "dp-pp-tp-ulysses-ring"])
@pytest.mark.parametrize("plan", ["tp=2,pp=2,dp=2", "tp=2,ring=2,pp=2,dp=2,ring_cut=contiguous"])
def test_folded_equals_unfolded_in_any_order(order, plan):
    """Stages between the other axes too: times, ranks that are simulated, memory of each."""
    own = scenario(f"{plan},mesh_order={order}", nodes=2, workload={"global_batch": 8})
    folded, whole = simulate(own), simulate(own, fold=False)
    assert folded.step_time_s == whole.step_time_s
    assert [spot.bytes for spot in folded.stage_peaks] == [spot.bytes for spot in whole.stage_peaks]
    stages = [world_of(own.plan).coordinate(rank, "pp") for rank in folded.trace.copies]
    assert [stages.count(stage) for stage in (0, 1)] == [len(stages) // 2] * 2
    assert sorted(rank for copies in folded.trace.copies.values() for rank in copies) == [*range(own.plan.gpus)]


def test_within_a_node_no_order_matters_and_that_is_said():
    """Bit for bit."""
    usual, other = (scenario(f"tp=2,ring=2{more}") for more in ("", ",mesh_order=ring-tp-ulysses-dp-pp"))
    but = {"plan": 0, "notes": 0}
    assert simulate(other).to_json() | but == simulate(usual).to_json() | but
    assert [note for note in other.notes if "mesh_order" in note and "nothing but the numbers of ranks" in note]
    alike = scenario("tp=2,dp=2,mesh_order=tp-ring-ulysses-dp-pp")
    assert [note for note in alike.notes if "as ranks are numbered alike" in note]


@pytest.mark.parametrize(
    ("words", "order"),
    [
        ("order=tp-cp-ep-dp-pp", MESH_ORDER),
        ("rank_order=tp-cp-ep-pp-dp", "tp-ulysses-ring-pp-dp"),
        ("use_tp_pp_dp_mapping", "tp-ulysses-ring-pp-dp"),
        ("mesh_order=Ring-TP-ulysses-dp-pp", "ring-tp-ulysses-dp-pp"),
    ],
)
def test_words_of_megatron(words, order):
    assert scenario(f"tp=2,{words}").plan.mesh_order == order


def test_megatron_has_one_other_order(tmp_path):
    """Written and read back; others are listed as what has no counterpart."""
    given = scenario("tp=2,pp=2,dp=2,mesh_order=tp-ulysses-ring-pp-dp", workload={"global_batch": 4})
    script = tmp_path / "launch.sh"
    script.write_text(spsim.emit(given, "megatron").text)
    assert "--use-tp-pp-dp-mapping" in script.read_text()
    assert spsim.read_launch(script).settings["plan"]["mesh_order"] == given.plan.mesh_order
    other = spsim.emit(scenario("tp=2,dp=2,mesh_order=dp-tp-ulysses-ring-pp"), "megatron")
    assert any("mesh_order" in line for line in other.unsaid)
    assert arguments(scenario("pp=2,mesh_order=tp-ulysses-ring-pp-dp"))["use_tp_pp_dp_mapping"] is True
    assert "use_tp_pp_dp_mapping" not in arguments(scenario("pp=2"))


@pytest.mark.parametrize("order", ["tp-dp-pp", "tp-tp-ring-dp-pp", "tp-ulysses-ring-dp-pp-ep-x", "none"])
def test_an_order_names_each_axis_once(order):
    with pytest.raises(InputError, match="does not name each axis once; write the axes of tp-ulysses-ring-dp-pp"):
        Plan(mesh_order=order)


def test_uneven_groups_are_refused():
    """Three stages inside of two GPUs of tp: blocks of 3 ranks on nodes of 2."""
    with pytest.raises(InputError, match="pp = 3 makes blocks of 3 ranks, which nodes of 2 GPUs cut unevenly"):
        scenario("tp=2,pp=3,mesh_order=pp-tp-ulysses-ring-dp", nodes=3, workload={"global_batch": 3})


# ------------------------------------------------------------ the picture


def mapping(plan, **settings):
    return Mapping(scenario(plan, **settings))


def test_which_axes_share_a_link():
    """Tp over all of a node, Ulysses and replicas across; then Ulysses in the node, tp over two. Of a ring neighbours
    count, so that ranks in the middle of a node send from no adapter.
    """
    usual = mapping("tp=8,ulysses=2,dp=2")
    assert usual.on_port(3) == [("tp",)]
    assert usual.on_adapter(3) == [("ulysses",), ("dp",), ("dp", "ulysses")]
    assert usual.words(("dp", "ulysses")) == "4 ranks on 4 nodes: infiniband"
    turned = mapping("tp=8,ulysses=2,mesh_order=ulysses-tp-ring-dp-pp")
    assert turned.on_port(3) == [("ulysses",), ("tp",)]
    assert turned.on_adapter(3) == [("tp",)]
    assert turned.words(("tp",)) == "8 ranks on 2 nodes: nvlink and infiniband"
    ring = mapping("ring=4,tp=2", nodes=2)
    assert [ring.on_adapter(rank) for rank in range(4)] == [[("ring",)]] * 4
    assert [mapping("ring=8", nodes=2).on_adapter(rank) for rank in range(4)] == [[("ring",)], [], [], [("ring",)]]


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        ("tp=2,dp=4,ep=4,sequence_parallel", ["tp", "dp, ep"]),
        ("tp=2,dp=4,ep=2,sequence_parallel", ["tp", "ep", "dp", "dp × ep"]),
        ("tp=2,dp=4,ep=8,sequence_parallel,expert_tp=1", ["tp", "dp"]),
    ],
)
def test_replicas_that_experts_are_spread_over_are_named_as_replicas(plan, names):
    found = Mapping(Scenario(hardware="dgx-h100", model="mixtral-8x7b", plan=plan, workload={"seq_len": 4096}))
    assert [found.name(axes) for axes in found.axes] == names


@pytest.mark.slow
def test_the_picture_has_a_row_for_each_axis_and_each_kind_of_link():
    """Cells of groups for every rank that is shown, and the groups of node 0 alone in colour."""
    figure = plot_mapping(scenario("tp=8,ulysses=2,dp=2,pp=4", workload={"global_batch": 4}))
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {"tp", "ulysses", "dp", "pp", "dp × ulysses", "nvlink", "infiniband"} <= {*words}
    assert [f"node {n}" for n in range(8)] == [word for word in words if word.startswith("node")]
    assert any("8 more nodes are alike" in text.get_text() for text in figure.texts)
    colours = [to_hex(patch.get_facecolor()) for patch in figure.axes[0].patches]
    assert colours.count(OTHER.lower()) == 8 * (7 + 6 + 6 + 6 + 4)
