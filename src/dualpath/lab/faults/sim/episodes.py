"""Millions of random steps in episodes, each on a new cluster; a failing one shrinks to a few steps in a file.

The same seed gives the same steps. An episode's length bounds what a failure has to be searched in.
"""

import random
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from dualpath.core.journal import JournaledScheduler
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.lab.faults.matrix import Combination
from dualpath.lab.faults.sim.world import NAMES, MakeScheduler, Setting, Step, World, draw_step

EPISODE_STEPS = 1_000
SCRIPT_VERSION = 1
SHOWN_EVERY_S = 5.0


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """Steps to run again, and what they ended in."""

    setting: Setting
    steps: tuple[Step, ...]
    failure: str = ""


class _Header(msgspec.Struct, frozen=True):
    faults: int
    setting: Setting
    failure: str = ""


class Failed(Exception):  # noqa: N818 (a thing that happened)
    """The steps broke something. `where` names the place that noticed, to tell one failure from another."""

    def __init__(self, error: Exception, taken: int) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.taken = taken
        """Steps up to the one that failed."""
        frames = traceback.extract_tb(error.__traceback__)[-2:]
        self.where = (type(error), *((frame.filename, frame.lineno) for frame in frames))


class Report(msgspec.Struct, kw_only=True):
    """What a run did. `outcomes` are core's counters over all episodes, `hit` the cells of the table, by name."""

    seed: int
    steps: int
    episodes: int
    audited: int
    seconds: float
    outcomes: dict[str, int]
    hit: dict[str, int]
    failure: Script | None = None


def play(
    setting: Setting,
    steps: Iterable[Step],
    make: MakeScheduler = Scheduler,
    *,
    audit_every: int = 1,
    hit: Counter[Combination] | None = None,
) -> Counter[str]:
    """Run an episode to its end. Returns core's counters. Raises Failed."""
    taken = 0
    try:
        world = World(setting, make, hit)
        for step in steps:
            taken += 1
            world.take(step)
            if taken % audit_every == 0:
                world.check()
        return world.end()
    except Exception as error:
        raise Failed(error, taken) from error


def run(
    steps: int,
    seed: int,
    make: MakeScheduler = Scheduler,
    *,
    audit_every: int = 1,
    on_progress: Callable[[Report], None] = lambda _: None,
) -> Report:
    """Run episodes until `steps` are taken or one fails, which is then shrunk."""
    began, shown_s = time.monotonic(), 0.0
    hit: Counter[Combination] = Counter()
    outcomes: Counter[str] = Counter()
    report = Report(seed=seed, steps=0, episodes=0, audited=0, seconds=0.0, outcomes={}, hit={})
    while report.steps < steps and report.failure is None:
        setting, script = episode(seed, report.episodes, min(EPISODE_STEPS, steps - report.steps))
        try:
            outcomes += play(setting, script, make, audit_every=audit_every, hit=hit)
        except Failed as failed:
            report.failure = shrink(setting, script[: failed.taken], failed, make)
        report.steps += len(script)
        report.audited += len(script) // audit_every
        report.episodes += 1
        report.seconds = time.monotonic() - began
        if report.seconds - shown_s >= SHOWN_EVERY_S:
            shown_s = report.seconds
            on_progress(report)
    report.outcomes = dict(sorted(outcomes.items()))
    report.hit = {str(at): n for at, n in sorted(hit.items())}
    return report


def episode(seed: int, number: int, length: int) -> tuple[Setting, list[Step]]:
    """Returns the episode of this number, which depends on nothing else."""
    rng = random.Random(f"{seed}:{number}")
    setting = Setting.draw(rng)
    return setting, [draw_step(rng) for _ in range(length)]


def shrink(setting: Setting, steps: Sequence[Step], failed: Failed, make: MakeScheduler) -> Script:
    """Leave out and simplify steps as long as the same place notices (delta debugging)."""
    last = failed

    def fails(candidate: Sequence[Step]) -> bool:
        nonlocal last
        try:
            play(setting, candidate, make)
        except Failed as other:
            if other.where == failed.where:
                last = other
                return True
        return False

    kept = list(steps)
    if not fails(kept):  # it was audited less often: the first place that notices is another
        return Script(setting=setting, steps=tuple(kept), failure=str(failed))
    before: list[Step] = []
    while kept != before:  # simpler steps often make others needless
        before = kept
        kept = _simpler(_fewer(kept, fails), fails)
    fails(kept)
    return Script(setting=setting, steps=tuple(kept), failure=str(last))


def _fewer(kept: list[Step], fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    """Leave out halves, quarters, …, single steps."""
    size = max(1, len(kept) // 2)
    while size:
        start, before = 0, len(kept)
        while start < len(kept):
            candidate = kept[:start] + kept[start + size :]
            if fails(candidate):
                kept = candidate
            else:
                start += size
        if size > 1 or len(kept) == before:
            size //= 2
    return kept


def _simpler(kept: list[Step], fails: Callable[[Sequence[Step]], bool]) -> list[Step]:
    """Make numbers 0, one step after the other."""
    for index in range(len(kept)):
        for smaller in _smaller(kept[index]):
            candidate = [*kept[:index], smaller, *kept[index + 1 :]]
            if fails(candidate):
                kept = candidate
                break
    return kept


def _smaller(step: Step) -> Iterator[Step]:
    if step != Step(step.name):
        yield Step(step.name)
    for name in ("a", "b", "c"):
        if getattr(step, name):
            yield msgspec.structs.replace(step, **{name: 0})


def write(script: Script, path: Path) -> None:
    """Write the script: a header, then a line for each step. Raises OSError."""
    header = _Header(SCRIPT_VERSION, script.setting, script.failure)
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in (header, *script.steps)))


def read(path: Path) -> Script:
    """Raises OSError, and ValueError that names the line that is wrong."""
    first, *lines = path.read_bytes().splitlines() or [b""]
    try:
        header = msgspec.json.decode(first, type=_Header)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}, line 1: {error}; this is no file of `dualpath faults sim`") from error
    if header.faults != SCRIPT_VERSION:
        raise ValueError(f"{path}, line 1: version {header.faults}, this program reads {SCRIPT_VERSION}")
    steps = []
    for number, line in enumerate(lines, start=2):
        try:
            step = msgspec.json.decode(line, type=Step)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if step.name not in NAMES:
            raise ValueError(f"{path}, line {number}: {step.name!r} is no step; known are {', '.join(NAMES)}")
        steps.append(step)
    return Script(setting=header.setting, steps=tuple(steps), failure=header.failure)


def replay(script: Script, show: Callable[[str], None], make: MakeScheduler = Scheduler) -> None:
    """Run a script again; `show` gets each step, then what core was told and answered. Raises Failed.

    A scheduler of another class keeps no journal, which would go past its own methods.
    """

    def journaled(policy: Policy, constants: Constants, limits: Limits) -> JournaledScheduler:
        core = Scheduler(policy, constants, limits)
        return JournaledScheduler(core, lambda line: show(f"    {line.decode().rstrip()}"))

    def shown() -> Iterator[Step]:
        for number, step in enumerate(script.steps, start=1):
            show(f"{number}. {step.name} {step.a} {step.b} {step.c}")
            yield step

    play(script.setting, shown(), journaled if make is Scheduler else make)
