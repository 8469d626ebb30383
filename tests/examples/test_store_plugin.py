"""examples/store_plugin as its users have it: installed, found by its entry point, under a real server."""

import importlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from dualpath.kv import BlockFault, PrefixIndex, Store, StoreLocationError, open_store, rebuild
from dualpath.kv.stores import conformance
from dualpath.model.checkpoint import make_checkpoint

PLUGIN = Path(__file__).parents[2] / "examples" / "store_plugin"
START_S, STOP_S = 60.0, 30.0


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example's package in a folder of its own, on the module path."""
    home = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", home, PLUGIN], check=True, timeout=120)
    sys.path.insert(0, str(home))
    importlib.invalidate_caches()
    yield home
    sys.path.remove(str(home))


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_promises_of_a_store(
    installed: Path, tmp_path: Path, check: Callable[[Callable[[], Store]], None]
) -> None:
    check(lambda: open_store(f"sqlite://{tmp_path}/kv.db"))


def test_it_survives_what_happens_to_files(installed: Path, tmp_path: Path) -> None:
    """Damaged rows are set aside; a file removed under a live store is made again."""
    store = open_store(f"sqlite://{tmp_path}/kv.db")
    conformance.write_chain(store, 3)
    with sqlite3.connect(tmp_path / "kv.db") as db:
        db.execute("UPDATE blocks SET payload = zeroblob(bytes) WHERE key = ?", (conformance.KEYS[1],))
    assert conformance.read(store, conformance.SPACE, conformance.KEYS[1]) is BlockFault.CHECKSUM
    assert store.quarantine(conformance.SPACE.root, conformance.KEYS[1]) is BlockFault.CHECKSUM
    assert rebuild(PrefixIndex(), store, clean=True).orphans == (conformance.KEYS[2],)
    for path in tmp_path.glob("kv.db*"):
        path.unlink()
    assert list(store.scan()) == []
    conformance.write_chain(store, 1)
    assert len(list(open_store(f"sqlite://{tmp_path}/kv.db").scan())) == 1


def test_a_location_that_names_no_file(installed: Path) -> None:
    with pytest.raises(StoreLocationError, match="write sqlite:///path/to/file"):
        open_store("sqlite://host")


@pytest.mark.slow
def test_a_cluster_serves_from_it(installed: Path, tmp_path: Path) -> None:
    """The second request's hit tokens come from the file; then `dualpath store` looks into it."""
    model = make_checkpoint(tmp_path / "model", "qwen3", seed=7)
    store, ready = f"sqlite://{tmp_path}/kv.db", tmp_path / "ready.json"
    places = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    dualpath = [sys.executable, "-m", "dualpath"]
    serve = [*dualpath, "serve", "--model", model, "--store", store, "--port", "0", "--ready-file", ready]
    process = subprocess.Popen([*serve, "--buffer", "64MiB", "--hbm", "64MiB"], env=environment)
    try:
        deadline = time.monotonic() + START_S
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < deadline, "serve did not start"
            time.sleep(0.05)
        url = json.loads(ready.read_bytes())["url"]
        asked = {"model": "model", "prompt": list(range(10, 220)), "max_tokens": 3, "temperature": 0}
        answers = [
            httpx.post(f"{url}/v1/completions", json=asked, timeout=60, trust_env=False).json() for _ in range(2)
        ]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_S) == 0
    assert [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers] == [0, 192]
    assert answers[0]["choices"][0]["text"] == answers[1]["choices"][0]["text"]
    with sqlite3.connect(tmp_path / "kv.db") as db:
        assert db.execute("SELECT count(*) FROM blocks").fetchone() == (3,)
    reports = {}
    for action in ("stat", "fsck"):
        look = [*dualpath, "store", action, store, "--json", tmp_path / action]
        subprocess.run(look, env=environment, check=True, timeout=60)
        reports[action] = json.loads((tmp_path / action).read_bytes())
    (space,) = reports["stat"]["namespaces"]
    assert (space["blocks"], space["deepest_chain_blocks"]) == (3, 3) and space["description"]["layout"]
    assert (reports["fsck"]["sound_blocks"], reports["fsck"]["orphans"]) == (3, [])
