"""A testbed for one experiment."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dualpath.lab.experiments.conditions import Bench, Conditions
from dualpath.lab.experiments.local_cluster import ClusterLauncher
from dualpath.lab.testbed import network
from dualpath.lab.testbed.launcher import TestbedLauncher
from dualpath.lab.testbed.plan import Rates, make_plan
from dualpath.spec.topology import Topology

SUBNET = "10.89"
"""Of testbeds that come and go with an experiment."""


@contextmanager
def temporary_testbed(
    topologies: Sequence[str], rates: Rates, name: str = "run", subnet: str = SUBNET
) -> Iterator[Callable[[Conditions, Bench, Path, Path], ClusterLauncher]]:
    """Yields a launcher on a testbed large enough for all `topologies`, which lasts as long as the context.

    Raises TestbedError, and ValueError for a topology that can't be.
    """
    sizes = [Topology.parse(topology) for topology in topologies]
    plan = make_plan(name, max(s.prefill_nodes for s in sizes), max(s.decode_nodes for s in sizes), subnet)
    testbed = network.up(plan, rates)
    try:
        yield lambda conditions, bench, logs, work: TestbedLauncher(
            testbed,
            model=bench.model,
            rates=Rates(conditions.snic_bytes_per_s, conditions.cnic_bytes_per_s, rates.storage_node),
            logs=logs,
            work=work,
            start_timeout_s=bench.start_timeout_s,
            options=bench.engine_options,
            engine_arguments=bench.engine_arguments,
        )
    finally:
        network.down(name)
