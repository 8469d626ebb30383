"""What the process of `dualpath serve` imports of us: nothing of the laboratory, and well under half of the source."""

import json
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "dualpath"
MOST = 0.39
"""Of the source's lines. Engines are processes of their own and import model, transfer and their side of cluster."""


def test_serve_imports_well_under_half_of_the_source_and_nothing_of_the_laboratory() -> None:
    code = (
        "import json, sys, dualpath.serving.cluster_server;"
        "ours = {n: m.__file__ for n, m in sys.modules.items() if n.partition('.')[0] == 'dualpath'};"
        "print(json.dumps([ours, 'torch' in sys.modules]))"
    )
    ours, has_torch = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not has_torch
    packages = {name.split(".")[1] for name in ours if "." in name}
    assert not packages & {"lab", "client", "traces", "results", "model", "cli"}
    lines = sum(map(_lines, map(Path, ours.values())))
    assert lines <= MOST * sum(map(_lines, SOURCE.rglob("*.py")))


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
