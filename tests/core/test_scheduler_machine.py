"""The scheduler against a model of its cluster, step by random step: audited after each, drained at the end."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from model_cluster import ModelCluster

from dualpath.core.audit import audit
from dualpath.core.journal import replay
from dualpath.core.policy import Constants, Limits
from dualpath.core.systems import SYSTEMS, find_system
from dualpath.core.vocabulary import Cause, Role, Side

INTERVAL_NS = 5_000
SECOND_NS = 1_000_000
"""A second of this model: small numbers are quicker to draw."""

index = st.integers(0, 255)


class SchedulerMachine(RuleBasedStateMachine):
    """Rules are what can happen to a driver; `steps` counts them over all examples."""

    steps = 0
    outcomes: dict[str, int] = {}  # noqa: RUF012 (shared on purpose: it counts over all examples)

    @initialize(system=st.sampled_from(sorted(SYSTEMS.names())), tight=st.booleans())
    def start(self, system: str, tight: bool) -> None:
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
        )
        self.cluster = ModelCluster(find_system(system).policy, constants, limits)
        for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE):
            self.cluster.join(role, 24, 40)

    @rule(blocks=st.integers(0, 26), tail=st.integers(1, 64), hit=st.integers(0, 14))
    def submit(self, blocks: int, tail: int, hit: int) -> None:
        self.cluster.submit(64 * blocks + tail, hit, max_new_tokens=1 + 8 * tail)

    @rule(which=index)
    @precondition(lambda self: self.cluster.jobs)
    def deliver(self, which: int) -> None:
        self.cluster.deliver(which % len(self.cluster.jobs))

    @rule(which=index)
    @precondition(lambda self: self.cluster.jobs)
    def deliver_more(self, which: int) -> None:
        """Twice as likely as any other rule: most of the time, things work."""
        self.cluster.deliver(which % len(self.cluster.jobs))

    @rule(which=index)
    @precondition(lambda self: self.cluster.jobs)
    def fail(self, which: int) -> None:
        self.cluster.deliver(which % len(self.cluster.jobs), success=which % 3 != 0)

    @rule(which=index)
    @precondition(lambda self: self.cluster.said)
    def repeat(self, which: int) -> None:
        """A message again; a piece of buffer only for an attempt that is over, as the channel promises."""
        cluster = self.cluster
        name, arguments = cluster.said[which % len(cluster.said)]
        if name == "buffer_freed" and cluster.requests[arguments[0]].outcome is None:  # type: ignore[index]
            return
        getattr(cluster.core, name)(cluster.now, *arguments)
        cluster.carry_out()

    @rule(which=index, what=st.integers(0, 9))
    def nonsense(self, which: int, what: int) -> None:
        """Words about attempts, sides and engines that do not exist, or are not where the speaker thinks."""
        cluster, now, key = self.cluster, self.cluster.now, (which % 16, which // 16 + 3)
        said = [
            lambda core: core.prepared(now, *key),
            lambda core: core.loaded(now, *key, Side.PE),
            lambda core: core.load_failed(now, *key, Side.DE),
            lambda core: core.prefill_done(now, *key),
            lambda core: core.buffer_freed(now, *key, 10_000),
            lambda core: core.finished(now, *key),
            lambda core: core.attempt_failed(now, *key, which, Cause.TIMEOUT),
            lambda core: core.released(now, *key, which),
            lambda core: core.engine_lost(now, 1_000 + which),
            lambda core: core.engine_draining(now, 1_000 + which, True),
        ]
        said[what](cluster.core)
        assert cluster.core.take_commands() == []

    @rule(which=index)
    @precondition(lambda self: self.cluster.requests)
    def cancel(self, which: int) -> None:
        self.cluster.cancel(which % len(self.cluster.requests))

    @rule(which=index)
    @precondition(lambda self: self.cluster.engines)
    def lose(self, which: int) -> None:
        if which % 4 == 0:
            engines = sorted(self.cluster.engines)
            self.cluster.lose(engines[which // 4 % len(engines)])

    @rule(which=index, draining=st.booleans())
    @precondition(lambda self: self.cluster.engines)
    def drain(self, which: int, draining: bool) -> None:
        cluster, engines = self.cluster, sorted(self.cluster.engines)
        cluster.core.engine_draining(cluster.now, engines[which % len(engines)], draining)
        cluster.carry_out()

    @rule(kind=st.integers(0, 7))
    @precondition(lambda self: len(self.cluster.engines) < 7)
    def join(self, kind: int) -> None:
        role = Role.PREFILL if kind % 2 else Role.DECODE
        self.cluster.join(role, 8 + 4 * kind, 24 + 4 * kind, neighbour=kind >= 4)

    @rule(ticks=st.integers(0, 12))
    def pass_time(self, ticks: int) -> None:
        """Mostly a few fetch intervals, sometimes longer than a state may last."""
        self.cluster.pass_time(ticks * INTERVAL_NS if ticks < 12 else SECOND_NS // 2)

    @rule()
    def wake_when_due(self) -> None:
        wake_ns = self.cluster.core.next_wake()
        if wake_ns is not None:
            self.cluster.pass_time(max(0, wake_ns - self.cluster.now))

    @invariant()
    def audited(self) -> None:
        type(self).steps += 1
        audit(self.cluster.core.life)

    def teardown(self) -> None:
        cluster = getattr(self, "cluster", None)
        if cluster is None:
            return
        for role in (Role.PREFILL, Role.DECODE):
            cluster.join(role, 24, 40)
        cluster.drain()
        audit(cluster.core.life)
        assert cluster.core.held() == ()
        assert cluster.core.statistics()["overdue_releases"] == 0
        assert all(not engine.buffer and not engine.hbm for engine in cluster.engines.values())
        self._check_counts(cluster)
        report = replay(cluster.journal)
        assert report.difference is None and report.entries == len(cluster.journal) - 1

    def _check_counts(self, cluster: ModelCluster) -> None:
        counts = cluster.core.statistics()
        ended = sum(n for name, n in counts.items() if name in ("finished", "cancelled") or name.startswith("failed_"))
        assert ended == counts.get("submitted", 0) == len(cluster.requests)
        for name, n in counts.items():
            type(self).outcomes[name] = type(self).outcomes.get(name, 0) + n


def run(examples: int, steps_each: int, seeded: int = 0) -> int:
    """Run the machine; the number of steps really taken."""
    SchedulerMachine.steps = 0
    SchedulerMachine.outcomes = {}
    run_state_machine_as_test(
        seed(seeded)(SchedulerMachine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps_each,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"\n{SchedulerMachine.steps} audited steps; {dict(sorted(SchedulerMachine.outcomes.items()))}")
    return SchedulerMachine.steps


def test_a_few_thousand_random_steps() -> None:
    assert run(examples=60, steps_each=50) > 1_500


@pytest.mark.slow
@pytest.mark.parametrize("seeded", range(1, 5))
def test_two_hundred_thousand_random_steps(seeded: int) -> None:
    """In four parts, which run side by side."""
    assert run(examples=280, steps_each=250, seeded=seeded) >= 50_000
    happened = SchedulerMachine.outcomes
    for name in (
        "finished",
        "cancelled",
        "failed_timeout",
        "failed_no_engine",
        "failed_too_large",
        "failed_overloaded",
    ):
        assert happened.get(name, 0) > 25, f"{name} hardly ever happened, so the steps prove little: {happened}"
