"""``dualpath serve``: a cluster on this host, or a coordinator that engines of other hosts join."""

import argparse
import os
from pathlib import Path
from typing import Any

from dualpath.cli import option_sources
from dualpath.cli.api_keys import add_key_options, api_keys
from dualpath.cli.arguments import byte_count, command, listen_address, port, positive, systems_help
from dualpath.cli.cluster_options import DEFAULTS, add_cluster_options, before_dashes, cluster_config, kv_events
from dualpath.cli.outcome import UsageError, usage_errors
from dualpath.cluster.config import ClusterConfig
from dualpath.spec.log import FORMATS

DEFAULT_QUOTA = "10GiB"
EXAMPLES = f"""\
Rates and sizes take units: 60MB/s, 400Gb/s, unlimited; 64MiB, 2GB.

{option_sources.HELP.format(prefix=option_sources.prefix_of("serve"))}
{systems_help()}

examples:
  dualpath serve ~/models/Qwen3-0.6B
  dualpath serve ~/models/Qwen3-0.6B --store /mnt/kv --topology 1P2D --snic-rate 60MB/s --cnic-rate 480MB/s
  dualpath serve ~/models/Qwen3-0.6B --engine vllm --topology 1P2D --store /mnt/kv -- --max-model-len 8192
  dualpath serve --config serve.yaml --api-key-file keys --host 0.0.0.0 --port 80
"""


def add(commands: Any) -> None:
    parser = command(commands, "serve", "start a cluster and its OpenAI server on this host", EXAMPLES, run)
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    add_cluster_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--config", metavar="FILE", help="options as YAML, TOML or JSON")
    group.add_argument("--host", default=DEFAULTS["host"], help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=port, default=DEFAULTS["port"], help="0 picks a free one (default: %(default)s)")
    certificate = "the server's certificate and its chain, as PEM: it then speaks HTTPS"
    group.add_argument("--ssl-certfile", metavar="FILE", help=certificate)
    group.add_argument("--ssl-keyfile", metavar="FILE", help="its key, where it is not in the same file")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="whose certificates clients may show")
    reqs = "whether clients must show one: 0 no, 1 they may, 2 they must (default: %(default)s)"
    group.add_argument("--ssl-cert-reqs", type=int, choices=(0, 1, 2), default=DEFAULTS["ssl_cert_reqs"], help=reqs)
    add_key_options(group)
    names = "names that requests may use; answers carry the first (default: the checkpoint's)"
    group.add_argument("--served-model-name", "--name", nargs="+", dest="names", metavar="NAME", help=names)
    for flag, field, what in (
        ("--drain-timeout", "drain_s", "running requests have to end when the server is told to stop"),
        ("--join-timeout", "join_timeout_s", "engines may take to load and join"),
        ("--replacement-timeout", "replacement_timeout_s", "requests wait when the last engine of a role is lost"),
    ):
        more = {"join_timeout_s": "; 600 with vLLM", "replacement_timeout_s": "; 180 with vLLM"}.get(field, "")
        told = f"seconds that {what} (default: %(default)g{more})"
        group.add_argument(flag, type=float, default=DEFAULTS[field], dest=field, metavar="S", help=told)
    control = "open /pause, /update_weights, /sleep … to trainers: with an API key, or from this host where none is set"
    group.add_argument("--enable-control", action="store_true", help=control)
    parsers = "how the model {}; a name as in vLLM, or none (default: as the chat template says)"
    for flag, what in (("--tool-call-parser", "writes tool calls"), ("--reasoning-parser", "marks reasoning")):
        group.add_argument(flag, metavar="NAME", help=parsers.format(what))
    waiting = {"type": positive, "default": DEFAULTS["max_waiting"], "metavar": "N"}
    group.add_argument("--max-waiting", **waiting, help="requests that may wait; more get 429 (default: %(default)s)")
    group.add_argument("--access-log", action="store_true", help="log a line for every request")
    styles = "of what goes to stderr (default: %(default)s)"
    group.add_argument("--log-format", choices=FORMATS, default=DEFAULTS["log_format"], help=styles)
    traces = "send a span for each request there, such as http://localhost:4318/v1/traces; needs dualpath[otel]"
    group.add_argument("--otlp-traces-endpoint", metavar="URL", help=traces)
    events = "publish which blocks are in storage, for routers; JSON as of vLLM's option of this name"
    group.add_argument("--kv-events-config", type=kv_events, dest="kv_events", metavar="JSON", help=events)
    group.add_argument("--journal", metavar="FILE", help="write every scheduler input and decision here, as JSON lines")
    group.add_argument("--ready-file", metavar="FILE", help='written once every engine has joined: {"url":…,"pid":…}')
    group.add_argument(
        "--join-address",
        dest="control_address",
        type=listen_address,
        default=DEFAULTS["control_address"],
        metavar="ADDRESS",
        help="where engines of other hosts join, such as tcp://0.0.0.0:5555; this command then starts none itself",
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs a cluster and its server until it is told to stop; with --join-address, engines come from elsewhere."""
    parser = argparse.ArgumentParser(prog="dualpath serve", allow_abbrev=False)
    _add_options(parser)
    given = option_sources.parse_with_sources(parser, "serve", before_dashes(arguments.command_line)[2:])
    given.command_line = arguments.command_line
    given.model = _one_model(given.model_argument, given.model)
    if given.store is None:
        _use_default_store(given)
    given.api_keys = api_keys(given)
    os.environ.pop(f"{option_sources.prefix_of('serve')}API_KEY", None)  # engines would inherit it
    given.served_model_name, *given.served_model_aliases = given.names or [None]
    given.served_model_aliases = tuple(given.served_model_aliases)
    starts_engines = given.control_address == DEFAULTS["control_address"]
    if given.engine == "vllm":
        _leave_time_for_vllm(given)
    config = cluster_config(given, starts_engines)
    from dualpath.serving import supervising

    if config.engine == "dualpath":
        _check_parsers(config)
    return supervising.run(config, starts_engines)


def _leave_time_for_vllm(given: argparse.Namespace) -> None:
    """Its servers take minutes where an embedded engine takes seconds. What the user has said stays."""
    for field, seconds in (("join_timeout_s", 600.0), ("replacement_timeout_s", 180.0)):
        if getattr(given, field) == DEFAULTS[field]:
            setattr(given, field, seconds)


def _check_parsers(config: ClusterConfig) -> None:
    """Raises UsageError for names that are not known."""
    from dualpath.server.chat.formats import find_call_format, find_reasoning_format

    with usage_errors(ValueError):
        find_call_format(config.tool_call_parser, "")
        find_reasoning_format(config.reasoning_parser, "")


def _one_model(argument: str | None, option: str | None) -> str:
    if argument is not None and option is not None and argument != option:
        raise UsageError(f"MODEL is {argument} and --model is {option}; give one of them")
    model = argument or option
    if model is None:
        raise UsageError(
            "give a model: a Hugging Face checkpoint's directory, as in dualpath serve ~/models/Qwen3-0.6B"
        )
    return model


def _use_default_store(given: argparse.Namespace) -> None:
    """Keep KV in the user's cache, for this user's eyes only, because it is made from what people have asked."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = cache / "dualpath" / "kv"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{place} can't be made: {error.strerror}; give --store") from error
    given.store = str(place)
    given.store_quota_bytes = given.store_quota_bytes or byte_count(DEFAULT_QUOTA)
