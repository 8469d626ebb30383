"""`dualpath profile` on a tiny model: it measures what it says, and what it writes can be used."""

import msgspec
import pytest
from small_profile import small_result

from dualpath.cli import main
from dualpath.lab.facts.profile import load_profile
from dualpath.lab.profile.like import predict
from dualpath.model import make_checkpoint


@pytest.mark.slow
def test_a_machine_is_measured_and_its_profile_used(tmp_path, capsys):
    model, store, out = tmp_path / "tiny", tmp_path / "store", tmp_path / "profile.json"
    make_checkpoint(model, "qwen3", seed=3)
    assert main(["profile", "--model", str(model), "--store", str(store), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Prefill of tiny" in said and "store → buffer" in said
    profile = load_profile(out)
    assert (profile.model, profile.machine.threads, profile.machine.dtype) == ("tiny", 1, "float32")
    assert all(sample.ns > 1000 for sample in (*profile.prefill, *profile.decode))
    longest = max(profile.prefill, key=lambda sample: (sample.cached_tokens + sample.new_tokens) * sample.items)
    assert longest.ns > min(sample.ns for sample in profile.prefill)
    for rate in ("store_read", "store_write", "transfer", "copy"):
        assert getattr(profile.rates, f"{rate}_bytes_per_s") > 1e5
    assert 0 < profile.request_ns < 5e9
    assert list(store.iterdir()) == []
    result = small_result(("dualpath",), kv_bytes_per_token=profile.kv_bytes_per_token)
    configuration = msgspec.structs.replace(result.configuration, model=str(model))
    (run,) = predict(msgspec.structs.replace(result, configuration=configuration), profile, "p").runs
    assert run.jct_s > 0 and not run.errors


def test_what_can_not_be_measured_is_one_line(tmp_path, capsys):
    out = tmp_path / "profile.json"
    assert main(["profile", "--model", str(tmp_path / "nowhere"), "--store", str(tmp_path), "--out", str(out)]) == 1
    line = capsys.readouterr().err
    assert "nowhere" in line and "\n" not in line.strip()
    assert not out.exists()
