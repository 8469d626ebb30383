"""A policy of your own against ours: in the simulator on the paper's cluster, then on a real cluster of this machine.

    python examples/compare_policies.py [--agents 40] [--real-agents 6]

The policy is a read path: given a request whose engines are chosen, it says how many of its hit blocks the PE's side
reads. This one gives each side a share of every read in inverse proportion to the two queues.
"""

import argparse
import tempfile
from collections.abc import Sequence

import dualpath
from dualpath import AgentMix, ClusterConfig, PathFacts, Policy, ReadPath, System


def by_queue_share(facts: PathFacts) -> int:
    """Split every read in inverse proportion to the two queues, which `split` balances exactly."""
    both = facts.pe_queue_tokens + facts.de_queue_tokens
    share = 0.5 if both == 0 else facts.de_queue_tokens / both
    return min(round(share * facts.hit_blocks), facts.pe_buffer_blocks)


dualpath.READ_PATHS.add("by_queue_share", ReadPath(by_queue_share))
dualpath.SYSTEMS.add(
    "mine", System(name="mine", summary="a share of every read", policy=Policy(read_path="by_queue_share"))
)
SYSTEMS = ("basic", "dualpath", "dualpath-split", "mine")


def simulated(agents: int, systems: Sequence[str]) -> None:
    """Job completion time of the paper's DS 27B at 1P1D, 32K agents (paper §9), under a virtual clock."""
    print(f"simulated: ds27b-1p1d, {agents} agents of the 32K trace")
    for system in systems:
        result = dualpath.simulate("ds27b-1p1d", "32K", system=system, agents=agents)
        print(f"  {system:<16} {result.simulated_s:8.1f} s   SNIC max/mean {result.snic_max_over_mean:.2f}")


def measured(agents: int, systems: Sequence[str]) -> None:
    """The same on real processes and bytes: 1P2D on this machine, storage NICs held to 20 MB/s."""
    mix = AgentMix(turns=3, first_context_tokens=1500, append_tokens=48, generate_tokens=8)
    trajectories = dualpath.generate_trajectories(mix, agents, seed=0)
    print(f"measured: 1P2D on this machine, {agents} agents of {mix.first_context_tokens:.0f} tokens and more")
    with tempfile.TemporaryDirectory() as place:
        model = dualpath.make_checkpoint(f"{place}/model", **dualpath.DEMO_MODEL)
        for system in systems:
            config = ClusterConfig(
                model=str(model),
                store=f"{place}/{system}",
                topology=dualpath.Topology.parse("1P2D"),
                system=system,
                snic_bytes_per_s=20_000_000,
                cnic_bytes_per_s=160_000_000,
                port=0,
            )
            with dualpath.Server(config) as server:
                result = dualpath.replay(server.url, trajectories, measured_from=1)
            print(f"  {system:<16} {result.jct_s:8.1f} s   {result.hit_rate:.0%} of prompt tokens from storage")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, default=40, help="simulated (default: 40)")
    parser.add_argument("--real-agents", type=int, default=6, help="on real clusters (default: 6)")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, help=f"(default: {' '.join(SYSTEMS)})")
    arguments = parser.parse_args()
    simulated(arguments.agents, arguments.systems)
    measured(arguments.real_agents, arguments.systems)


if __name__ == "__main__":
    main()
