"""Random steps on a model cluster. A step is data, and any list of steps can be run: that is what makes lists shrink.

Time is in nanoseconds of the model, whose second is short so that small numbers draw it.
"""

import random
from collections import Counter
from collections.abc import Callable

import msgspec

from dualpath.core.audit import audit
from dualpath.core.journal import JournaledScheduler
from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.core.systems import SYSTEMS, find_system
from dualpath.core.vocabulary import Cause, Role, Side
from dualpath.lab.faults.matrix import Combination, Fault, Victim
from dualpath.lab.faults.sim.injection import PAIRS, Injections
from dualpath.lab.faults.sim.model import ModelCluster

INTERVAL_NS = 5_000
SECOND_NS = 1_000_000
LEASE_NS = SECOND_NS // 4
MAX_ENGINES = 9
CLUSTERS = sorted(SYSTEMS.names())
MakeScheduler = Callable[[Policy, Constants, Limits], Scheduler | JournaledScheduler]


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One step: a name in `World.steps`, and numbers that pick and size what it is about."""

    name: str
    a: int = 0
    b: int = 0
    c: int = 0


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What a world begins with."""

    system: str
    tight: bool
    """Small α and β: requests wait for engines more often."""
    staging: bool = False
    """Every second prefill engine stages whole prompts."""

    @classmethod
    def draw(cls, rng: random.Random) -> "Setting":
        return cls(system=rng.choice(CLUSTERS), tight=rng.random() < 0.5, staging=rng.random() < 0.5)


_ORDINARY = {
    "deliver": 500,
    "submit": 55,
    "pass_time": 80,
    "wake_when_due": 80,
    "join": 40,
    "heal": 50,
    "hear_late": 50,
    "repeat": 20,
    "nonsense": 15,
    "drain": 12,
}
_RARE = (Fault.KILL, Fault.STOP, Fault.PARTITION, Fault.PARTITION_TO, Fault.PARTITION_FROM)
"""Engines leave at them; less often than they join, so that there mostly are some."""
_FAULTS = {
    f"{fault}:{victim}": 12 if victim is Victim.CLIENT else 1 if fault in _RARE else 3 for fault, victim in PAIRS
}
DRAWN = [name for name, weight in {**_ORDINARY, **_FAULTS}.items() for _ in range(weight)]
"""Names of steps, each as often as it is to be drawn."""
NAMES = list(dict.fromkeys(DRAWN))


def draw_step(rng: random.Random) -> Step:
    number = rng.getrandbits(62)
    return Step(DRAWN[number % len(DRAWN)], number >> 10 & 255, number >> 18 & 63, number >> 24 & 15)


class World:
    """A cluster to which steps happen. `hit` counts the cells of the table that faults have hit."""

    def __init__(self, setting: Setting, make: MakeScheduler = Scheduler, hit: Counter[Combination] | None = None):
        tight = setting.tight
        constants = Constants(
            alpha_tokens=500 if tight else 5_000,
            beta_tokens=700 if tight else 20_000,
            fetch_interval_ns=INTERVAL_NS,
        )
        limits = Limits(
            max_waiting=6,
            queue_ns=4 * SECOND_NS,
            load_ns=SECOND_NS,
            prefill_ns=SECOND_NS,
            decode_ns=SECOND_NS,
            decode_ns_per_token=100,
            release_ns=SECOND_NS,
            replacement_ns=5 * INTERVAL_NS,
        )
        self.core = make(find_system(setting.system).policy, constants, limits)
        self.cluster = ModelCluster(self.core, INTERVAL_NS, setting.staging)
        self.hit: Counter[Combination] = Counter() if hit is None else hit
        self._injections = Injections(self.cluster, self.hit)
        self.steps: dict[str, Callable[[Step], None]] = {name: getattr(self, f"_{name}") for name in _ORDINARY}
        self.faults = {f"{fault}:{victim}": (fault, victim) for fault, victim in PAIRS}
        self._start()

    def _start(self) -> None:
        for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE):
            self.cluster.join(role, 24, 40)

    def take(self, step: Step) -> None:
        """Take the step. Raises KeyError for a name that is none."""
        fault = self.faults.get(step.name)
        if fault is not None:
            self._injections.inject(*fault, step.a, step.b)
        else:
            self.steps[step.name](step)

    def check(self) -> None:
        """Raises AssertionError for a broken invariant of core, or of the model's books."""
        audit(self.core.life)
        self.cluster.check_books()

    def end(self) -> Counter[str]:
        """Heal everything, let everything end, check that nothing is left. Returns how requests ended, and drops."""
        cluster = self.cluster
        cluster.drain()
        self.check()
        assert self.core.held() == (), f"held at the end: {self.core.held()}"
        counts = self.core.statistics()
        assert counts["overdue_releases"] == 0, "an Abort is unanswered at the end"
        for number, engine in cluster.engines.items():
            assert not engine.buffer and not engine.hbm, f"engine {number} still uses {engine.buffer} {engine.hbm}"
        ended = sum(n for name, n in counts.items() if name in ("finished", "cancelled") or name.startswith("failed_"))
        assert ended == counts["submitted"] == len(cluster.requests), "a request did not end exactly once"
        return Counter({name: n for name, n in counts.items() if n})

    # ── what happens without a fault ────────────────────────────────────────────────────────────────────────────────

    def _deliver(self, step: Step) -> None:
        """A job ends, now and then badly; one of a slow engine only every fourth time."""
        cluster = self.cluster
        if not cluster.jobs:
            return
        index = (step.a << 4 | step.c) % len(cluster.jobs)
        number = cluster.jobs[index].engine
        if number is None or not cluster.engines[number].slow or step.c % 4 == 0:
            cluster.deliver(index, success=step.b != 0)

    def _submit(self, step: Step) -> None:
        self.cluster.submit(64 * (step.a % 27) + 1 + step.b, step.c, max_new_tokens=1 + 8 * step.b)

    def _pass_time(self, step: Step) -> None:
        """Mostly a few fetch intervals, sometimes as long as a state may last; leases end meanwhile."""
        self._move_clock(SECOND_NS // 2 if step.a < 4 else step.c * INTERVAL_NS)

    def _wake_when_due(self, step: Step) -> None:
        """Mostly for a fetch; now and then when only a deadline is near."""
        wake_ns = self.core.next_wake()
        if wake_ns is not None and (wake_ns <= self.cluster.now + INTERVAL_NS or step.c == 0):
            self._move_clock(max(0, wake_ns - self.cluster.now))

    def _move_clock(self, duration_ns: int) -> None:
        cluster = self.cluster
        cluster.pass_time(duration_ns)
        for number, engine in list(cluster.engines.items()):
            if engine.silent_since is not None and cluster.now - engine.silent_since >= LEASE_NS:
                cluster.lose(number)

    def _join(self, step: Step) -> None:
        if len(self.cluster.engines) < MAX_ENGINES:
            missing = set(Role) - {engine.facts.role for engine in self.cluster.engines.values()}
            role = missing.pop() if len(missing) == 1 else Role.PREFILL if step.a % 2 else Role.DECODE
            self.cluster.join(role, 8 + 4 * (step.b % 8), 24 + 4 * (step.b % 8), neighbour=step.c >= 8)

    def _heal(self, step: Step) -> None:
        """One engine is well again, or one piece of work that hung ends at last."""
        cluster = self.cluster
        ill = [e for e in cluster.engines.values() if e.silent_since is not None or e.slow]
        hung = [job for job in cluster.jobs if job.hung]
        if ill and (not hung or step.c % 2):
            cluster.heal(ill[step.a % len(ill)])
        elif hung:
            hung[step.a % len(hung)].hung = False

    def _drain(self, step: Step) -> None:
        """An engine gets no more requests, or gets them again."""
        engines = list(self.cluster.engines)
        if engines:
            self.cluster.drain_engine(engines[step.a % len(engines)], step.c < 8)

    def _hear_late(self, step: Step) -> None:
        """A message that was under way arrives, in any order; perhaps of an engine that is dead by now."""
        cluster = self.cluster
        heard = [
            index
            for index, (speaker, _) in enumerate(cluster.under_way)
            if speaker not in cluster.engines or not cluster.engines[speaker].cut_from
        ]
        if heard:
            _, word = cluster.under_way.pop(heard[step.a % len(heard)])
            cluster.hear(word)

    def _repeat(self, step: Step) -> None:
        """A message again; a piece of buffer only for a request that is over, as the channel promises."""
        cluster = self.cluster
        if not cluster.said:
            return
        word = name, arguments = cluster.said[step.a % len(cluster.said)]
        if name != "buffer_freed" or arguments[0] not in cluster.open:
            cluster.hear(word)

    def _nonsense(self, step: Step) -> None:
        """Words about attempts, sides and engines that do not exist, or are not where the speaker thinks."""
        core, now, key = self.core, self.cluster.now, (step.b, step.a % 16 + 3)
        said: list[Callable[[], None]] = [
            lambda: core.prepared(now, *key),
            lambda: core.loaded(now, *key, Side.PE),
            lambda: core.load_failed(now, *key, Side.DE),
            lambda: core.prefill_done(now, *key),
            lambda: core.buffer_freed(now, *key, 10_000),
            lambda: core.finished(now, *key),
            lambda: core.attempt_failed(now, *key, step.a, Cause.TIMEOUT),
            lambda: core.released(now, *key, step.a),
            lambda: core.engine_lost(now, 1_000_000 + step.a),
            lambda: core.engine_draining(now, 1_000_000 + step.a, True),
        ]
        said[step.c % len(said)]()
        assert core.take_commands() == [], "nonsense had an effect"
