"""``dualpath serve``: a cluster on this host, or a coordinator that engines of other hosts join."""

import argparse
from typing import Any

from dualpath.cli.api_keys import add_key_options, api_keys
from dualpath.cli.arguments import command, port, positive, systems_help
from dualpath.cli.cluster_options import DEFAULTS, add_cluster_options, cluster_config
from dualpath.cli.outcome import usage_errors

EXAMPLES = f"""\
Rates and sizes take units: 60MB/s, 400Gb/s, unlimited; 64MiB, 2GB.

{systems_help()}

examples:
  dualpath serve --model ~/models/Qwen3-0.6B --store /mnt/kv
  dualpath serve --topology 1P2D --model .models/demo --store .store/a --snic-rate 60MB/s --cnic-rate 480MB/s
  dualpath serve --model DIR --store DIR --api-key-file keys --host 0.0.0.0 --port 80
"""


def add(commands: Any) -> None:
    parser = command(commands, "serve", "start a cluster and its OpenAI server on this host", EXAMPLES, run)
    add_cluster_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default=DEFAULTS["host"], help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=port, default=DEFAULTS["port"], help="0 picks a free one (default: %(default)s)")
    add_key_options(group)
    drain = "seconds that running requests have to end when the server is told to stop (default: %(default)g)"
    group.add_argument(
        "--drain-timeout", type=float, default=DEFAULTS["drain_s"], dest="drain_s", metavar="S", help=drain
    )
    control = "open /pause, /update_weights, /sleep … to trainers: with an API key, or from this host where none is set"
    group.add_argument("--enable-control", action="store_true", help=control)
    name = "model name clients use (default: the directory's)"
    group.add_argument("--name", dest="served_model_name", metavar="NAME", help=name)
    parsers = "how the model {}; a name as in vLLM, or none (default: as the chat template says)"
    for flag, what in (("--tool-call-parser", "writes tool calls"), ("--reasoning-parser", "marks reasoning")):
        group.add_argument(flag, metavar="NAME", help=parsers.format(what))
    waiting = {"type": positive, "default": DEFAULTS["max_waiting"], "metavar": "N"}
    group.add_argument("--max-waiting", **waiting, help="requests that may wait; more get 429 (default: %(default)s)")
    group.add_argument("--journal", metavar="FILE", help="write every scheduler input and decision here, as JSON lines")
    group.add_argument("--ready-file", metavar="FILE", help='written once every engine has joined: {"url":…,"pid":…}')
    group.add_argument(
        "--join-address",
        dest="control_address",
        default=DEFAULTS["control_address"],
        metavar="ADDRESS",
        help="where engines of other hosts join, such as tcp://0.0.0.0:5555; this command then starts none itself",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs a cluster and its server until it is told to stop; with --join-address, engines come from elsewhere."""
    arguments.api_keys = api_keys(arguments)
    config = cluster_config(arguments)
    from dualpath import serving
    from dualpath.server.chat.formats import find_call_format, find_reasoning_format

    with usage_errors(ValueError):  # before engines start
        find_call_format(config.tool_call_parser, "")
        find_reasoning_format(config.reasoning_parser, "")
    return serving.run(config, local_engines=arguments.control_address == DEFAULTS["control_address"])
