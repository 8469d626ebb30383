"""What is asked of each kind of server, and what stands for generated tokens where it does not return them."""

import asyncio

import pytest
from fake_openai import TIMINGS, generated

from dualpath.client.replay import ReplayError, replay
from dualpath.client.rollout import ReplayOptions
from dualpath.client.token_ids import append_tokens, fill_tokens
from dualpath.traces.trajectory import Round, Trajectory

pytestmark = pytest.mark.slow

ONE = Trajectory(
    id="a", rounds=(Round(append_tokens=70, generate_tokens=5), Round(append_tokens=10, generate_tokens=2))
)
PLAIN = {"model", "prompt", "max_tokens", "min_tokens", "ignore_eos", "temperature", "stream", "stream_options"}


def run(url, **options):
    return asyncio.run(replay(url, [ONE], ReplayOptions(seed=3, retries=0, **options)))


@pytest.mark.parametrize(
    ("owner", "kind", "further"),
    [
        ("dualpath", "dualpath", {"return_token_ids", "return_timings"}),
        ("vllm", "vllm", {"return_token_ids"}),
    ],
)
def test_a_server_is_asked_for_what_its_kind_is_known_to_have(fake, owner, kind, further):
    fake.owned_by = owner
    result = run(fake.url)
    assert not result.failures
    assert (result.server, result.model, result.context) == (kind, "fake", "own")
    assert [set(body) for body in fake.bodies] == [PLAIN | further] * 2


@pytest.mark.parametrize(("owner", "kind"), [("sglang", "sglang"), ("llamacpp", "other")])
@pytest.mark.parametrize(
    ("knows", "strict", "context"), [(True, False, "own"), (False, False, "filled"), (True, True, "filled")]
)
def test_other_kinds_are_asked_for_one_token_to_see(fake, owner, kind, knows, strict, context):
    fake.owned_by, fake.knows_token_ids, fake.strict = owner, knows, strict
    result = run(fake.url)
    assert not result.failures
    assert (result.server, result.context) == (kind, context)
    asked = [set(body) for body in fake.bodies]
    probes = [] if strict else [PLAIN | {"return_token_ids"}]
    assert asked == probes + [PLAIN | ({"return_token_ids"} if context == "own" else set())] * 2
    assert len(result.turns) == 2, "the probe is no turn"


def test_the_kind_may_be_given(fake):
    assert run(fake.url, server="vllm").turns[0].timings is None
    assert "return_timings" not in fake.bodies[0]


def test_a_server_that_is_ill_when_asked_is_not_taken_for_one_without_ids(fake):
    fake.owned_by, fake.faults = "sglang", [(503, {})]
    with pytest.raises(ReplayError, match="HTTP 503"):
        run(fake.url)


def test_own_contexts_hold_what_was_generated(fake):
    run(fake.url)
    first = append_tokens(3, "a", 0, 70, 256)
    assert fake.prompts == [first, first + generated(first, 5) + append_tokens(3, "a", 1, 10, 256)]


def test_filled_contexts_have_the_same_length_and_are_the_same_every_time(fake):
    fake.owned_by, fake.knows_token_ids = "sglang", False
    result = run(fake.url)
    del fake.prompts[0]  # the one that asked
    first, fill = append_tokens(3, "a", 0, 70, 256), fill_tokens(3, "a", 0, 5, 256)
    assert fake.prompts == [first, first + fill + append_tokens(3, "a", 1, 10, 256)]
    assert len(fill) == 5 and fill != generated(first, 5)
    assert [turn.generated_tokens for turn in result.turns] == [5, 2]
    assert [turn.output_digest for turn in result.turns] == ["", ""]
    assert result.turns[0].tpot_s is not None


def test_timings_of_our_own_server_are_kept(fake):
    (first, _) = run(fake.url).turns
    assert {name: getattr(first.timings, name) for name in TIMINGS} == TIMINGS


def test_timings_of_another_shape_are_refused_where_they_were_asked_for_only(fake):
    fake.faults = ["strange_timings"]
    assert "timings have an unknown form" in run(fake.url).failures[0].message
    fake.owned_by, fake.faults = "vllm", ["strange_timings"]
    assert not run(fake.url).failures


def test_what_our_own_server_says_of_its_cluster_is_kept_and_what_others_say_is_not(fake):
    assert run(fake.url).cluster is None
    setup = {
        "layers": 8, "kv_bytes_per_token": 16_384, "snic_bytes_per_s": None, "cnic_bytes_per_s": 10**9,
        "compute_quota_s": 0.3, "threads": 1, "cores": 2, "dtype": "float32", "transport": "shm",
    }  # fmt: skip
    fake.cluster = {"topology": "1P2D", "system": "basic", "setup": setup}
    told = run(fake.url).cluster
    assert (told.topology, told.system, told.setup.cnic_bytes_per_s) == ("1P2D", "basic", 10**9)
    fake.cluster = "europe-west"
    assert run(fake.url).cluster is None


def test_a_server_that_does_not_say_what_it_loaded_is_told_from_one_that_loaded_nothing(fake):
    assert run(fake.url).reports_loaded
    fake.faults = ["no_details"] * 2
    result = run(fake.url)
    assert not result.reports_loaded and result.hit_rate == 0


def test_a_key_is_sent(fake):
    run(fake.url, api_key="secret")
    assert fake.headers[0]["authorization"] == "Bearer secret"


def test_a_length_that_is_not_kept_is_an_error_without_ids_too(fake):
    fake.owned_by, fake.strict, fake.lie = "sglang", True, 3
    assert "asked for exactly 5 tokens, got 3" in run(fake.url).failures[0].message


def test_a_url_that_is_none_is_refused():
    with pytest.raises(ReplayError, match="not a server's URL"):
        run("localhost:8000")


@pytest.mark.parametrize(
    ("fault", "message"), [("garbage", "not an OpenAI event: b'data: {nope'"), ("page", "HTTP 502: <html>Bad Gateway")]
)
def test_what_is_no_openai_answer_is_said_with_its_text(fake, fault, message):
    fake.faults = [fault]
    assert message in run(fake.url).failures[0].message


def test_a_server_that_lists_no_model_or_refuses_to_is_named(fake):
    fake.models = 0
    with pytest.raises(ReplayError, match=rf"{fake.url}: /v1/models lists no model"):
        run(fake.url)
    fake.models_status = 401
    with pytest.raises(ReplayError, match=r"does not answer as an OpenAI server's: HTTP 401"):
        run(fake.url)
