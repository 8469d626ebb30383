"""``dualpath engine``: a node, of one engine or more, that joins a coordinator."""

import argparse
from typing import Any

from dualpath.cli.arguments import command, join_address, not_negative, positive
from dualpath.cli.cluster_options import add_cluster_options, cluster_config
from dualpath.cli.outcome import UsageError, usage_errors

EXAMPLES = """\
example, on a node that shares the store and the model directory with the coordinator:
  dualpath engine --role decode --coordinator tcp://10.0.0.1:5555 --model DIR --store DIR --transport tcp \\
      --data-host 10.0.0.2 --cluster-secret-file FILE

With --engine vllm its engines are servers of vLLM, on --data-host; what follows -- goes to each.
"""


def add(commands: Any) -> None:
    parser = command(commands, "engine", "start a node that joins a coordinator", EXAMPLES, run)
    parser.add_argument("--role", choices=("prefill", "decode"), required=True)
    parser.add_argument(
        "--coordinator", type=join_address, metavar="ADDRESS", required=True, help="serve's --join-address"
    )
    parser.add_argument("--rank", type=not_negative, default=0, help="tells nodes of one role apart in logs")
    parser.add_argument("--engines", type=positive, metavar="N", help="of the node (default: as --topology says)")
    names = "names of the model, as the router has them; for servers of vLLM (default: the checkpoint's)"
    parser.add_argument("--served-model-name", "--name", nargs="+", dest="names", metavar="NAME", help=names)
    add_cluster_options(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the node's agent and engines as children of this process, until its coordinator releases them."""
    import msgspec

    from dualpath.cluster.cluster_secret import HOW_TO_GIVE
    from dualpath.cluster.node import run_node
    from dualpath.cluster.preflight_files import check_buffers
    from dualpath.core.vocabulary import Role
    from dualpath.spec.topology import Topology

    if arguments.engine == "vllm":
        from dualpath.cluster.preflight_vllm import check_key

        with usage_errors(ValueError):
            check_key("--engine vllm")
    arguments.served_model_name, *aliases = arguments.names or [None]
    arguments.served_model_aliases = tuple(aliases)
    given = cluster_config(arguments)
    if given.cluster_secret is None:
        raise UsageError(f"an engine needs the secret of the cluster that it joins; {HOW_TO_GIVE}")
    role = Role(arguments.role)
    config = given.of_node(role, arguments.rank)
    if arguments.engines:
        config = msgspec.structs.replace(config, topology=Topology(1, 1, arguments.engines))
    with usage_errors(ValueError):
        check_buffers(config, config.topology.sizes[0])
    return run_node(config, arguments.coordinator, role, arguments.rank)
