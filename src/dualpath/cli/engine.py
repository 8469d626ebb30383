"""``dualpath engine``: one engine that joins a coordinator."""

import argparse
from typing import Any

from dualpath.cli.arguments import command, not_negative
from dualpath.cli.cluster_options import add_cluster_options, cluster_config

EXAMPLES = """\
example, on a node that shares the store and the model directory with the coordinator:
  dualpath engine --role decode --coordinator tcp://10.0.0.1:5555 --model DIR --store DIR --transport tcp \\
      --data-host 10.0.0.2
"""


def add(commands: Any) -> None:
    parser = command(commands, "engine", "start one engine that joins a coordinator", EXAMPLES, run)
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument("--coordinator", metavar="ADDRESS", required=True, help="serve's --join-address")
    parser.add_argument("--rank", type=not_negative, default=0, help="tells engines of one role apart in logs")
    add_cluster_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs one engine in this process until its coordinator releases it."""
    from dualpath.cluster.engines.main import run_engine
    from dualpath.cluster.messages import EngineConfig
    from dualpath.core.vocabulary import Role

    role = Role(arguments.role)
    run_engine(
        EngineConfig(
            role=role,
            coordinator=arguments.coordinator,
            cluster=cluster_config(arguments),
            name=f"{role.value}-{arguments.rank}",
        )
    )
    return 0
