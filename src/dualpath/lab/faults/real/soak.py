"""One cluster under mixed load for a long time, and a fault of the table every few seconds.

Each minute ends without load, so that its sample shows what is kept, not what is in use. Processes are killed in the
first half only: growth is looked for in those that live through the second.
"""

import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from statistics import median

import msgspec

from dualpath.lab.faults.matrix import Combination, Fault, Phase, Victim
from dualpath.lab.faults.real.asking import WAITS, Asked, Load, Prompt, Turn, until, verdict
from dualpath.lab.faults.real.harm import Scene, Skip, files_in, harm, place_of
from dualpath.lab.faults.real.served import Resources
from dualpath.lab.faults.real.stages import stage_of
from dualpath.lab.faults.real.trial import BACKGROUND, LET_GO_S, Bench, Needs

MINUTE_S = 60.0
PAUSE_S = 0.25
QUOTA_MIB = 24
NEEDS = Needs("server", ("--system", "dualpath", "--snic-rate", "20MB/s", "--store-quota", f"{QUOTA_MIB}MiB"))
CHATS = 6
NEW_SALTS = 0.2
"""Of the chats. Each has blocks for a tenth of the quota, which others must leave."""
LOOKS = 6
"""Requests that are looked at, in turn; each second one under a salt of its own, which has no hits."""
HOLD_S, SHORT_HOLD_S = (0.5, 8.0), (0.5, 3.0)
"""How long faults last; the second does not end a lease."""
WARM_MINUTES = 2
MORE = {"threads": 2, "descriptors": 4, "resident_mib": 16, "shared_memory": 0}
"""What a process may have more at the end of the second half than at its beginning."""
MORE_OF_ALL = {"processes": 0, "shared_memory": 0, "temporary_files": 0}


class Sample(msgspec.Struct, frozen=True):
    """What is there at the end of a minute, when nothing is asked."""

    minute: int
    all: Resources
    each: dict[int, Resources]
    store_files: int
    """Without those that were set aside."""
    store_mib: int


class Soak(msgspec.Struct):
    """What came of it. `found` says what was not as it must be."""

    seed: int
    faults: Counter[str]
    verdicts: Counter[str]
    samples: list[Sample]
    found: list[str]


def run(bench: Bench, chosen: Sequence[Combination], minutes: int, seed: int, show: Callable[[str], None]) -> Soak:
    """Soak one cluster with faults of the chosen combinations. Raises StartError and ValueError."""
    faults = {at[:2]: at for at in chosen if place_of(at) != "namespaces"}
    if not faults:
        raise ValueError("all of these combinations need network namespaces; a soak has none")
    bench.prepare([stage_of(Phase.DECODING, number) for number in range(LOOKS)], CHATS)
    soak = Soak(seed, Counter(), Counter(), [], [])
    with bench.scene(NEEDS) as scene:
        soaking = _Soaking(bench, scene, soak, list(faults.values()))
        for minute in range(minutes):
            soaking.minute(minute, later=2 * minute >= minutes)
            show(_line(soak))
    soak.found += grown(soak.samples)
    return soak


class _Soaking:
    def __init__(self, bench: Bench, scene: Scene, soak: Soak, faults: list[Combination]) -> None:
        self._bench, self._scene, self._soak, self._faults = bench, scene, soak, faults
        self._random = scene.random = random.Random(soak.seed)
        self._lanes = [self._chats(0), self._chats(1), self._short(), self._leaving()]
        self._looks = 0

    def _chats(self, lane: int) -> Iterator[Turn]:
        draw = random.Random(f"{self._soak.seed} {lane}")
        while True:
            salt = f"tenant {draw.random()}" if draw.random() < NEW_SALTS else ""
            for prompt in draw.choice(self._bench.chats):
                yield Turn(prompt, salt)

    def _short(self) -> Iterator[Turn]:
        while True:
            yield from map(Turn, BACKGROUND)

    def _leaving(self) -> Iterator[Turn]:
        draw = random.Random(f"{self._soak.seed} leaving")
        while True:
            yield Turn(draw.choice(draw.choice(self._bench.chats)), "", draw.uniform(0.0, 0.6))

    def minute(self, minute: int, later: bool) -> None:
        soak, cluster = self._soak, self._scene.cluster
        load = Load(cluster.address, self._bench.right, self._lanes, pause_s=PAUSE_S)
        ends_s = time.monotonic() + MINUTE_S
        lives_on = [
            at for at in self._faults if at.fault is not Fault.KILL or at.victim in (Victim.CLIENT, Victim.STORE)
        ]
        while time.monotonic() < ends_s:
            at = self._random.choice(lives_on if later and lives_on else self._faults)
            self._hurt(at, load, SHORT_HOLD_S if later else HOLD_S)
            time.sleep(self._random.uniform(0.0, 3.0))
        load.stop()
        if not until(lambda: not cluster.held(), LET_GO_S, 0.5):
            soak.found.append(f"minute {minute}: held: {', '.join(cluster.held())}")
        soak.verdicts += load.verdicts
        soak.found += [f"minute {minute}: {n} {said}" for said, n in load.verdicts.items() if said.startswith("WRONG")]
        if not load.verdicts["right"]:
            soak.found.append(f"minute {minute}: nothing was answered")
        sizes = []
        for file in files_in(self._scene.store):
            with suppress(FileNotFoundError):
                if "bad" not in file.parts:  # set aside; a namespace keeps 64 of those
                    sizes.append(file.stat().st_size)
        soak.samples.append(Sample(minute, cluster.resources(), cluster.each(), len(sizes), sum(sizes) >> 20))

    def _hurt(self, at: Combination, load: Load, hold_s: tuple[float, float]) -> None:
        soak, scene = self._soak, self._scene
        name = f"{at.fault}:{at.victim}"
        soak.faults[name] += 1
        load.may_break = at.victim is Victim.COORDINATOR
        blocks = sorted(file for file in files_in(scene.store) if file.suffix == ".kv")
        scene.files[:] = self._random.sample(blocks, min(4, len(blocks)))
        scene.look = self._look()
        time.sleep(self._random.uniform(0.0, 0.5))
        try:
            heal = harm(at, scene)
            time.sleep(self._random.uniform(*hold_s))
            heal()
        except (Skip, OSError, AssertionError) as error:
            soak.found.append(f"{name}: {error}")
        said = verdict(scene.look.wait(), self._bench.right[scene.look.prompt], load.may_break)
        soak.verdicts[said] += 1
        if said.startswith("WRONG"):
            soak.found.append(f"{name}: {said}")
        if not until(lambda: self._bench.is_served(scene.cluster), WAITS.served_again_s, 0.5):
            soak.found.append(f"{name}: not served again, or not whole, {WAITS.served_again_s:.0f} s after it healed")
        load.may_break = False

    def _look(self) -> Asked:
        self._looks += 1
        prompt: Prompt = stage_of(Phase.DECODING, self._looks // 2 % LOOKS).look
        return Asked(self._scene.cluster.address, prompt, f"look {self._looks}" if self._looks % 2 else "")


def _line(soak: Soak) -> str:
    last = soak.samples[-1]
    errors = sum(n for said, n in soak.verdicts.items() if said.startswith("error"))
    kept = ", ".join(f"{value} {name}" for name, value in msgspec.structs.asdict(last.all).items())
    return (
        f"minute {last.minute}: {soak.faults.total()} faults, {soak.verdicts['right']:,} right, {errors:,} errors, "
        f"{soak.verdicts['hung up']:,} hung up, {len(soak.found)} wrong; {kept}; "
        f"store {last.store_files} files {last.store_mib} MiB"
    )


def grown(samples: Sequence[Sample]) -> list[str]:
    """Compare the first sample after warm-up with the last, and medians of each process's early and late samples in
    the second half. Returns what has grown beyond what noise explains."""
    if len(samples) <= WARM_MINUTES:
        return []
    first, last = samples[WARM_MINUTES], samples[-1]
    found = [
        f"{name}: {getattr(first.all, name)} after warm-up, {getattr(last.all, name)} at the end"
        for name, more in MORE_OF_ALL.items()
        if getattr(last.all, name) > getattr(first.all, name) + more
    ]
    if last.store_mib > 1.25 * QUOTA_MIB:  # deletions take a moment
        found.append(f"the store has {last.store_mib} MiB, its quota is {QUOTA_MIB}")
    if last.store_files > 2 * first.store_files:
        found.append(f"store files: {first.store_files} after warm-up, {last.store_files} at the end")
    lives: dict[int, list[Resources]] = defaultdict(list)
    for sample in samples[max(WARM_MINUTES, len(samples) // 2) :]:
        for pid, one in sample.each.items():
            lives[pid].append(one)
    for pid, life in lives.items():
        third = max(1, len(life) // 3)
        for name, more in MORE.items():
            early, late = (median(getattr(one, name) for one in part) for part in (life[:third], life[-third:]))
            if late > early + more:
                found.append(f"process {pid}: {name} {early:g}, later {late:g}")
    return found
