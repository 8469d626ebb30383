"""What each fault does to the model, and which cells of the table it hits when it does.

An injection finds its victim by a number, so that any list of steps can be run: where there is no such victim, nothing
happens. Faults that last heal by `World`'s step `heal`, or end with the lease of their engine.
"""

from collections import Counter
from collections.abc import Sequence

from dualpath.core.request import Request, State
from dualpath.core.vocabulary import Role, Side
from dualpath.lab.faults.matrix import OF_WORK, PATHS_DIFFER, Combination, Fault, Path, Phase, Victim, combinations
from dualpath.lab.faults.sim.engines import Job, ModelEngine
from dualpath.lab.faults.sim.model import ModelCluster

SIM = frozenset(combinations("sim"))
PAIRS = list(dict.fromkeys((at.fault, at.victim) for at in combinations("sim")))
"""What may happen to whom in this body."""
_PHASES = {State.QUEUED: Phase.QUEUED, State.ALLOCATING: Phase.ALLOCATING, State.LOADING: Phase.READING}
_ROLES = {Victim.PE: (Role.PREFILL,), Victim.DE: (Role.DECODE,), Victim.AGENT: (Role.PREFILL, Role.DECODE)}
_DATA = (Phase.PREFILLING, Phase.SHIPPING)


class Injections:
    """The faults of one cluster; `hit` counts the cells that they have hit."""

    def __init__(self, cluster: ModelCluster, hit: Counter[Combination]) -> None:
        self._cluster = cluster
        self._hit = hit

    def inject(self, fault: Fault, victim: Victim, which: int, success: int) -> None:
        """`which` picks the victim, `success` says how what is late or wrong turns out."""
        cluster = self._cluster
        if victim is Victim.CLIENT:
            if cluster.open:
                request = list(cluster.open)[which % len(cluster.open)]
                self._note(fault, victim, [request])
                cluster.cancel(request)
        elif victim in _ROLES and fault not in OF_WORK:
            engines = self._engines(victim, which)
            if engines:
                self._note_engines(fault, victim, engines)
                self._harm(fault, engines)
        else:
            self._work(fault, victim, which, success)

    def _engines(self, victim: Victim, which: int) -> list[ModelEngine]:
        """One engine, or for an agent all engines of its node."""
        engines = [engine for engine in self._cluster.engines.values() if engine.facts.role in _ROLES[victim]]
        if not engines:
            return []
        chosen = engines[which % len(engines)]
        if victim is not Victim.AGENT:
            return [chosen]
        return [engine for engine in engines if engine.facts.node == chosen.facts.node]

    def _harm(self, fault: Fault, engines: list[ModelEngine]) -> None:
        for engine in engines:
            if fault is Fault.KILL:
                self._cluster.lose(engine.facts.engine)
                continue
            if fault is Fault.SLOW:
                engine.slow = True
                continue
            engine.stopped |= fault is Fault.STOP
            engine.cut_to |= fault in (Fault.PARTITION_TO, Fault.PARTITION)
            engine.cut_from |= fault in (Fault.PARTITION_FROM, Fault.PARTITION)
            if engine.silent_since is None:
                engine.silent_since = self._cluster.now

    # ── faults of one piece of work ─────────────────────────────────────────────────────────────────────────────────

    def _work(self, fault: Fault, victim: Victim, which: int, success: int) -> None:
        """What hits a read, a transfer or a step, not the process: it fails, hangs, or is heard of late or twice."""
        cluster = self._cluster
        jobs = [index for index, job in enumerate(cluster.jobs) if self._concerns(victim, job)]
        if not jobs:
            return
        index = jobs[which % len(jobs)]
        job = cluster.jobs[index]
        self._note(fault, victim, [job.key[0]])
        if fault in (Fault.HUNG, Fault.STOP):
            job.hung = True
        elif fault in (Fault.LATE, Fault.SLOW):
            cluster.late = True
            cluster.deliver(index, success % 4 != 0)
            cluster.late = False
        elif victim in _ROLES:
            self._speak_twice(index, success)
        else:
            cluster.deliver(index, success=False)

    def _speak_twice(self, index: int, success: int) -> None:
        """A message again. A piece of buffer is never said twice: the channel promises that."""
        cluster = self._cluster
        said = len(cluster.said)
        cluster.deliver(index, success % 4 != 0)
        for word in cluster.said[said:]:
            if word[0] != "buffer_freed":
                cluster.hear(word)

    def _concerns(self, victim: Victim, job: Job) -> bool:
        if job.engine is None or job.hung:
            return False
        if victim is Victim.STORE:
            return job.phase is Phase.READING
        if victim is Victim.LINK:
            return job.phase in _DATA
        return self._cluster.engines[job.engine].facts.role in _ROLES[victim]

    # ── which cells ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _note_engines(self, fault: Fault, victim: Victim, engines: list[ModelEngine]) -> None:
        numbers = {engine.facts.engine for engine in engines}
        live = self._cluster.core.life.requests.values()
        self._note(
            fault,
            victim,
            [
                request.id
                for request in live
                if request.state is State.QUEUED
                or request.prefill_engine in numbers
                or request.decode_engine in numbers
            ],
        )

    def _note(self, fault: Fault, victim: Victim, requests: Sequence[int]) -> None:
        live = self._cluster.core.life.requests
        for number in requests:
            request = live.get(number)
            phase = None if request is None else self._phase(request)
            if request is None or phase is None:
                continue
            path = _path(request) if phase in PATHS_DIFFER else Path.PE
            if path is not None and (at := Combination(fault, victim, path, phase)) in SIM:
                self._hit[at] += 1

    def _phase(self, request: Request) -> Phase | None:
        if request.state in (State.PREFILLING, State.DECODING):
            return self._cluster.requests[request.id].part
        return _PHASES.get(request.state)


def _path(request: Request) -> Path | None:
    sides = {leg.side for leg in request.legs}
    if not sides:
        return None
    return Path.SPLIT if len(sides) == 2 else Path.PE if Side.PE in sides else Path.DE
