"""``dualpath profile``."""

import argparse
from pathlib import Path
from typing import Any

from dualpath.cli.arguments import command, positive
from dualpath.cli.outcome import command_errors, new_console, usage_errors, write_json

EXAMPLES = """\
Measures prefill batches, decode steps, the store and links with the runtime's own code, then lone requests to a small
cluster. It takes about a minute; leave the machine idle meanwhile. `plan` and `simulate` read the file;
docs/design/profile.md says how to write one from your own engine's benchmark.

examples:
  dualpath profile --model .models/demo --store .store
  dualpath profile --model DIR --store DIR --threads 2 --out two-threads.json
  dualpath simulate --like results/demo.json --profile profile.json
"""


def add(commands: Any) -> None:
    parser = command(commands, "profile", "measure this machine, for plan and simulate", EXAMPLES, run)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="a checkpoint's directory")
    parser.add_argument(
        "--store", type=Path, required=True, metavar="DIR", help="where stores will be; test blocks are removed again"
    )
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="torch's, per engine (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("profile.json"), metavar="FILE", help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the profile here too")


def run(arguments: argparse.Namespace) -> int:
    """Measures, prints and writes a profile."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from dualpath.client.replay import ReplayError
    from dualpath.lab.experiments.local_cluster import LaunchError
    from dualpath.lab.profile.measure import ProfileOptions, measure_profile
    from dualpath.lab.profile.tables import profile_tables
    from dualpath.model import UnsupportedModelError

    options = ProfileOptions(
        model=arguments.model,
        store=arguments.store,
        dtype=arguments.dtype,
        threads=arguments.threads,
        device=arguments.device,
    )
    console = new_console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        usage_errors(UnsupportedModelError, ValueError),
        command_errors(LaunchError, ReplayError, OSError),
        Progress(*columns, console=console, transient=True) as progress,
    ):
        task = progress.add_task("", total=1)
        profile = measure_profile(options, lambda what, done: progress.update(task, description=what, completed=done))
    for path in (arguments.out, arguments.json):
        write_json(path, profile)
    console.print(*profile_tables(profile))
    console.print(f"{arguments.out} written")
    return 0
