"""One combination on a real cluster: bring a request into the phase, do the harm, heal it, and see what is left.

Combinations that need the same options and place follow each other on one cluster for as long as it is none the worse.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import msgspec

from dualpath.lab.faults.matrix import PARTITIONS, Combination, Fault, Phase, Victim
from dualpath.lab.faults.real.asking import WAITS, Answer, Asked, Load, Prompt, Turn, until, verdict
from dualpath.lab.faults.real.harm import Place, Scene, Skip, harm, place_of, small_disk
from dualpath.lab.faults.real.namespaces import Namespaced
from dualpath.lab.faults.real.served import Resources, Served, StartError
from dualpath.lab.faults.real.stages import STAGES, SYSTEMS, Stage, reach, stage_of
from dualpath.lab.faults.real.store_server import store_server
from dualpath.lab.testbed import iproute, network
from dualpath.lab.testbed.failure import TestbedError
from dualpath.lab.testbed.network import Testbed
from dualpath.lab.testbed.object_server import ObjectServer
from dualpath.lab.testbed.plan import Rates, make_plan
from dualpath.spec.cluster_setup import ENGINES
from dualpath.spec.topology import Topology

LET_GO_S = 20.0
CROWDED = (Phase.QUEUED, Phase.ALLOCATING)
"""There is no room at any engine, and nobody is served around anything."""
MISSED_S = 8.0
"""An engine's lease of 5 s, a beat, and what TCP still brings one way before it gives up."""
LANES = 2
TURNS = 8
OWN_FILES = ("folder", "disk")
"""Where a fault of the store is one of its files."""
TESTBED, SUBNET = "faults", "10.91"
MODEL = """\
import sys
from dualpath.model.checkpoint import make_checkpoint
make_checkpoint(sys.argv[1], "qwen3", num_attention_heads=2, num_key_value_heads=1, head_dim=32)
"""
"""A tiny model whose heads are large enough for vLLM's attention on a CPU."""
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
    noticed_s: float = -1.0
    """Until `/health` said something else than ok; -1: never."""
    served_again_s: float = -1.0
    """After healing; -1: not in time."""
    before: Resources | None = None
    after: Resources | None = None


class Needs(NamedTuple):
    """What makes a combination need another cluster than the one before."""

    place: Place
    options: tuple[str, ...]


def needs_of(at: Combination) -> Needs:
    return Needs(place_of(at), ("--system", SYSTEMS[at.path], *STAGES[at.phase].options))


class Bench:
    """A checkpoint, a store with known blocks in it, and the right tokens of every prompt."""

    def __init__(
        self, work: Path, topology: str, hold_s: float, extra: Sequence[str] = (), engine: str = ENGINES[0]
    ) -> None:
        self.work = work
        self._engine = () if engine == ENGINES[0] else ("--engine", engine)
        if engine == "vllm":
            WAITS.for_vllm()
        self.size = Topology.parse(topology)
        self.hold_s = hold_s
        self.right: dict[Prompt, list[int]] = {}
        self.chats: list[list[Prompt]] = []
        self.aimed_at: list[Path] = []
        """Blocks of prefix 0, below the store."""
        self._extra = tuple(extra)
        self._primed = work / "primed"

    def options(self, store: str, more: Sequence[str] = ()) -> list[str]:
        given = ["--model", str(self.work / "model"), "--store", store, "--topology", str(self.size), *more]
        sizes = [] if "--buffer" in given else ["--buffer", "64MiB"]
        sizes += [] if "--hbm" in given else ["--hbm", "64MiB"]
        return [*given, *sizes, *self._engine, *self._extra]

    def prepare(self, stages: Sequence[Stage], chats: int = 0) -> None:
        """Learn the right tokens from a healthy cluster, in a namespace of their own; store the prefixes. Raises
        StartError."""
        model = [sys.executable, "-c", MODEL, str(self.work / "model")]
        subprocess.run(model, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with Served(self.options(str(self._primed)), self.work) as cluster:
            longest = max((stage.look for stage in stages), key=lambda prompt: prompt.hit, default=PROBE)
            for prefix in (longest, *(s.before for s in stages if s.before), PROBE):
                if prefix.hit:
                    self._asked(cluster, prefix.stored)
                if prefix is not PROBE:
                    self.aimed_at = [file.relative_to(self._primed) for file in self._primed.rglob("*.kv")]
            primed = set(self._primed.iterdir())
            for prompt in {PROBE, *BACKGROUND, *(stage.look for stage in stages)}:
                self._learn(cluster, prompt)
            self.chats = [self._chat(cluster, 1_000 * (number + 1)) for number in range(chats)]
        for namespace in set(self._primed.iterdir()) - primed:
            shutil.rmtree(namespace)

    def _chat(self, cluster: Served, seed: int) -> list[Prompt]:
        """Returns turns, each of which has those before it, with their answers, at its beginning."""
        turns = [Prompt(0, 600, 12, seed)]
        while len(turns) < TURNS:
            said = self._learn(cluster, turns[-1])
            turns.append(Prompt(0, 150, 12, seed + len(turns), before=(*turns[-1].tokens, *said)))
        self._learn(cluster, turns[-1])
        return turns

    def _learn(self, cluster: Served, prompt: Prompt) -> list[int]:
        self.right[prompt] = self._asked(cluster, prompt, "reference").tokens
        return self.right[prompt]

    def _asked(self, cluster: Served, prompt: Prompt, salt: str = "") -> Answer:
        answer = Asked(cluster.address, prompt, salt).wait()
        if answer.error:
            raise StartError(f"a healthy cluster answers {prompt} with {answer.error}; {cluster.log} may say why")
        return answer

    @contextmanager
    def scene(self, needs: Needs) -> Iterator[Scene]:
        """A cluster with a copy of the store. Raises StartError, TestbedError and Skip."""
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.work)))
            store, server, testbed = work / "store", None, None
            if needs.place == "disk":
                stack.enter_context(small_disk(store))
            shutil.copytree(self._primed, store, dirs_exist_ok=True)
            cluster = Served(self.options(str(store), needs.options), self.work)
            if needs.place == "namespaces":
                testbed = self._testbed(stack)
                storage = testbed.plan.node("storage")
                inside = iproute.inside(storage.namespace)
                nginx = ObjectServer(store, work / "nginx", address=storage.address("storage"), prefix=inside)
                options = self.options(stack.enter_context(nginx).url, needs.options)
                cluster = Namespaced(testbed, options, self.work)
            elif needs.place == "server":
                server = stack.enter_context(store_server(work))
                cluster = Served(self.options(f"{server.url}/store", needs.options), self.work)
            stack.enter_context(cluster)
            for prompt in (*BACKGROUND, PROBE):
                Asked(cluster.address, prompt).wait()
            until(lambda: not cluster.held(), LET_GO_S)
            scene = Scene(cluster, store, [store / file for file in self.aimed_at], server, testbed)
            scene.before = cluster.resources()
            yield scene

    def _testbed(self, stack: ExitStack) -> Testbed:
        try:
            plan = make_plan(TESTBED, self.size.prefill_nodes, self.size.decode_nodes, SUBNET)
            testbed = network.up(plan, Rates(), replace=True)
        except TestbedError as error:
            raise Skip(f"no network namespaces here: {error}") from error
        stack.callback(network.down, TESTBED)
        return testbed

    def attempt(self, at: Combination, number: int, scene: Scene) -> Trial:
        """Run the combination. Raises Skip before anything has happened."""
        cluster, trial = scene.cluster, Trial(combination=str(at), outcome="ok")
        may_break = at.victim is Victim.COORDINATOR
        trial.before = scene.before
        look, before, trial.in_phase = reach(cluster, stage_of(at.phase, number), self.size)  # alone
        scene.look = look
        lanes = [cycle([Turn(prompt) for prompt in BACKGROUND[lane:]]) for lane in range(LANES)]
        load = Load(cluster.address, self.right, lanes, may_break)
        try:
            heal = harm(at, scene)
        except Skip:
            look.hang_up()
            load.stop()
            raise
        finally:
            for other in before if at.phase is Phase.ALLOCATING else ():
                other.wait()
        if at.fault is not Fault.KILL or at.victim is Victim.STORE:
            self._hold(at, cluster, trial)
        heal()
        for other in before:
            other.hang_up()
        trial.looked_at = verdict(look.wait(), self.right[look.prompt], may_break)
        healed_s = time.monotonic()
        if until(lambda: self.is_served(cluster), WAITS.served_again_s, 0.5):
            trial.served_again_s = round(time.monotonic() - healed_s, 1)
        load.stop()
        trial.others = dict(load.verdicts)
        self._look_back(trial, cluster, scene.before)
        return trial

    def _hold(self, at: Combination, cluster: Served, trial: Trial) -> None:
        """Keep it up for a while. A node that is cut off must be missed when its lease is over, and served around."""
        began_s = time.monotonic()
        if until(lambda: not cluster.is_ok, self.hold_s):
            trial.noticed_s = round(time.monotonic() - began_s, 1)
        time.sleep(max(0.0, began_s + self.hold_s - time.monotonic()))
        if at.fault not in PARTITIONS or at.victim not in (Victim.PE, Victim.DE):
            return
        if not 0 <= trial.noticed_s < MISSED_S:
            trial.found.append(f"{MISSED_S:g} s after it was cut off nobody had noticed")
        nodes = {Victim.PE: self.size.prefill_nodes, Victim.DE: self.size.decode_nodes}[at.victim]
        if nodes > 1 and at.phase not in CROWDED and (error := Asked(cluster.address, PROBE).wait().error):
            trial.found.append(f"not served around: {error}")

    def is_served(self, cluster: Served) -> bool:
        return cluster.is_ok and Asked(cluster.address, PROBE).wait().tokens == self.right[PROBE]

    def _look_back(self, trial: Trial, cluster: Served, before: Resources) -> None:
        """What is wrong, in words, goes to `found`."""
        found = trial.found
        found += [trial.looked_at] if trial.looked_at.startswith("WRONG") else []
        found += [f"{n} others: {text}" for text, n in trial.others.items() if text.startswith("WRONG")]
        if trial.served_again_s < 0:
            found.append(f"not served again, or not whole, {WAITS.served_again_s:.0f} s after it healed")
        elif (cached := Asked(cluster.address, PROBE).wait().cached) < PROBE.hit:
            found.append(f"acknowledged blocks are lost: {cached} of {PROBE.hit} tokens hit")
        if not until(lambda: not cluster.held(), LET_GO_S, 0.5):
            found.append(f"held: {', '.join(cluster.held())}")
        trial.after = cluster.resources()
        found += _grown(before, trial.after)
        if not trial.in_phase:
            found.append("the request had ended before the fault came")
        trial.outcome = "FAILED" if found else "ok"


def _grown(before: Resources, after: Resources) -> list[str]:
    count = max(1, before.processes)
    limits = {
        "processes": 0,
        "threads": MORE_THREADS * count,
        "descriptors": MORE_DESCRIPTORS * count,
        "resident_mib": MORE_MIB * count,
        "shared_memory": 0,
        "temporary_files": 0,
    }
    return [
        f"{name}: {getattr(before, name)} before, {getattr(after, name)} after"
        for name, more in limits.items()
        if getattr(after, name) > getattr(before, name) + more
    ]


def run(bench: Bench, chosen: Sequence[Combination], on_trial: Callable[[Trial], None]) -> list[Trial]:
    """Run the combinations, those of one kind of cluster after each other. Raises StartError when a healthy cluster
    can't be had."""
    groups: dict[Needs, list[Combination]] = {}
    for at in chosen:
        groups.setdefault(needs_of(at), []).append(at)
    bench.prepare([stage_of(at.phase, number) for cells in groups.values() for number, at in enumerate(cells)])
    trials: list[Trial] = []
    for needs, cells in groups.items():
        left = list(enumerate(cells))[::-1]
        while left:
            with closing(_on_one_cluster(bench, needs, left)) as found:
                for trial in found:
                    trials.append(trial)
                    on_trial(trial)
    return trials


def _on_one_cluster(bench: Bench, needs: Needs, left: list[tuple[int, Combination]]) -> Generator[Trial]:
    """Take combinations from the end of `left` for as long as the cluster, and its store, are none the worse."""
    number, at = left.pop()
    try:
        with bench.scene(needs) as scene:
            yield (trial := bench.attempt(at, number, scene))
            while left and trial.outcome == "ok" and not (at.victim is Victim.STORE and needs.place in OWN_FILES):
                number, at = left.pop()
                yield (trial := bench.attempt(at, number, scene))
    except Skip as reason:
        yield Trial(combination=str(at), outcome="skipped", found=[str(reason)])
    except (StartError, TestbedError) as error:
        yield Trial(combination=str(at), outcome="FAILED", found=[str(error)])
