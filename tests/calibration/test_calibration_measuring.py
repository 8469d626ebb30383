"""What is measured for real: a tiny model's steps, transfers and blocks on this machine, and the whole command."""

import asyncio
import socket
from pathlib import Path

import msgspec
import pytest

from dualpath.calibration.choir import _counters
from dualpath.calibration.moves import measure_moves
from dualpath.calibration.storage import measure_storage
from dualpath.cli import main
from dualpath.engine import LoadedModel, make_checkpoint
from dualpath.engine.step_profiling import measure_block_copies, measure_decode, measure_prefill
from dualpath.kv.layout import KVLayout, KVPart
from dualpath.prediction import load_machine

LAYOUT = KVLayout(layers=2, parts=(KVPart("k", 2, 64), KVPart("v", 2, 64)), dtype="float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny", "qwen3", seed=3)


def test_samples_of_a_tiny_model_grow_with_the_work(checkpoint: Path):
    model = LoadedModel.load(checkpoint)
    prefill = {(s.cached_tokens, s.new_tokens, s.items): s.total_ns for s in measure_prefill(model)}
    assert prefill[0, 1024, 1] > prefill[0, 16, 1] > 0
    assert prefill[3072, 64, 8] > prefill[0, 64, 4]
    assert (6144, 64, 1) not in prefill  # longer than the model takes
    decode = {(s.context_tokens, s.sequences): s.step_ns for s in measure_decode(model)}
    assert max(decode, key=lambda shape: decode[shape])[1] >= 4
    assert min(measure_block_copies(model)) > 0


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_moves_are_measured_over_real_channels(transport: str):
    before = {path.name for path in Path("/dev/shm").glob("*calibrate*")}
    copy, cost = measure_moves(LAYOUT, transport)
    for move in (copy, cost.pull, cost.put):
        assert move.byte_ns >= 0 and move.operation_ns >= 0 and 0.1 <= move.threads <= 2
        assert move.copying_ns(2**30, 0) > 0
    assert {path.name for path in Path("/dev/shm").glob("*calibrate*")} == before


def test_storage_is_measured_and_left_as_it_was(tmp_path: Path):
    store = tmp_path / "store"
    cost = measure_storage(LAYOUT, store)
    assert cost.read_ns > 0 and cost.write_ns > 0 and cost.write_wait_ns >= 0
    assert list(store.iterdir()) == []


def test_calibrate_refuses_what_it_can_not_measure(tmp_path: Path, capsys):
    assert main(["calibrate", "--threads", "1000"]) == 2
    assert "--threads is 1000" in capsys.readouterr().err


def test_a_model_that_is_too_short_for_the_requests_is_refused(tmp_path: Path, capsys):
    path = make_checkpoint(tmp_path / "tiny", "qwen3", seed=3)
    config = msgspec.json.decode((path / "config.json").read_bytes())
    (path / "config.json").write_bytes(msgspec.json.encode(config | {"max_position_embeddings": 1024}))
    assert main(["calibrate", "--model", str(path), "--out", str(tmp_path / "m.json")]) == 1
    assert "the model takes 1024 tokens" in capsys.readouterr().err
    assert not (tmp_path / "m.json").exists()


def test_counters_that_can_not_be_read_are_said_to_be():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(RuntimeError, match=f"{nobody}/metrics can't be read"):
        asyncio.run(_counters(f"{nobody}/v1"))


@pytest.mark.slow
def test_calibrate_writes_a_machine_that_predicts(checkpoint: Path, tmp_path: Path, capsys):
    out = tmp_path / "machine.json"
    command = ["calibrate", "--model", str(checkpoint), "--store", str(tmp_path / "store"), "--out", str(out)]
    assert main(command) == 0
    rates = load_machine(out)
    assert rates.layers == 5 and rates.model == str(checkpoint)
    assert set(rates.transports) == {"shm", "tcp"}
    assert rates.prefill.layer_ns(()) >= 0 and rates.decode.step_ns([1000]) > 0
    assert rates.control.request_ns > 0 and rates.slowdown >= 1
    assert msgspec.json.decode(out.read_bytes())["cores"] == rates.cores
    assert "how far the fits are off" in capsys.readouterr().out
