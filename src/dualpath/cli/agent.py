"""``dualpath agent``: a node agent alone, for who launches vLLM's servers himself."""

import argparse
import os
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import command, join_address
from dualpath.cli.cluster_options import DEFAULTS, add_node_options
from dualpath.cli.outcome import UsageError, usage_errors

EXAMPLES = """\
Servers of vLLM on the same host, or in containers that share its socket and /dev/shm, attach to it. See
docs/how-to/vllm.md for their commands.

example:
  dualpath agent --coordinator tcp://10.0.0.1:5555 --socket /run/dualpath/agent.sock --store /mnt/kv \\
      --transport tcp --data-host 10.0.0.2 --cluster-secret-file FILE
"""


def add(commands: Any) -> None:
    parser = command(commands, "agent", "start a node agent, to which servers of vLLM attach", EXAMPLES, run)
    parser.add_argument(
        "--coordinator", type=join_address, metavar="ADDRESS", required=True, help="serve's --join-address"
    )
    parser.add_argument(
        "--socket", metavar="PATH", required=True, help="where servers attach: their connector's `agent`"
    )
    add_node_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the agent as a child of this process, which starts it again when it ends, until SIGINT or SIGTERM."""
    from dualpath.cluster.cluster_secret import SECRET_VARIABLE
    from dualpath.cluster.config import ClusterConfig
    from dualpath.cluster.node import run_agent_alone
    from dualpath.cluster.preflight import settled_agent
    from dualpath.kv import StoreError

    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS}
    if given["store"] is None:
        raise UsageError("give --store")
    folder = Path(arguments.socket).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"--socket: {folder} must be a folder in which this user may write")
    with usage_errors(ValueError, StoreError):
        config = settled_agent(ClusterConfig(model="", engine="vllm", **given))
    os.environ.pop(SECRET_VARIABLE, None)
    return run_agent_alone(config, arguments.coordinator, str(Path(arguments.socket).absolute()))
