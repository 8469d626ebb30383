"""Nodes of different sizes and rates: the machine has what the topology says, and reads spread by the SNICs' rates."""

import msgspec
import pytest
from small_cluster import CALIBRATION, simulate, some_agents

from dualpath.core.vocabulary import Role
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.planning import plan_capacity
from dualpath.lab.planning.plan import load_of
from dualpath.lab.sim.machine import Machine, build_machine, constants_for
from dualpath.lab.sim.result import snic_balance
from dualpath.spec.topology import Topology


def machine_of(topology: str, **changed: object) -> Machine:
    given = {"topology": Topology.parse(topology), "weight_bytes_per_parameter": 0.2} | changed
    return build_machine(msgspec.structs.replace(load_cluster("qwen32b-1p2d"), **given), CALIBRATION)


def test_engines_nodes_buffers_and_rates_are_the_topologys() -> None:
    machine = machine_of("1Px2+1Px4+2D", snic_bytes_per_s=(4e9, 2e9, 1e9), cnic_bytes_per_s=(8e9, 6e9, 5e9))
    assert [facts.node for facts in machine.engines] == [0, 0, 1, 1, 1, 1, 2, 3]
    assert len(machine.of_role(Role.PREFILL)) == 6
    whole, half, quarter = (machine.engines[engine].buffer_blocks for engine in (6, 0, 2))
    assert (half, quarter) == (whole // 2, whole // 4)
    share = CALIBRATION.snic_efficiency
    assert machine.snic_bytes_per_s == tuple(rate * share for rate in (4e9, 2e9, 1e9, 1e9))
    assert machine.cnic_bytes_per_s == (8e9, 8e9, 6e9, 6e9, 6e9, 6e9, 5e9, 5e9)
    alpha_bytes = constants_for(machine, 1000, 900).alpha_tokens * machine.costs.kv_bytes_per_token
    assert alpha_bytes == pytest.approx(3 * 3e9 * share, rel=1e-3)  # of the mean prefill node


@pytest.mark.parametrize(
    ("topology", "snics", "exact"),
    [
        ("1Px2+2D", (3e9, 1e9), False),
        ("1Px2+2D", (3e9, 1e9), True),
        ("1P2Dx2", (1e9, 3e9), False),
        ("2Px2+1D+1D", (1e9, 1e9, 3e9), False),
    ],
)
def test_where_reads_bind_each_node_reads_by_its_rate(topology: str, snics: tuple[float, ...], exact: bool) -> None:
    machine = machine_of(topology, snic_bytes_per_s=snics)
    agents = some_agents(60, 4 if exact else 8, first=10_000 if exact else 30_000)
    run = simulate(machine, "dualpath", agents, exact=exact)
    seconds = [n_bytes / rate for n_bytes, rate in zip(run.storage.read_bytes, machine.snic_bytes_per_s, strict=True)]
    assert max(seconds) / min(seconds) < 1.5  # bytes alone would be 3 and more
    basic = simulate(machine, "basic", agents, exact=exact)
    assert 1.3 < basic.events.now / run.events.now <= Topology.parse(topology).pooled(snics) * 1.01
    if not exact:
        assert snic_balance(run) < snic_balance(basic)


def test_a_slow_compute_nic_slows_its_own_engine() -> None:
    agents = some_agents(20, 4, first=30_000)
    for exact in (False, True):
        fast, slow = (
            simulate(machine_of("1P1D", cnic_bytes_per_s=rates), "dualpath", agents, exact=exact)
            for rates in ((50e9, 50e9), (50e9, 0.5e9))
        )
        assert sum(slow.measured.ttst_s) > 2 * sum(fast.measured.ttst_s)  # the prompt's copy on the DE
        assert slow.fabric.ns_per_byte == [1 / 50, 2.0]


@pytest.mark.parametrize(
    ("changed", "what"),
    [({"topology": Topology.parse("1Px2+2D")}, "engines"), ({"snic_bytes_per_s": (2e9, 1e9)}, "snic")],
)
def test_a_plan_in_closed_form_says_that_it_is_of_equal_nodes(changed: dict[str, object], what: str) -> None:
    cluster = msgspec.structs.replace(load_cluster("qwen32b-1p2d"), **changed)
    with pytest.raises(ValueError, match=rf"differ in {what}.*simulate"):
        plan_capacity(cluster, load_of(["32K"]))
