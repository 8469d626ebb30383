"""One combination on a real cluster: bring a request into the phase, do the harm, heal it, and see what is left."""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from dualpath.lab.faults.matrix import Combination, Fault, Phase, Victim
from dualpath.lab.faults.real.asking import Answer, Asked, Load, Prompt, until, verdict
from dualpath.lab.faults.real.harm import BY_SERVER, Scene, Skip, harm, is_of_networks
from dualpath.lab.faults.real.namespaces import Namespaced
from dualpath.lab.faults.real.served import Resources, Served, StartError
from dualpath.lab.faults.real.stages import STAGES, SYSTEMS, reach, stage_of
from dualpath.lab.faults.real.store_server import store_server
from dualpath.lab.testbed import iproute, network
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.object_server import ObjectServer
from dualpath.lab.testbed.plan import Rates, make_plan
from dualpath.spec.topology import Topology

SERVED_AGAIN_S = 30.0
LET_GO_S = 20.0
LANES = 2
TESTBED, SUBNET = "faults", "10.91"
PROBE = Prompt(1024, 40, 8, 0, prefix=1)
"""Its blocks are acknowledged before any fault, and no fault is aimed at them."""
BACKGROUND = [Prompt(0, 150 + 10 * n, 12, -1 - n) for n in range(6)]
MORE_THREADS, MORE_DESCRIPTORS, MORE_MIB = 8, 12, 96
"""What a process may have more than before: pools of threads that grew, connections that stay open for a while."""


class Trial(msgspec.Struct, kw_only=True):
    """What came of a combination. `found` says what was not as it must be."""

    combination: str
    outcome: str
    """``ok``, ``FAILED`` or ``skipped``."""
    found: list[str] = []
    looked_at: str = ""
    others: dict[str, int] = {}
    in_phase: bool = False
    served_again_s: float = -1.0
    """After healing; -1: not in time."""
    before: Resources | None = None
    after: Resources | None = None


class Bench:
    """A checkpoint, a store with known blocks in it, and the right tokens of every prompt."""

    def __init__(self, work: Path, topology: str, hold_s: float, extra: Sequence[str] = ()) -> None:
        self.work = work
        self.topology = topology
        self.hold_s = hold_s
        self.right: dict[Prompt, list[int]] = {}
        self.aimed_at: list[Path] = []
        """Blocks of prefix 0, below the store."""
        self._extra = tuple(extra)
        self._primed = work / "primed"

    def options(self, store: str, at: Combination | None = None) -> list[str]:
        given = ["--model", str(self.work / "model"), "--store", store, "--topology", self.topology]
        given += ["--system", SYSTEMS[at.path], *STAGES[at.phase].options] if at is not None else []
        sizes = [] if "--buffer" in given else ["--buffer", "64MiB"]
        sizes += [] if "--hbm" in given else ["--hbm", "64MiB"]
        return [*given, *sizes, *self._extra]

    def prepare(self, chosen: Sequence[Combination]) -> None:
        """Learn the right tokens from a healthy cluster, in a namespace of their own; store the prefixes. Raises
        StartError."""
        model = [sys.executable, "-m", "dualpath", "checkpoint", str(self.work / "model")]
        subprocess.run(model, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stages = [stage_of(at.phase, number) for number, at in enumerate(chosen)]
        with Served(self.options(str(self._primed)), self.work) as cluster:
            longest = max((stage.look for stage in stages), key=lambda prompt: prompt.hit, default=PROBE)
            for prefix in (longest, *(s.before for s in stages if s.before), PROBE):
                if prefix.hit:
                    self._asked(cluster, prefix.stored)
                if prefix is not PROBE:
                    self.aimed_at = [file.relative_to(self._primed) for file in self._primed.rglob("*.kv")]
            primed = set(self._primed.iterdir())
            for prompt in (PROBE, *BACKGROUND, *(stage.look for stage in stages)):
                self.right[prompt] = self._asked(cluster, prompt, "reference").tokens
        for namespace in set(self._primed.iterdir()) - primed:
            shutil.rmtree(namespace)

    def _asked(self, cluster: Served, prompt: Prompt, salt: str = "") -> Answer:
        answer = Asked(cluster.address, prompt, salt).wait()
        if answer.error:
            raise StartError(f"a healthy cluster answers {prompt} with {answer.error}; {cluster.log} may say why")
        return answer

    @contextmanager
    def scene(self, at: Combination) -> Iterator[Scene]:
        """A cluster for combinations like this one, with a copy of the store. Raises StartError and Skip."""
        with ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.work)))
            store, server = place / "store", None
            if (at.fault, at.victim) == (Fault.FULL, Victim.STORE):
                stack.enter_context(_small_disk(store))
            shutil.copytree(self._primed, store, dirs_exist_ok=True)
            files = [store / file for file in self.aimed_at]
            if is_of_networks(at):
                testbed = self._testbed(stack)
                address = testbed.plan.node("storage").address("storage")
                inside = iproute.inside(testbed.plan.node("storage").namespace)
                served = ObjectServer(store, place / "nginx", address=address, prefix=inside)
                location = stack.enter_context(served).url
                cluster: Served = Namespaced(testbed, self.options(location, at), self.work)
                yield Scene(stack.enter_context(cluster), store, files, testbed=testbed)
                return
            location = str(store)
            if at.victim is Victim.STORE and at.fault in BY_SERVER:
                server = stack.enter_context(store_server(place))
                location = f"{server.url}/store"
            cluster = stack.enter_context(Served(self.options(location, at), self.work))
            yield Scene(cluster, store, files, server)

    def _testbed(self, stack: ExitStack) -> Testbed:
        size = Topology.parse(self.topology)
        try:
            plan = make_plan(TESTBED, size.prefill_nodes, size.decode_nodes, SUBNET)
            testbed = network.up(plan, Rates(), replace=True)
        except TestbedError as error:
            raise Skip(f"no network namespaces here: {error}") from error
        stack.callback(network.down, TESTBED)
        return testbed

    def attempt(self, at: Combination, number: int, scene: Scene) -> Trial:
        """Run the combination. Raises Skip before anything has happened."""
        cluster, trial = scene.cluster, Trial(combination=str(at), outcome="ok")
        may_break = at.victim is Victim.COORDINATOR
        right = {prompt: self.right[prompt] for prompt in BACKGROUND}
        for prompt in (*BACKGROUND, PROBE):
            Asked(cluster.address, prompt).wait()
        until(lambda: not cluster.held(), LET_GO_S)
        trial.before = cluster.resources()
        look, before, trial.in_phase = reach(cluster, stage_of(at.phase, number))  # alone: figures are of all requests
        scene.look = look
        load = Load(cluster.address, right, LANES, may_break)
        try:
            heal = harm(at, scene)
        except Skip:
            look.hang_up()
            load.stop()
            raise
        finally:
            if before is not None and at.phase is Phase.ALLOCATING:
                before.wait()
        if at.fault is not Fault.KILL or at.victim is Victim.STORE:
            time.sleep(self.hold_s)
        heal()
        if before is not None:
            before.hang_up()
        trial.looked_at = verdict(look.wait(), self.right[look.prompt], may_break)
        healed_s = time.monotonic()
        if until(lambda: self._served(cluster), SERVED_AGAIN_S, 0.5):
            trial.served_again_s = round(time.monotonic() - healed_s, 1)
        load.stop()
        trial.others = dict(load.verdicts)
        self._look_back(trial, cluster)
        return trial

    def _served(self, cluster: Served) -> bool:
        healthy = str(cluster.health().get("status")) == "ok"
        return healthy and Asked(cluster.address, PROBE).wait().tokens == self.right[PROBE]

    def _look_back(self, trial: Trial, cluster: Served) -> None:
        """What is wrong, in words, goes to `found`."""
        found = [trial.looked_at] if trial.looked_at.startswith("WRONG") else []
        found += [f"{n} others: {text}" for text, n in trial.others.items() if text.startswith("WRONG")]
        if trial.served_again_s < 0:
            found.append(f"not served again, or not whole, {SERVED_AGAIN_S:.0f} s after it healed")
        elif (cached := Asked(cluster.address, PROBE).wait().cached) < PROBE.hit:
            found.append(f"acknowledged blocks are lost: {cached} of {PROBE.hit} tokens hit")
        if not until(lambda: not cluster.held(), LET_GO_S, 0.5):
            found.append(f"held: {', '.join(cluster.held())}")
        trial.after = cluster.resources()
        found += _grown(trial.before, trial.after)
        if not trial.in_phase:
            found.append("the request had ended before the fault came")
        trial.found = found
        trial.outcome = "FAILED" if found else "ok"


def _grown(before: Resources | None, after: Resources) -> list[str]:
    assert before is not None
    count = max(1, before.processes)
    limits = {
        "processes": 0,
        "threads": MORE_THREADS * count,
        "descriptors": MORE_DESCRIPTORS * count,
        "resident_mib": MORE_MIB * count,
        "shared_memory": 0,
    }
    return [
        f"{name}: {getattr(before, name)} before, {getattr(after, name)} after"
        for name, more in limits.items()
        if getattr(after, name) > getattr(before, name) + more
    ]


@contextmanager
def _small_disk(path: Path) -> Iterator[None]:
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)], capture_output=True)
    if mounted.returncode:
        raise Skip(f"a small disk needs root: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def run(bench: Bench, chosen: Sequence[Combination], on_trial: Callable[[Trial], None]) -> list[Trial]:
    """Run the combinations, each on a cluster of its own. Raises StartError when a healthy cluster can't be had."""
    bench.prepare(chosen)
    trials: list[Trial] = []
    for number, at in enumerate(chosen):
        try:
            with bench.scene(at) as scene:
                trial = bench.attempt(at, number, scene)
        except Skip as reason:
            trial = Trial(combination=str(at), outcome="skipped", found=[str(reason)])
        except (StartError, TestbedError) as error:
            trial = Trial(combination=str(at), outcome="FAILED", found=[str(error)])
        trials.append(trial)
        on_trial(trial)
    return trials
