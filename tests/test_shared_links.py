"""Whole steps on a network whose transfers share links."""

import json

import pytest

from spsim import InputError, Scenario, compare, simulate
from spsim.cli import main
from spsim.costs.collectives import CommCost
from spsim.costs.links import Port, Routes, Wiring, sent
from spsim.costs.models import cost_models
from spsim.inputs.plan import Plan
from spsim.inputs.profiles import load_profile
from spsim.inputs.quantities import Quantity
from spsim.inputs.uplinks import Uplinks
from spsim.plots.mapping import Mapping, plot_mapping
from spsim.program.mesh import world_of
from spsim.program.placement import sent_bytes

SMALL = {
    "layers": 2, "hidden": 4096, "heads": 32, "kv_heads": 8, "vocab": 32000, "ffn_hidden": 14336, "gated_mlp": True
}  # fmt: skip


def scenario(plan, *, hardware="dgx-h100", nodes=None, network="flows", perturbations=(), **workload):
    return Scenario(
        hardware=hardware, model=SMALL, plan=plan, workload={"seq_len": 4096, **workload}, nodes=nodes,
        network=network, perturbations=perturbations,
    )  # fmt: skip


def step_ps(*given, fold=True, **settings):
    return simulate(scenario(*given, **settings), fold=fold).step_ps


def between_nodes(**changes):
    """DGX H100 with another level between nodes; its curves stay."""
    profile = load_profile("dgx-h100")
    inner, outer = profile.datasheet.topology
    datasheet = profile.datasheet.model_copy(update={"topology": (inner, outer.model_copy(update=changes))})
    return profile.model_copy(update={"datasheet": datasheet})


def number(value):
    return Quantity(value=value, source="test")


OVER_TWO = between_nodes(links_per_gpu=number(0.5))
"""One adapter for two GPUs."""


# ------------------------------------------------------------ steps


@pytest.mark.parametrize(
    ("plan", "settings"),
    [
        ("tp=8,sequence_parallel", {}),
        ("tp=4,pp=2", {"nodes": 4, "global_batch": 4}),
        ("tp=4,pp=2,mesh_order=pp-tp-ulysses-ring-dp", {"nodes": 4, "global_batch": 4}),
        ("tp=2,ring=4,ring_cut=contiguous", {"nodes": 4}),
        ("tp=4,dp=4,zero=1", {}),
        ("tp=2,dp=4,dp_library=ddp", {"hardware": OVER_TWO, "nodes": 4}),
        ("tp=2,pp=2,mesh_order=pp-tp-ulysses-ring-dp", {"hardware": OVER_TWO, "nodes": 2, "global_batch": 4}),
    ],
)
def test_where_nothing_is_shared_steps_take_what_closed_forms_say(plan, settings):
    """To the picosecond, memory included. Of an adapter for two GPUs closed forms have both send at the same time, as
    they do.
    """
    alone, shared = (simulate(scenario(plan, network=name, **settings)) for name in ("closed_form", "flows"))
    assert shared.step_ps == alone.step_ps
    assert shared.peak_memory_gib == alone.peak_memory_gib
    assert shared.exposed_comm_s == pytest.approx(alone.exposed_comm_s, rel=1e-12)


SHARED = [
    ("tp=8,ulysses=2,dp=2,dp_library=ddp", {}),
    ("tp=2,dp=8,zero=3,dp_library=fsdp", {}),
    ("tp=2,ring=2,dp=2,dp_library=ddp,mesh_order=tp-dp-ring-ulysses-pp", {"nodes": 2}),
    ("tp=4,dp=2,sequence_parallel,dp_overlap,zero=1,mesh_order=dp-tp-ulysses-ring-pp", {"nodes": 2}),
    ("tp=8,pp=2,virtual_pp=2", {"nodes": 4, "global_batch": 8}),
    ("tp=4,ring=2,dp_library=ddp", {"hardware": "mi300x-8"}),
    ("tp=4,dp=2,dp_library=ddp", {"hardware": "h100-pcie-8"}),
    ("tp=2,ring=2,dp=2,dp_library=ddp", {"hardware": OVER_TWO, "nodes": 4}),
]
"""Collectives of replicas and messages of stages beside collectives of layers, on adapters, switches, a mesh, PCIe; and
GPUs with one adapter.
"""


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "settings"), SHARED)
def test_sharing_takes_time_and_a_folded_rank_stands_for_all_its_like(plan, settings):
    folded = step_ps(plan, **settings)
    assert folded == step_ps(plan, fold=False, **settings)
    assert folded > step_ps(plan, network="closed_form", **settings)


def test_stages_of_a_node_share_its_adapters():
    """Two stages a node whose messages cross nodes: pairs of GPUs have one adapter, or each its own."""
    plan = "tp=2,pp=4,pp_schedule=gpipe"
    own, halved = (step_ps(plan, hardware=h, nodes=4, global_batch=8) for h in ("dgx-h100", OVER_TWO))
    assert own == step_ps(plan, nodes=4, network="closed_form", global_batch=8)
    assert halved > own


def test_uplinks_that_carry_less_than_what_is_below_them():
    """Four nodes under leaves of two: only what crosses leaves is slower, and all where a leaf is one node. Rails join
    GPUs of one place.
    """

    def leaves(joins, oversubscription, **more):
        own = Uplinks(joins=joins, oversubscription=number(oversubscription), **more)
        return between_nodes(uplinks=own)

    plan = "ulysses=4,tp=2,dp=2"
    usual = step_ps(plan, nodes=4)
    assert step_ps(plan, hardware=leaves(2, 1), nodes=4) == usual
    across = step_ps(plan, hardware=leaves(2, 16), nodes=4)
    assert step_ps(plan, hardware=leaves(1, 16), nodes=4) > across > usual
    assert step_ps(plan, hardware=leaves(2, 16, rails=True), nodes=4) >= usual
    inside = "tp=4,dp=4,mesh_order=tp-ulysses-ring-dp-pp"
    assert step_ps(inside, hardware=leaves(4, 64), nodes=4) == step_ps(inside, nodes=4)


def test_what_is_refused_and_what_is_said():
    with pytest.raises(InputError, match="network = 'flows' with pp and dp_overlap, DDP or FSDP"):
        simulate(scenario("pp=2,dp=2,dp_overlap,distributed_optimizer", global_batch=4))
    with pytest.raises(InputError, match="network"):
        scenario("tp=8", network="packets")
    result = simulate(scenario("tp=8"))
    assert result.reasons == (
        "1 of 8 ranks simulated: all are identical", "layers are not folded: what is under way on links outlasts them"
    )  # fmt: skip
    assert result.assumed_effects is None
    assert json.loads(json.dumps(result.to_json()))["engine"]["events"] == result.events


def test_comparisons_and_the_command_line_take_it(capsys):
    plans = ["tp=4,dp=4,dp_library=ddp,mesh_order=dp-tp-ulysses-ring-pp", "tp=4,dp=4,dp_library=ddp"]
    given = {"hardware": "dgx-h100", "model": SMALL, "workload": {"seq_len": 4096}, "nodes": 4}
    found = compare(plans, **given, network="flows")
    assert [account.result.step_ps for account in found.accounts] == [step_ps(plan, nodes=4) for plan in plans]
    command = "run --model llama-3-8b --hardware dgx-h100 --plan tp=8,ulysses=2,dp_library=ddp --seq-len 4096"
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--network", "flows", "--json"])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert "what is under way on links" in shown["engine"]["reasons"][1]


ADAPTER = {"link": {"node": 1, "adapter": 2}}


@pytest.mark.slow
@pytest.mark.parametrize(("plan", "nodes"), [("tp=4,dp=4,zero=1", 4), ("tp=4,ring=2,dp=2", 4), ("tp=4,pp=2", 2)])
def test_slow_and_failing_links_are_rates_of_the_network(plan, nodes):
    """Ranks whose groups have them are simulated by themselves, exactly as all; the closed form, which makes all bytes
    of a transfer longer, says about the same. Factor 1 changes nothing.
    """

    def perturbed(*changes, fold=True, **settings):
        return simulate(scenario(plan, nodes=nodes, perturbations=list(changes), **settings), fold=fold).step_ps

    usual = step_ps(plan, nodes=nodes)
    assert perturbed({**ADAPTER, "factor": 1.0}) == usual
    down = {"link": {"node": 0, "gpu": 1}, "outage": True, "from_s": 0.004, "to_s": 0.02}
    for change in ({**ADAPTER, "factor": 3.0}, down):
        slow = perturbed(change)
        assert slow == perturbed(change, fold=False) > usual
        assert slow == pytest.approx(perturbed(change, network="closed_form"), rel=0.03)
    both = perturbed({**ADAPTER, "factor": 3.0}, {"ranks": [0], "factor": 1.5})
    assert both > perturbed({**ADAPTER, "factor": 3.0})


# ------------------------------------------------------------ links


@pytest.mark.parametrize("collective", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
@pytest.mark.parametrize("hardware", ["dgx-h100", "dgx-a100-80gb"])
def test_bytes_on_links_are_those_of_the_collective(collective, hardware):
    """Of 2 nodes of 4 ranks. Whatever the algorithm, what leaves a node has to come from it; of a ring, all bytes that
    ranks send are on ports and adapters.
    """
    comm = cost_models(load_profile(hardware), "bf16")[1]
    world = world_of(Plan(tp=8))
    routes = Routes(Wiring(comm.profile, 4), world)
    message = 2**28
    own = sent(comm, collective, message, 8, 2)
    use = routes.use(routes.group(("tp",), frozenset(range(8)), pairwise=own.pairwise), own)
    wiring = routes.wiring
    out = {level: [Port(level, True, rank) for rank in range(8)] for level in ("nvlink", "infiniband")}
    for level, ports in out.items():
        size = own.inside if level == "nvlink" else own.across
        assert [use.loads[port] for port in ports] == [wiring.busy_ps(ports[0], size)] * 8
    assert {*use.loads} == {port._replace(out=way) for ports in out.values() for port in ports for way in (True, False)}
    if collective == "all_to_all" or comm.algorithm(collective, message, 8, 2) == "ring":
        assert own.inside + own.across == pytest.approx(sent_bytes(collective, message, 8))
    least = {"all_to_all": message / 2, "all_reduce": message}.get(collective, message / 2)
    assert 4 * own.across >= least * 0.99


def test_a_full_mesh_has_a_link_for_each_pair():
    """Groups along two axes of a mesh of 8 have no link together; a group uses all of its own alike."""
    profile = load_profile("mi300x-8")
    comm = cost_models(profile, "bf16")[1]
    routes = Routes(Wiring(profile, 8), world_of(Plan(tp=4, dp=2)), lambda _: 0)
    uses = {
        axis: routes.use(
            routes.group((axis,), frozenset({0}), pairwise=False), sent(comm, "all_gather", 2**28, ranks, 1)
        )
        for axis, ranks in (("tp", 4), ("dp", 2))
    }
    assert not {*uses["tp"].loads} & {*uses["dp"].loads}
    each = next(iter(uses["tp"].loads.values()))
    assert each == pytest.approx(uses["dp"].loads.popitem()[1] / (2**28 / 2) * (2**28 * 3 / 4) / 3, rel=1e-6)


def test_links_are_as_fast_as_their_best_curve():
    """No transfer alone is longer on its links than its closed form says."""
    for hardware in ("dgx-h100", "dgx-a100-80gb", "dgx-b200", "mi300x-8", "h100-pcie-8"):
        comm = cost_models(load_profile(hardware), "bf16")[1]
        routes = Routes(Wiring(comm.profile, 8), world_of(Plan(tp=8)), lambda _: 0)
        for collective in ("all_reduce", "all_gather", "all_to_all"):
            own = sent(comm, collective, 2**30, 8, 1)
            use = routes.use(routes.group(("tp",), frozenset({0}), pairwise=own.pairwise), own)
            assert use.wire_ps <= 1.02 * 10**12 * comm.duration(collective, 2**30, 8), (hardware, collective)


@pytest.mark.parametrize(
    ("collective", "ranks", "size", "seen_ns"),
    [
        ("all_gather", 2, 2**20, 4155), ("all_gather", 16, 2**26, 404115), ("all_gather", 64, 2**30, 6619158),
        ("all_reduce", 4, 2**20, 15162), ("all_reduce", 8, 2**28, 2929262), ("all_reduce", 64, 2**26, 933660),
    ],
)  # fmt: skip
def test_closed_forms_of_rings_are_those_of_astra_sim(collective, ranks, size, seen_ns):
    """Times of its congestion-aware analytical network (astra-network-analytical at 599a047) on rings of 150 GiB/s and
    900 ns, against a curve of two points of such a ring of eight at its law, carried to other sizes and ranks.
    """
    rounds = 2 if collective == "all_reduce" else 1

    def point(message):
        ns = rounds * 7 * (900 + message / 8 / (150 * 2**30) * 10**9)
        return float(message), rounds * 7 / 8 * message / ns

    profile = load_profile("dgx-a100-80gb")
    curves = profile.coefficients.collectives
    (measured,) = curves["nvlink"][collective][:1]
    ring = measured.model_copy(
        update={
            "algorithm": "ring", "ranks": 8, "latency_us": rounds * 7 * 0.9, "step_latency_us": 0.9,
            "points": (point(2**20), point(2**33)),
        }
    )  # fmt: skip
    own = {**curves, "nvlink": {**curves["nvlink"], collective: (ring,)}}
    coefficients = profile.coefficients.model_copy(update={"collectives": own})
    comm = CommCost(profile.model_copy(update={"coefficients": coefficients}))
    assert 10**9 * comm.inner.time(collective, size, ranks) == pytest.approx(seen_ns, rel=0.001)


@pytest.mark.slow
def test_the_picture_shows_what_shares_uplinks():
    """Leaves of two nodes, of which a group of Ulysses does not leave one; PCIe switches of four GPUs, of which tp = 2
    does not.
    """
    leaves = between_nodes(uplinks=Uplinks(joins=2, oversubscription=number(4)))
    mapping = Mapping(scenario("tp=8,ulysses=2,dp=2,pp=2", hardware=leaves, global_batch=4))
    level = mapping.wiring.outer
    assert [mapping.on_uplinks(rank, level) for rank in (0, 20)] == [[("dp",), ("pp",), ("dp", "ulysses")]] * 2
    words = [text.get_text() for text in plot_mapping(mapping.scenario).axes[0].texts]
    assert {"infiniband uplinks", "of 2 nodes"} <= {*words}
    profile = load_profile("h100-pcie-8")
    (inner,) = profile.datasheet.topology
    switches = inner.model_copy(update={"uplinks": Uplinks(joins=4, oversubscription=number(4))})
    datasheet = profile.datasheet.model_copy(update={"topology": (switches,)})
    boxed = profile.model_copy(update={"datasheet": datasheet})
    mapping = Mapping(scenario("tp=2,dp=4,dp_library=ddp", hardware=boxed))
    assert mapping.on_uplinks(5, mapping.wiring.inner) == [("dp",)]
    plan = "tp=2,dp=4,dp_library=ddp"
    assert step_ps(plan, hardware=boxed) == step_ps(plan, hardware=boxed, fold=False) > step_ps(plan, hardware=profile)
