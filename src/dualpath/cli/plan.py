"""``dualpath plan``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import CLUSTER_HELP, add_profile, add_source, command, duration_ns, positive_number
from dualpath.cli.outcome import new_console, usage_errors, write_json

EXAMPLES = f"""\
{CLUSTER_HELP}
The rates are upper bounds, in closed form.

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
    """Prints what a cluster can do for a workload."""
    import msgspec

    from dualpath.lab.planning import plan
    from dualpath.lab.report.capacity_plan import plan_sentences, resource_table, split_table
    from dualpath.results.online import Slo

    with usage_errors(ValueError):
        answer = plan(
            arguments.cluster,
            arguments.trace,
            model=arguments.model,
            profile=arguments.profile,
            slo=Slo(ttft_s=arguments.ttft / 1e9, tpot_s=arguments.tpot / 1e9),
            agents_per_s=arguments.aps,
            max_context_tokens=arguments.max_context,
        )
    write_json(arguments.json, answer)
    document = msgspec.to_builtins(answer)
    console = new_console()
    console.print(resource_table(document), split_table(document))
    console.print(*plan_sentences(document), sep="\n\n", highlight=False)
    return 0
