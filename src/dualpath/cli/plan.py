"""``dualpath plan``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import CLUSTER_HELP, add_profile, add_source, command, duration_ns, positive_number
from dualpath.cli.outcome import new_console, usage_errors, write_json

EXAMPLES = f"""\
{CLUSTER_HELP} Rates are upper bounds, in closed form.

examples:
  dualpath plan ds660b-2p4d
  dualpath plan ds27b-1p1d --trace 32K --ttft 2s --tpot 30ms
  dualpath plan my-cluster.toml --trace session-1.json session-2.json --max-context 65536
  dualpath plan my-cluster.toml --trace conversation_trace.jsonl --json plan.json
  dualpath plan my-cluster.toml --profile profile.json            measured steps instead of a roofline
"""


def add(commands: Any) -> None:
    parser = command(commands, "plan", "what a cluster can do for agents, and what limits it", EXAMPLES, run)
    parser.add_argument("cluster", metavar="CLUSTER", help="a preset or a TOML file, see below")
    add_source(parser)
    add_profile(parser)
    parser.add_argument("--aps", type=positive_number, metavar="RATE", help="agents per second, for the working set")
    parser.add_argument("--ttft", type=duration_ns, default="4s", metavar="TIME", help="SLO (default: %(default)s)")
    parser.add_argument("--tpot", type=duration_ns, default="50ms", metavar="TIME", help="SLO (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan here too")


def run(arguments: argparse.Namespace) -> int:
    """Print what a cluster can do for a workload."""
    import msgspec

    from dualpath.lab.facts.cluster import ClusterError, load_cluster
    from dualpath.lab.facts.profile import ProfileError, applied, load_profile
    from dualpath.lab.planning import PlanError, Slo, plan_capacity
    from dualpath.lab.planning.traces import load_of
    from dualpath.lab.report.plan import plan_sentences, resource_table, split_table
    from dualpath.traces.reading import TraceError

    slo = Slo(ttft_s=arguments.ttft / 1e9, tpot_s=arguments.tpot / 1e9)
    with usage_errors(ClusterError, ProfileError, TraceError, PlanError):
        cluster = load_cluster(arguments.cluster)
        if arguments.model is not None:
            cluster = cluster.with_model(arguments.model)
        if arguments.profile is not None:
            cluster = applied(cluster, load_profile(arguments.profile), str(arguments.profile))
        answer = plan_capacity(cluster, load_of(arguments.trace, arguments.max_context), slo, arguments.aps)
    write_json(arguments.json, answer)
    document = msgspec.to_builtins(answer)
    console = new_console()
    console.print(resource_table(document), split_table(document))
    console.print(*plan_sentences(document), sep="\n\n", highlight=False)
    return 0
