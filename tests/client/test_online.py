import asyncio

import pytest

from dualpath.client.online import MIN_TURNS, STEADY_WINDOWS, Arrivals, judge, replay_online
from dualpath.client.replay import ReplayError
from dualpath.client.rollout import ReplayOptions
from dualpath.results.online import Slo, Window
from dualpath.traces.trajectory import Round, Trajectory

pytestmark = pytest.mark.slow

SLO = Slo(ttft_s=1.0, tpot_s=0.05)


def window(ttft_s=0.5, tpot_s=0.01, turns=9, failed=0, end_s=10.0):
    return Window(end_s=end_s, ttft_s=ttft_s, tpot_s=tpot_s, turns=turns, late=0, failed=failed)


def verdict(*windows):
    return judge(windows, SLO, 100.0)


def test_a_window_beyond_the_slo_or_with_a_failure_ends_it():
    assert verdict(window(ttft_s=1.01)) == "ttft"
    assert verdict(window(tpot_s=0.051)) == "tpot"
    assert verdict(window(failed=1)) == "errors"
    assert verdict(window(ttft_s=1.0, tpot_s=0.05)) is None


def test_steady_means_as_fast_as_some_windows_before():
    rising = [window(ttft_s=0.1 * n) for n in range(1, STEADY_WINDOWS + 2)]
    assert verdict(*rising) is None
    assert verdict(*[window()] * STEADY_WINDOWS) is None
    assert verdict(window(ttft_s=0.40), *[window()] * (STEADY_WINDOWS - 1), window(ttft_s=0.42)) == "steady"
    assert verdict(window(ttft_s=0.40), *[window()] * (STEADY_WINDOWS - 1), window(ttft_s=0.43)) is None


def test_the_duration_ends_what_is_not_steady_and_windows_without_turns_say_nothing():
    empty = window(ttft_s=None, tpot_s=None, turns=0)
    assert verdict(*[empty] * 9) is None
    assert verdict(*[empty] * 9, window(ttft_s=None, tpot_s=None, turns=0, end_s=100.0)) == "duration"
    assert verdict(window(end_s=99.9)) is None and verdict(window(end_s=100.0)) == "duration"
    assert verdict(window(end_s=100.0, ttft_s=2)) == "ttft"


def test_arrivals_are_seeded_within_the_duration_and_as_many_as_the_rate_says():
    times_s = Arrivals(agents_per_s=50, duration_s=20, window_s=1).times_s()
    assert times_s == Arrivals(agents_per_s=50, duration_s=20, window_s=1).times_s()
    assert times_s != Arrivals(agents_per_s=50, duration_s=20, window_s=1, seed=1).times_s()
    assert 850 < len(times_s) < 1150 and times_s == sorted(times_s) and times_s[0] > 0 and times_s[-1] < 20
    for wrong in ({"agents_per_s": 0}, {"duration_s": 0}, {"window_s": 30}, {"window_s": 0}):
        with pytest.raises(ValueError, match="must be above 0"):
            Arrivals(**{"agents_per_s": 1, "duration_s": 20, "window_s": 1} | wrong)


def agent(number):
    rounds = tuple(Round(append_tokens=20, generate_tokens=3, gap_s=0.05) for _ in range(3))
    return Trajectory(id=f"agent-{number}", rounds=rounds)


def run(url, *, probe=False, slo=SLO, options=None, **arrivals):
    when = Arrivals(**{"agents_per_s": 20, "duration_s": 1.2, "window_s": 0.2} | arrivals)
    options = options or ReplayOptions(seed=1, retries=0, gap_scale=1.0, turn_timeout_s=5)
    return asyncio.run(replay_online(url, agent, options, when, slo, probe=probe)), when


def test_agents_arrive_when_they_are_due_and_a_measurement_lets_turns_end(fake):
    generous = Slo(ttft_s=30, tpot_s=30)
    result, when = run(fake.url, slo=generous)
    times_s = when.times_s()
    assert result.agents == len(times_s) and result.agents_per_s == 20
    first = {turn.trajectory: turn.start_s for turn in result.replay.turns if turn.round_index == 0}
    for number, at_s in enumerate(times_s):
        assert first.get(f"agent-{number}", 1e9) >= at_s + 0.05  # its pause is before its first turn too
    assert result.holds and not result.replay.failures
    assert all(window.turns >= MIN_TURNS for window in result.windows[:-1])
    assert result.windows[-1].end_s == 1.2 and sum(window.turns for window in result.windows) <= len(
        result.replay.turns
    )
    assert len(fake.prompts) == len(result.replay.turns), "a turn that was sent was not waited for"
    assert max(turn.start_s for turn in result.replay.turns) <= 1.2 + 5


def test_a_server_that_does_not_answer_in_time_ends_a_probe_by_ttft(fake):
    fake.faults = ["hang"] * 200
    result, _ = run(fake.url, probe=True, slo=Slo(ttft_s=0.3, tpot_s=1), duration_s=30)
    assert (result.verdict, result.holds) == ("ttft", False)
    assert result.windows[-1].turns == 0 and result.windows[-1].late >= MIN_TURNS and result.windows[-1].ttft_s > 0.3
    assert len(result.windows) < 150, "the probe went on although its answer was known"


def test_slow_tokens_end_it_by_tpot_and_failures_by_errors(fake):
    fake.step_s = 0.05
    assert run(fake.url, probe=True, slo=Slo(ttft_s=30, tpot_s=0.01), duration_s=30)[0].verdict == "tpot"
    fake.faults = [(400, {})] * 500
    result, _ = run(fake.url, probe=True, slo=Slo(ttft_s=30, tpot_s=30), duration_s=30)
    assert (result.verdict, result.holds) == ("errors", False)
    assert result.replay.failures


def test_a_measurement_goes_on_after_the_slo_was_missed_and_keeps_that_verdict(fake):
    fake.step_s = 0.02
    result, _ = run(fake.url, slo=Slo(ttft_s=30, tpot_s=0.001))
    assert result.verdict == "tpot" and result.windows[-1].end_s == 1.2
    assert judge(result.windows[-1:], Slo(ttft_s=30, tpot_s=30), 1.2) == "duration"


def test_what_can_not_begin_is_refused(fake):
    with pytest.raises(ReplayError, match="no agent arrives within"):
        run(fake.url, agents_per_s=1e-6)
    with pytest.raises(ReplayError, match="does not answer as an OpenAI server"):
        run("http://127.0.0.1:9")
