"""``dualpath serve``: a cluster on this host, or a coordinator that engines of others join."""

import argparse
from typing import Any

from dualpath.cli.arguments import command, port, positive
from dualpath.cli.cluster_options import add_cluster_options, cluster_config

EXAMPLES = """\
Rates and sizes take units: 60MB/s, 400Gb/s, unlimited; 64MiB, 2GB.

systems:
  basic             reads with prefill engines only, whole prompts at a time (the paper's baseline)
  basic-layerwise   the same, layer by layer
  dualpath-rr       both sides read, in turns
  dualpath          both sides read, the shorter queue first (the default)
  dualpath-split    one request may be read by both sides
  de-only           only decode engines read
  oracle            storage and transfers cost nothing: an upper bound

examples:
  dualpath serve --model ~/models/Qwen3-0.6B --store /mnt/kv
  dualpath serve --topology 1P2D --model .models/demo --store .store/a --snic-rate 60MB/s --cnic-rate 480MB/s
  dualpath serve --model DIR --store DIR --api-key secret --host 0.0.0.0 --port 80
"""


def add(commands: Any) -> None:
    parser = command(commands, "serve", "start a cluster on this host and its OpenAI server", EXAMPLES, run)
    add_cluster_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=port, default=8000, help="0 picks a free one (default: %(default)s)")
    group.add_argument("--api-key", action="append", default=[], metavar="KEY", help="accept only these; repeatable")
    group.add_argument("--name", metavar="NAME", help="model name clients use (default: the directory's)")
    group.add_argument("--max-waiting", type=positive, default=1024, metavar="N", help="beyond this, 429 (%(default)s)")
    group.add_argument("--journal", metavar="FILE", help="write every scheduler input and decision here, as JSON lines")
    group.add_argument("--ready-file", metavar="FILE", help='written once every engine has joined: {"url":…,"pid":…}')
    group.add_argument(
        "--join-address",
        metavar="ADDRESS",
        help="where engines of other hosts join, such as tcp://0.0.0.0:5555; this command then starts none itself",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run a cluster and its server until it is told to stop; with --join-address, engines come from elsewhere."""
    config = cluster_config(arguments)
    from dualpath import serve

    return serve.run(config, local_engines=arguments.join_address is None)
