"""Profiles as files: round trips, by hand, wrong ones; and what the lines through their samples say."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_profile import decode_ns, prefill_ns, small_profile, written

from dualpath.cli import main
from dualpath.lab.facts.cluster_files import load_cluster
from dualpath.lab.facts.profile import ProfileError, Rates, applied, load_profile
from dualpath.lab.facts.step_times import DecodeSample, PrefillSample, fit_step_times, pairs

BY_HAND = {
    "version": 1,
    "model": "qwen2.5-32b",
    "prefill": [
        {"cached_tokens": 0, "new_tokens": 2048, "ns": 260e6},
        {"cached_tokens": 30000, "new_tokens": 2048, "ns": 390e6},
    ],
    "decode": [{"batch": 1, "context_tokens": 30000, "ns": 24e6}, {"batch": 32, "context_tokens": 30000, "ns": 80e6}],
}


def test_a_profile_reads_back_as_it_was_written(tmp_path):
    profile = small_profile(rates=Rates(store_read_bytes_per_s=1e9), request_ns=3e6, token_ns=1e5)
    assert load_profile(written(tmp_path, profile)) == profile


def test_a_profile_by_hand_needs_samples_only(tmp_path):
    times = load_profile(written(tmp_path, BY_HAND)).step_times()
    for sample in BY_HAND["prefill"]:
        assert times.prefill_ns(sample["cached_tokens"], sample["new_tokens"]) == pytest.approx(sample["ns"], rel=1e-6)
    assert times.decode_ns(32, 30_000) == pytest.approx(80e6, rel=1e-6)
    assert 24e6 < times.decode_ns(16, 30_000) < 80e6


def test_the_example_in_the_documentation_is_a_profile(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "design" / "profile.md").read_text()
    path = tmp_path / "profile.json"
    path.write_text(text.partition("```json\n")[2].partition("```")[0])
    assert len(load_profile(path).prefill) == 3


def without(field):
    return {name: value for name, value in BY_HAND.items() if name != field}


def with_sample(kind, **changed):
    return BY_HAND | {kind: [BY_HAND[kind][0] | changed]}


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (without("model"), "missing required field `model`"),
        (without("decode"), "missing required field `decode`"),
        (BY_HAND | {"version": 2}, "version"),
        (BY_HAND | {"prefill": []}, "prefill"),
        (with_sample("prefill", ns=-1), "$.prefill[0].ns"),
        (with_sample("prefill", new_tokens=0), "$.prefill[0].new_tokens"),
        (with_sample("decode", batch=-3), "$.decode[0].batch"),
        (with_sample("decode", nanoseconds=5), "nanoseconds"),
        (BY_HAND | {"rates": {"store_read_bytes_per_s": 0}}, "$.rates.store_read_bytes_per_s"),
        (BY_HAND | {"request_ns": -1}, "$.request_ns"),
    ],
)
def test_a_wrong_profile_is_one_clear_line(tmp_path, capsys, document, said):
    path = written(tmp_path, document)
    for command in ("plan", "simulate"):
        assert main([command, "qwen32b-1p2d", "--profile", str(path)]) == 2
        line = capsys.readouterr().err
        assert str(path) in line and said in line and line.count("\n") == 1


@pytest.mark.parametrize("text", ["NaN", "1e999", "-Infinity"])
def test_numbers_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(BY_HAND).replace("260000000.0", text))
    with pytest.raises(ProfileError, match=r"profile\.json"):
        load_profile(path)


def test_a_file_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(ProfileError, match="dualpath profile"):
        load_profile(tmp_path / "nothing.json")


def test_another_models_profile_is_refused(tmp_path):
    profile = load_profile(written(tmp_path, BY_HAND))
    cluster = load_cluster("qwen32b-1p2d")
    with pytest.raises(ProfileError, match=r"'deepseek-v3\.2'"):
        applied(cluster, msgspec.structs.replace(profile, model="deepseek-v3.2"), "p.json")
    with pytest.raises(ProfileError, match="7 bytes of KV"):
        applied(cluster, msgspec.structs.replace(profile, kv_bytes_per_token=7), "p.json")


def test_another_model_on_the_cluster_loses_the_profile(tmp_path):
    measured = applied(load_cluster("qwen32b-1p2d"), load_profile(written(tmp_path, BY_HAND)), "")
    assert measured.measured is not None and measured.with_model("deepseek-v3.2").measured is None


def test_a_link_is_as_fast_as_the_slower_of_cluster_and_profile(tmp_path):
    profile, cluster = load_profile(written(tmp_path, BY_HAND)), load_cluster("qwen32b-1p2d")
    for rate, usable in ((1e9, 1e9), (1e15, cluster.snic_bytes_per_s)):
        rates = Rates(store_read_bytes_per_s=rate)
        assert applied(cluster, msgspec.structs.replace(profile, rates=rates), "").usable_snic_bytes_per_s == usable
    assert applied(cluster, profile, "").usable_snic_bytes_per_s == cluster.usable_snic_bytes_per_s
    mixed = msgspec.structs.replace(cluster, snic_bytes_per_s=(2e9, 0.5e9))
    rates = Rates(store_read_bytes_per_s=1e9)
    assert applied(mixed, msgspec.structs.replace(profile, rates=rates), "").snic_bytes_per_s == (1e9, 0.5e9)


def test_the_lines_are_exact_where_steps_are_linear():
    times = small_profile().step_times()
    assert times.prefill_fit.max_error < 1e-6 and times.decode_fit.max_error < 1e-6
    for shape in ((0, 16, 1), (4000, 256, 4), (2000, 100, 2), (8000, 512, 1)):  # samples, between and beyond
        assert times.prefill_ns(*shape) == pytest.approx(prefill_ns(*shape), rel=1e-6)
    for shape in ((1, 100), (16, 4000), (8, 2500), (32, 8000)):
        assert times.decode_ns(*shape) == pytest.approx(decode_ns(*shape), rel=1e-6)


counts = st.integers(1, 5000)
measured = st.floats(1e3, 1e12)


@given(st.lists(st.tuples(st.integers(0, 5000), counts, st.integers(1, 8), measured), min_size=1, max_size=8),
       st.lists(st.tuples(st.integers(1, 64), counts, measured), min_size=1, max_size=8))  # fmt: skip
def test_more_work_never_takes_less_whatever_was_measured(prefill, decode):
    times = fit_step_times(
        [PrefillSample(cached_tokens=c, new_tokens=n, items=i, ns=ns) for c, n, i, ns in prefill],
        [DecodeSample(batch=b, context_tokens=c, ns=ns) for b, c, ns in decode],
    )
    base = times.prefill_ns(1000, 100, 2)
    assert times.prefill_ns(1001, 100, 2) >= base
    assert times.prefill_ns(1000, 101, 2) >= base
    assert times.prefill_ns(1000, 100, 3) >= base
    assert times.decode_ns(4, 1001) >= times.decode_ns(4, 1000) <= times.decode_ns(5, 1000)


def test_a_fit_says_how_far_off_it_is():
    """Two samples of one shape, one twice the other: no line is on both."""
    one, two = (PrefillSample(cached_tokens=0, new_tokens=64, ns=ns) for ns in (1e6, 2e6))
    times = fit_step_times([one, two], [DecodeSample(batch=1, context_tokens=10, ns=1e6)])
    assert times.prefill_fit.samples == 2
    assert 0.2 < times.prefill_fit.max_error < 0.5
    assert 1e6 < times.prefill_ns(0, 64) < 2e6


def test_what_samples_can_not_tell_apart_goes_to_one_coefficient():
    prefill = [PrefillSample(cached_tokens=0, new_tokens=100, ns=1e7)]
    decode = [DecodeSample(batch=batch, context_tokens=1000, ns=1e7 + batch * 1e6) for batch in (1, 8)]
    times = fit_step_times(prefill, decode)
    assert times.prefill_ns(0, 200) == pytest.approx(2e7)
    assert times.decode_ns(4, 2000) == pytest.approx(1e7 + 4 * 2e6)
    lone = [PrefillSample(cached_tokens=0, new_tokens=n, ns=1e7 + n * 1e4) for n in (100, 500)]
    assert fit_step_times(lone, decode).prefill_ns(0, 100, items=5) == pytest.approx(1e7 + 5 * 100 * 1e4)


def test_pairs_are_those_a_new_token_sees():
    assert pairs(cached_tokens=2, new_tokens=3) == 3 + 4 + 5
