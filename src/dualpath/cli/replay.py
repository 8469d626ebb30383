"""``dualpath replay``."""

import argparse
import shlex
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import SOURCES_HELP, command, duration_ns, not_negative, positive, positive_number
from dualpath.cli.outcome import command_errors, new_console, usage_errors, write_json, write_report_beside

EXAMPLES = """\
URL is an OpenAI server's: dualpath, vLLM, SGLang. Prompts are sent as token ids; each answer has exactly the length
that the trace says. All agents start at once, unless --aps gives a rate of arrivals.

examples:
  dualpath replay http://127.0.0.1:8000                                 12 generated agents, 4 turns each
  dualpath replay http://127.0.0.1:8000 --agents 64 --turns 10 --context 8000 --append 400 --generate 100
  dualpath replay URL --trace sessions/*.json --scale 16 --max-context 8192     recorded agents, counts over 16
  dualpath replay URL --trace conversation_trace.jsonl --agents 200             a Mooncake trace
  dualpath replay URL --trace mini-swe/ --tokenizer MODEL/tokenizer.json        sessions with their text
  dualpath replay URL --trace 32K --aps 0.5 --duration 10min --ttft 4s --tpot 50ms
  dualpath replay URL --trace 32K --find-aps 0.1:3 --duration 10min             the most agents per second
  dualpath replay URL --trace 64K --agents 500 --resume                         continue after Ctrl-C
"""


def add(commands: Any) -> None:
    parser = command(commands, "replay", "send agents to an OpenAI server and measure it", EXAMPLES, run)
    parser.argument_default = argparse.SUPPRESS  # ReplayRequest has the defaults
    parser.add_argument("url", metavar="URL", help="the server's, /v1 optional")
    _agents(parser.add_argument_group("agents"))
    _arrivals(parser.add_argument_group("arrivals"))
    _client(parser.add_argument_group("client and results"))


def _agents(group: Any) -> None:
    add = group.add_argument
    add("--trace", nargs="+", dest="traces", metavar="TRACE", help=SOURCES_HELP)
    add("--agents", type=positive, metavar="N", help="(default: 12 generated, or one per recording)")
    add("--turns", type=positive, metavar="N", help="turns per agent; a trace is cut there (default: 4 generated)")
    for name, field, what in (
        ("--context", "first_context_tokens", "tokens of the first prompt (default: 2800)"),
        ("--append", "append_tokens", "tokens that a turn appends (default: 64)"),
        ("--generate", "generate_tokens", "tokens that a turn generates (default: 16)"),
    ):
        add(name, type=positive, dest=field, metavar="N", help=f"mean of generated agents: {what}")
    add("--gap", type=duration_ns, metavar="TIME", help="mean pause of generated agents (default: 0)")
    add("--scale", type=positive_number, metavar="X", help="divide a trace's token counts by this")
    add("--max-context", type=positive, dest="max_context_tokens", metavar="N", help="cut a trace at N tokens")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json that counts the tokens of a trace's texts")
    add("--seed", type=not_negative, metavar="N", help="(default: 0)")
    add("--token-ids-below", type=positive, metavar="N", help="bound of ids sent, within the vocabulary (default: 256)")
    add("--gap-scale", type=_not_negative_number, metavar="X", help="factor on pauses (default: 0; with --aps: 1)")


def _arrivals(group: Any) -> None:
    add = group.add_argument
    add("--aps", type=positive_number, dest="agents_per_s", metavar="RATE", help="agents per second")
    add("--find-aps", type=_range, dest="find_agents_per_s", metavar="LOW:HIGH", help="find the highest that holds")
    add("--duration", type=duration_ns, metavar="TIME", help="length of the measurement or probe (default: 2min)")
    add("--window", type=duration_ns, metavar="TIME", help="(default: a twelfth of the duration)")
    add("--ttft", type=duration_ns, metavar="TIME", help="SLO, mean over a window (default: 4s)")
    add("--tpot", type=duration_ns, metavar="TIME", help="SLO, mean over a window (default: 50ms)")


def _client(group: Any) -> None:
    add = group.add_argument
    add("--server", choices=("dualpath", "vllm", "sglang", "other"), help="kind (default: what the server says)")
    add("--api-key", metavar="KEY")
    add("--retries", type=not_negative, metavar="N", help="further tries of a turn (default: 2)")
    add("--turn-timeout", type=duration_ns, metavar="TIME", help="limit of one try (default: 5min)")
    add("--out", type=Path, metavar="DIR", help="directory of replay.json and turns.jsonl (default: results)")
    add("--resume", action="store_true", help="continue from the turns.jsonl in --out")
    add("--json", type=Path, default=None, metavar="FILE", help="write the result here too")


def _not_negative_number(text: str) -> float:
    return 0.0 if text.strip() in ("0", "0.0") else positive_number(text)


def _range(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    if not colon or positive_number(low) >= positive_number(high):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of rates; write the lower one first, such as 0.1:2")
    return positive_number(low), positive_number(high)


def run(arguments: argparse.Namespace) -> int:
    """Replays and prints the result. The exit code is 1 if a turn failed, or if no rate of a search held."""
    from dualpath.client.replay import ReplayError
    from dualpath.client.resume import JournalError
    from dualpath.lab.replay.options import ReplayRequest, source_of
    from dualpath.lab.replay.replay_table import replay_sentences, replay_table
    from dualpath.lab.replay.replaying import run_replay
    from dualpath.results import Slo

    given = vars(arguments)
    fields = {name: value for name, value in given.items() if name in ReplayRequest.__struct_fields__}
    fields |= {
        f"{name}_s": given[name] / 1e9 for name in ("gap", "duration", "window", "turn_timeout") if name in given
    }
    fields |= {"traces": tuple(given.get("traces", ())), "command": shlex.join(arguments.command_line)}
    fields["slo"] = Slo(**{f"{name}_s": given[name] / 1e9 for name in ("ttft", "tpot") if name in given})
    console = new_console()
    with usage_errors(ValueError):
        request = ReplayRequest(**fields)
        request.client_options()
        source = source_of(request)
    with command_errors(ReplayError, JournalError, OSError):
        result = run_replay(request, source, console)
    write_json(arguments.json, result)
    console.print(replay_table(result))
    console.print(*replay_sentences(result), sep="\n", highlight=False, soft_wrap=True)
    page = write_report_beside(request.out / "replay.json", result)
    console.print(f"\nwritten: {request.out}/replay.json, {page}", highlight=False)
    if result.capacity is not None:
        return int(result.capacity.holds_agents_per_s is None)
    return int(any(one.errors for one in result.runs))
