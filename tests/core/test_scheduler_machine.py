"""The scheduler against a model of its cluster, step by random step: audited after each, drained at the end.

The steps are the fault laboratory's (`lab/faults/sim`); here Hypothesis draws and shrinks them, and a journal is kept.
"""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from dualpath.core.journal import JournaledScheduler, replay
from dualpath.core.scheduler import Scheduler
from dualpath.lab.faults.sim import episodes
from dualpath.lab.faults.sim.world import CLUSTERS, DRAWN, NAMES, Setting, Step, World


class SchedulerMachine(RuleBasedStateMachine):
    """Steps are what can happen to a driver; `steps` counts them over all examples."""

    steps = 0
    outcomes: dict[str, int] = {}  # noqa: RUF012 (shared on purpose: it counts over all examples)

    @initialize(system=st.sampled_from(CLUSTERS), tight=st.booleans(), staging=st.booleans())
    def start(self, system: str, tight: bool, staging: bool) -> None:
        self.journal: list[bytes] = []

        def journaled(*arguments: object) -> JournaledScheduler:
            return JournaledScheduler(Scheduler(*arguments), self.journal.append)  # type: ignore[arg-type]

        self.world = World(Setting(system=system, tight=tight, staging=staging), journaled)

    @rule(
        name=st.sampled_from([*DRAWN, *NAMES, *NAMES]),
        a=st.integers(0, 255),
        b=st.integers(0, 63),
        c=st.integers(0, 15),
    )
    def take(self, name: str, a: int, b: int, c: int) -> None:
        self.world.take(Step(name, a, b, c))

    @invariant()
    def audited(self) -> None:
        type(self).steps += 1
        self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        for name, n in self.world.end().items():
            type(self).outcomes[name] = type(self).outcomes.get(name, 0) + n
        report = replay(self.journal)
        assert report.difference is None and report.entries == len(self.journal) - 1


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


def test_ten_thousand_seeded_steps() -> None:
    """Longer lives than Hypothesis draws."""
    assert episodes.run(10_000, seed=2).failure is None


@pytest.mark.slow
def test_fifty_thousand_random_steps() -> None:
    """`tests/lab/faults` takes more, drawn and shrunk by the laboratory itself."""
    # What a seed draws also depends on the modules that are loaded, so a seed with a margin: seed 1 came to 9 of one.
    assert run(examples=280, steps_each=250, seeded=2) >= 50_000
    happened = SchedulerMachine.outcomes
    for name in (
        "finished",
        "cancelled",
        "retried_timeout",
        "failed_no_engine",
        "failed_too_large",
        "failed_overloaded",
    ):
        assert happened.get(name, 0) > 10, f"{name} hardly ever happened, so the steps prove little: {happened}"
