import json
import subprocess
import sys

import numpy as np
import pytest

from dualpath import cli
from dualpath.kv import PosixStore
from dualpath.kv.keys import block_keys, namespace
from dualpath.kv.layout import KVLayout, KVPart


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def refused(capsys, *argv):
    """The last line that the command line `argv`, which must end with exit code 2, printed."""
    try:
        code = cli.main(argv)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "usage", "last"),
    [
        ("serve m --topologie 1P1D", "dualpath serve", "there is no option --topologie; did you mean --topology?"),
        ("serve m --topologie=1P1D", "dualpath serve", "there is no option --topologie; did you mean --topology?"),
        ("store stat kv --jsn x", "dualpath store stat", "there is no option --jsn; did you mean --json?"),
        ("demo --zzzzzzzz", "dualpath demo", "there is no option --zzzzzzzz"),
        ("demo extra", "dualpath demo", "unrecognized arguments: extra"),
    ],
)
def test_what_a_command_does_not_know_it_refuses_with_what_is_near(capsys, argv, usage, last):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv.split())
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(f"usage: {usage} ")
    assert lines[-1] == f"{usage}: error: {last}"


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return str(path)


@pytest.mark.parametrize(
    "command",
    [
        (),
        ("demo",),
        ("serve",),
        ("engine",),
        ("store",),
        ("store", "stat"),
        ("store", "fsck"),
        ("checkpoint",),
        ("faults",),
        ("faults", "real"),
    ],
)
def test_help_explains_every_command(capsys, command):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: dualpath" in shown
    assert command == ("store",) or "example" in shown
    assert all(len(line) <= 120 for line in shown.splitlines())


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from dualpath.cli import build_parser; build_parser().format_help();"
        "print([name for name in ('torch', 'numpy', 'rich', 'httpx', 'matplotlib') if name in sys.modules])"
    )
    assert python(code).stdout == "[]\n"


def test_the_demo_and_store_commands_import_no_torch():
    code = (
        "import sys; import dualpath.lab.experiments.execution, dualpath.lab.report.store;"
        "import dualpath.lab.report.run_table, dualpath.kv.stores.inspection;"
        "print('torch' in sys.modules)"
    )
    assert python(code).stdout == "False\n"


def test_the_package_runs_as_a_module():
    shown = subprocess.run([sys.executable, "-m", "dualpath", "--version"], capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stdout) == (0, "dualpath 0.1.0\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["serve", "--store", "s"], "dualpath serve: give a model: a Hugging Face checkpoint's directory"),
        (["serve", "m", "--model", "n", "--store", "s"], "MODEL is m and --model is n; give one of them"),
        (
            ["serve", "--model", "m", "--store", "s", "--snic-rate", "fast"],
            "argument --snic-rate: 'fast' is not a rate",
        ),
        (["serve", "--model", "m", "--store", "s", "--buffer", "1 gig"], "argument --buffer: '1 gig' is not a size"),
        (["serve", "--model", "m", "--store", "s", "--port", "70000"], "argument --port: 70000 is not a port"),
        (
            ["serve", "m", "--join-address", "tcp://127.0.0.1:99999"],
            "argument --join-address: 'tcp://127.0.0.1:99999' is not an address; give one such as tcp://10.0.0.1:5555",
        ),
        (
            ["engine", "--role", "decode", "--coordinator", "tcp://127.0.0.1:99999"],
            "argument --coordinator: 'tcp://127.0.0.1:99999' is not an address",
        ),
        (["serve", "--model", "m", "--store", "s", "--system", "best"], "argument --system: unknown system 'best'"),
        (["serve", "--model", "/none", "--store", "s"], "--model: /none has no config.json"),
        (["engine", "--role", "prefill"], "required: --coordinator"),
        (["store", "stat", "/none"], "dualpath store: /none is not a directory"),
        (["store", "fsck", "ftp://none"], "--store ftp://none: unknown kind of store 'ftp'"),
        (["checkpoint", "/tmp"], "/tmp exists"),
        (["demo", "--systems", "basic,fast"], "unknown system 'fast'; choose from basic, "),
        (["demo", "--topologies", "1P1D,big"], "argument --topologies: 'big' is not a topology"),
        (["demo", "--agents", "0"], "argument --agents: 0 is not a whole number from 1 up"),
        (["demo", "--agents", "few"], "argument --agents: 'few' is not a whole number"),
        (["demo", "--scale", "-1"], "argument --scale: '-1' is not a number above 0"),
        (["demo", "--trace", "/none.json"], "dualpath demo: no trace '/none.json': give 32K, 48K or 64K"),
        (["dance"], "invalid choice: 'dance'"),
    ],
)
def test_a_bad_value_is_one_clear_line(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_a_topology_that_is_none_is_refused_by_the_configuration(capsys, model):
    assert "'2D' is not a topology" in refused(capsys, "serve", "--model", model, "--store", "s", "--topology", "2D")


@pytest.fixture
def served(monkeypatch, tmp_path):
    """What `dualpath serve` asked to run: pairs of a configuration and whether it starts engines itself."""
    asked = []

    def run(config, local_engines=True):
        asked.append((config, local_engines))
        return 7

    monkeypatch.setattr("dualpath.serving.supervising.run", run)
    monkeypatch.chdir(tmp_path)
    return asked


def test_serve_fills_a_configuration_from_its_options(served, model, tmp_path):
    from dualpath.cluster.cluster_secret import ClusterSecret

    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef" * 2)
    secret.chmod(0o600)
    argv = ["serve", "--model", model, "--store", "kv", "--topology", "1Px2+2D", "--system", "basic"]
    argv += ["--snic-rate", "60MB/s+30MB/s", "--cnic-rate", "400Gb/s", "--buffer", "64MiB", "--hbm", "2GiB"]
    argv += ["--store-quota", "1GB", "--port", "0", "--api-key", "a", "--api-key", "b", "--transport", "tcp"]
    argv += ["--threads", "2", "--journal", "j", "--ready-file", "r", "--max-waiting", "9", "--quota-ms", "2.5"]
    argv += ["--join-address", "tcp://0.0.0.0:5555"]
    assert cli.main(argv) == 2
    assert cli.main([*argv, "--cluster-secret-file", str(secret)]) == 7
    ((config, local_engines),) = served
    assert not local_engines
    assert (config.model, config.store, str(config.topology), config.system) == (model, "kv", "1Px2+2D", "basic")
    assert (config.snic_bytes_per_s, config.cnic_bytes_per_s) == ((60_000_000, 30_000_000), 50_000_000_000)
    assert (config.buffer_bytes, config.hbm_bytes, config.store_quota_bytes) == (2**26, 2**31, 10**9)
    assert (config.port, config.api_keys, config.transport, config.threads) == (0, ("a", "b"), "tcp", 2)
    assert (config.journal, config.ready_file, config.max_waiting, config.quota_ns) == ("j", "r", 9, 2_500_000)
    assert config.control_address == "tcp://0.0.0.0:5555"
    assert config.cluster_secret == ClusterSecret.of_file(secret)


def test_what_serve_is_not_told_is_the_configurations_default(served, model):
    from dualpath.cluster.config import ClusterConfig

    assert cli.main(["serve", "--model", model, "--store", "kv"]) == 7
    settled = {"dtype": "float32", "served_model_name": "model"}
    assert served == [(ClusterConfig(model=model, store="kv", **settled), True)]


@pytest.fixture
def store(tmp_path):
    """A store of three blocks, one after another, and their keys."""
    layout = KVLayout.alike(layers=2, parts=(KVPart("k", 1, 4), KVPart("v", 1, 4)), dtype="float32")
    space = namespace("fingerprint", "v1", layout)
    opened = PosixStore(tmp_path / "kv")
    keys = block_keys(space.root, list(range(192)))
    for key, parent in zip(keys, [space.root, *keys], strict=False):
        opened.write(space, key, parent, np.zeros(layout.full_block_bytes, np.uint8))
    return tmp_path / "kv", keys


def test_store_stat_shows_what_is_there(store, capsys, tmp_path):
    directory, _ = store
    assert cli.main(["store", "stat", str(directory), "--json", str(tmp_path / "stat.json")]) == 0
    assert "2 layers, k 1×4 v 1×4, float32" in capsys.readouterr().out
    (space,) = json.loads((tmp_path / "stat.json").read_text())["namespaces"]
    assert (space["blocks"], space["deepest_chain_blocks"]) == (3, 3)


def test_store_fsck_fails_on_a_bad_block_until_it_is_repaired(store, capsys, tmp_path):
    directory, keys = store
    assert cli.main(["store", "fsck", str(directory)]) == 0
    assert "3 of 3 blocks are sound" in capsys.readouterr().out
    (path,) = directory.rglob(f"{keys[1].hex()}.kv")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert cli.main(["store", "fsck", str(directory), "--json", str(tmp_path / "fsck.json")]) == 1
    shown = capsys.readouterr().out
    assert "1 bad files" in shown and "1 orphans" in shown and "nothing was changed; --repair" in shown
    assert json.loads((tmp_path / "fsck.json").read_text())["sound_blocks"] == 2
    assert cli.main(["store", "fsck", str(directory), "--repair"]) == 0
    assert cli.main(["store", "fsck", str(directory)]) == 0
    assert "1 of 1 blocks are sound" in capsys.readouterr().out


@pytest.mark.usefixtures("needs_torch")
def test_checkpoint_makes_a_model_that_transformers_opens(tmp_path):
    made = python(
        "import sys; from dualpath.cli import main; path = sys.argv[1];"
        "code = main(['checkpoint', path, '--architecture', 'llama']); from transformers import AutoConfig;"
        "print(AutoConfig.from_pretrained(path).model_type); sys.exit(code)",
        str(tmp_path / "tiny"),
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.splitlines() == [str(tmp_path / "tiny"), "llama"]
