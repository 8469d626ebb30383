import asyncio

import pytest
from fake_openai import generated

from dualpath.client.replay import ReplayError, append_tokens, replay, warm_up
from dualpath.client.rollout import ReplayOptions
from dualpath.results.turns import TurnFailure, percentiles
from dualpath.traces.trajectory import Round, Trajectory

pytestmark = pytest.mark.slow

FAST = ReplayOptions(seed=7, retry_delay_s=0.01, turn_timeout_s=5)


def agent(name, *rounds, **last):
    return Trajectory(id=name, rounds=tuple(Round(append_tokens=a, generate_tokens=g) for a, g in rounds))


def run(url, trajectories, options=FAST, **kw):
    return asyncio.run(replay(url, trajectories, options, **kw))


def test_a_prompt_is_the_seeded_appends_and_what_the_server_really_generated(fake):
    one = Trajectory(
        id="a",
        rounds=(
            Round(append_tokens=100, generate_tokens=6),
            Round(append_tokens=30, generate_tokens=4),
            Round(append_tokens=20, generate_tokens=1, keep_tokens=70),
        ),
    )
    result = run(fake.url, [one])
    appends = [append_tokens(7, "a", i, round_.append_tokens, 256) for i, round_ in enumerate(one.rounds)]
    first = appends[0]
    second = first + generated(first, 6) + appends[1]
    third = second[:70] + appends[2]
    assert fake.prompts == [first, second, third]
    assert [turn.prompt_tokens for turn in result.turns] == [100, 136, 90]
    assert [turn.generated_tokens for turn in result.turns] == [6, 4, 1]
    assert [turn.loaded_tokens for turn in result.turns] == [0, 64, 64]
    assert result.hit_rate == 128 / 326
    assert not result.failures


def test_two_replays_send_the_same_and_another_seed_something_else(fake):
    agents = [agent(f"a{i}", (70, 3), (10, 3)) for i in range(4)]
    first = run(fake.url, agents)
    sent = sorted(fake.prompts)
    fake.prompts.clear()
    again = run(fake.url, agents)
    assert sorted(fake.prompts) == sent

    def digests(result):
        return sorted((turn.trajectory, turn.round_index, turn.output_digest) for turn in result.turns)

    assert digests(again) == digests(first)
    assert len({turn.output_digest for turn in first.turns}) == 8
    fake.prompts.clear()
    run(fake.url, agents, ReplayOptions(seed=8))
    assert not set(map(tuple, fake.prompts)) & set(map(tuple, sent))


def test_times_are_those_of_the_stream(fake):
    fake.step_s = 0.03
    result = run(fake.url, [agent("a", (10, 4))])
    (turn,) = result.turns
    # Sleeps have a lower bound only: no claim here can fail on a slow machine.
    assert turn.ttft_s >= 0.03 and turn.latency_s >= 0.12
    assert turn.latency_s == pytest.approx(turn.ttft_s + 3 * turn.tpot_s)
    assert 0 < turn.ttst_s <= turn.latency_s - turn.ttft_s
    assert result.jct_s >= turn.start_s + turn.latency_s
    assert result.ttft.p50_s == turn.ttft_s
    single = run(fake.url, [agent("b", (10, 1))]).turns[0]
    assert (single.ttst_s, single.tpot_s) == (None, None)


def test_all_agents_start_at_once(fake):
    fake.step_s = 0.05
    result = run(fake.url, [agent(f"a{i}", (10, 4)) for i in range(6)])
    assert fake.peak_in_flight == 6
    assert len(result.turns) == 6


def test_a_parent_waits_for_its_subagents(fake):
    children = tuple(agent(f"p/{i}", (20 + i, 3), (5, 1)) for i in range(2))
    parent = Trajectory(
        id="p",
        rounds=(
            Round(append_tokens=10, generate_tokens=1, subagents=children),
            Round(append_tokens=10, generate_tokens=1),
        ),
    )
    result = run(fake.url, [parent])
    order = [(turn.trajectory, turn.round_index) for turn in result.turns]
    assert order[0] == ("p", 0) and order[-1] == ("p", 1)
    assert sorted(order[1:-1]) == [("p/0", 0), ("p/0", 1), ("p/1", 0), ("p/1", 1)]


def test_warm_up_runs_the_first_rounds_and_replay_goes_on_from_there(fake):
    agents = [agent(f"a{i}", (130, 4), (10, 2), (10, 2)) for i in range(3)]
    contexts = asyncio.run(warm_up(fake.url, agents, FAST))
    assert {name: len(context) for name, context in contexts.items()} == {"a0": 134, "a1": 134, "a2": 134}
    fake.prompts.clear()
    seen = []
    result = run(fake.url, agents, contexts=contexts, on_turn=seen.append)
    assert sorted(len(prompt) for prompt in fake.prompts) == [144] * 3 + [156] * 3
    assert sorted(turn.round_index for turn in result.turns) == [1, 1, 1, 2, 2, 2]
    assert [turn.loaded_tokens for turn in result.turns] == [128] * 6
    assert seen == list(result.turns)


def test_warm_up_leaves_subagents_of_the_first_round_to_the_replay(fake):
    child = agent("p/0", (20, 1))
    parent = Trajectory(id="p", rounds=(Round(append_tokens=10, generate_tokens=1, subagents=(child,)),))
    contexts = asyncio.run(warm_up(fake.url, [parent], FAST))
    assert len(fake.prompts) == 1
    assert [turn.trajectory for turn in run(fake.url, [parent], contexts=contexts).turns] == ["p/0"]


@pytest.mark.parametrize("fault", [(503, {}), (429, {"Retry-After": "0.01"}), "broken", "dropped"])
def test_an_error_that_may_pass_is_tried_again(fake, fault):
    fake.faults = [fault]
    result = run(fake.url, [agent("a", (10, 3))])
    assert (result.turns[0].tries, result.retries, result.failures) == (2, 1, ())


def test_times_of_a_retried_turn_count_from_its_first_try(fake):
    fake.faults = [(503, {})]
    result = run(fake.url, [agent("a", (10, 1))], ReplayOptions(retry_delay_s=0.2))
    assert result.turns[0].ttft_s >= 0.2


def test_a_server_that_never_recovers_is_reported_once_per_turn(fake):
    fake.faults = [(503, {})] * 3
    seen = []
    result = run(fake.url, [agent("a", (10, 3), (5, 1), (5, 1))], on_turn=seen.append)
    assert result.failures == (
        TurnFailure(trajectory="a", round_index=0, tries=3, message="HTTP 503: fault 503", abandoned_rounds=2),
    )
    assert (result.turns, result.hit_rate, result.ttft, result.retries) == ((), 0.0, None, 2)
    assert seen == list(result.failures)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((400, {}), "HTTP 400: fault 400"),
        ("short", "asked for exactly 3 tokens, the stream's token_ids held 2"),
        ("no_usage", "no usage"),
    ],
)
def test_an_error_that_will_not_pass_ends_the_trajectory_and_not_the_others(fake, fault, message):
    fake.faults = [fault]
    result = run(fake.url, [agent("a", (10, 3), (5, 1)), agent("b", (10, 3), (5, 1))])
    (failure,) = result.failures
    assert (failure.tries, failure.abandoned_rounds) == (1, 1)
    assert message in failure.message
    assert len(result.turns) == 2 and failure.trajectory not in {turn.trajectory for turn in result.turns}


def test_a_server_that_hangs_meets_the_deadline(fake):
    fake.faults = ["hang"]
    result = run(fake.url, [agent("a", (10, 3))], ReplayOptions(retries=0, turn_timeout_s=0.2))
    assert result.failures[0].message == "no complete answer within 0.2 s"


def test_what_can_not_begin_is_refused(fake):
    with pytest.raises(ReplayError, match="does not answer as an OpenAI server"):
        run("http://127.0.0.1:9", [agent("a", (10, 3))])
    with pytest.raises(ReplayError, match="two trajectories are called 'a'"):
        run(fake.url, [agent("a", (10, 3)), agent("a", (11, 3))])
    with pytest.raises(ReplayError, match="no trajectories"):
        run(fake.url, [])
    with pytest.raises(ReplayError, match="no context for 'b'"):
        run(fake.url, [agent("b", (10, 3))], contexts={"a": [1]})
    fake.faults = [(400, {})]
    with pytest.raises(ReplayError, match=r"warm-up: 1 turns failed; a: HTTP 400"):
        asyncio.run(warm_up(fake.url, [agent("a", (10, 3))], FAST))
    with pytest.raises(ValueError, match="token_ids_below"):
        ReplayOptions(token_ids_below=1)


def test_percentiles_interpolate():
    spread = percentiles(range(101))
    assert (spread.mean_s, spread.p50_s, spread.p90_s, spread.p99_s) == (50, 50, 90, 99)
    assert percentiles([]) is None


def test_append_tokens_stay_below_the_bound_and_use_all_of_it():
    tokens = append_tokens(0, "a", 0, 4000, 16)
    assert set(tokens) == set(range(16))
    assert append_tokens(0, "a", 1, 4000, 16) != tokens
