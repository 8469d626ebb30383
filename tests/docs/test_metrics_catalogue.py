"""The catalogue of metrics: whole, true of the code, and written down in docs/metrics.md."""

import ast
import runpy
import warnings
from pathlib import Path

import pytest

from dualpath.core.counts import COUNTS, GAUGES, figures
from dualpath.core.policy import Constants, Policy
from dualpath.core.scheduler import Scheduler
from dualpath.spec import metrics
from dualpath.spec.metrics import CATALOGUE, NIC_BYTES, Metric, Sample, metric_of, of_engine

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dualpath"
MEMBERS = {name: value for name, value in vars(metrics).items() if isinstance(value, Metric)}
UNITS = """aborts attempts batches blocks bytes chunks connections engines errors events faults fetches inputs jobs
looks matches messages namespaces parts ratio requests seconds series steps tokens updates versions"""


def test_the_document_is_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # it is imported already
        runpy.run_module("dualpath.spec.metrics", run_name="__main__")
    written = (ROOT / "docs" / "metrics.md").read_text()
    assert written == capsys.readouterr().out, "run: python -m dualpath.spec.metrics > docs/metrics.md"


def test_every_metric_has_one_name_a_unit_and_a_line_of_help() -> None:
    assert len(CATALOGUE) == len(MEMBERS)
    for metric in CATALOGUE.values():
        assert metric.shown_unit in UNITS.split(), metric.name
        assert metric.help and "\n" not in metric.help and not metric.help.endswith("."), metric.name


@pytest.mark.parametrize("name", MEMBERS)
def test_what_is_said_to_measure_a_metric_names_it(name: str) -> None:
    where = SOURCE / MEMBERS[name].where
    texts = [path.read_text() for path in ([where] if where.suffix else where.glob("*.py"))]
    assert any(f"metrics.{name}" in text for text in texts), f"{where} measures no metrics.{name}"


def test_no_other_file_writes_a_metrics_name() -> None:
    """A name written as text would pass by the catalogue."""
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "spec" / "metrics.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not node.value.startswith("vllm:"), f"{path}:{node.lineno}"
                assert node.value.partition("{")[0] not in CATALOGUE, f"{path}:{node.lineno}"
                in_lab = "lab" in path.relative_to(SOURCE).parts or "model" in path.relative_to(SOURCE).parts
                assert in_lab or not node.value.startswith("dualpath_"), f"{path}:{node.lineno}"


def test_all_that_the_scheduler_counts_is_shown() -> None:
    statistics = Scheduler(Policy(), Constants.from_rates(snic_tokens_per_s=1e3, prefill_tokens_per_s=1e3)).statistics()
    assert statistics.keys() == COUNTS.keys() | GAUGES.keys()
    shown = figures(statistics)
    assert len(shown) == len(statistics)
    assert all(metric_of(sample) is not None for sample in shown)


def test_a_series_has_the_labels_of_its_metric() -> None:
    sample = NIC_BYTES("snic", "rx", "high", "node")
    assert sample == 'dualpath_nic_bytes_total{nic="snic",direction="rx",traffic_class="high",node="node"}'
    with pytest.raises(ValueError, match="zip"):
        NIC_BYTES("snic")
    shown = of_engine(sample, 3, "decode")
    assert shown == sample.replace("{", '{engine="3",role="decode",')
    assert of_engine(metrics.DECODE_STEPS(), 3, "decode") == 'dualpath_decode_steps_total{engine="3",role="decode"}'
    assert metric_of(shown) is NIC_BYTES
    assert metric_of(sample) is None  # whose it is must be said
    named = metrics.RUNNING('a "b"\\c\nd', "0")
    assert named == 'vllm:num_requests_running{model_name="a \\"b\\"\\\\c\\nd",engine="0"}'
    assert metric_of(named) is metrics.RUNNING


@pytest.mark.parametrize(
    "sample",
    [
        "dualpath_of_tomorrow_total",
        "not a name",
        "",
        "dualpath_nic_bytes_total",
        'dualpath_nic_bytes_total{nic="a\nb",direction="rx",traffic_class="high",node="node"}',
        'dualpath_nic_bytes_total{direction="rx",nic="snic"}',
        'dualpath_nic_bytes_total{nic="snic", direction="rx",traffic_class="high",node="node"}',
        'dualpath_nic_bytes_total{nic="snic",direction="rx",traffic_class="high",node="n"} 7\ndualpath_requests_live',
        "dualpath_requests_live",  # the coordinator's own
    ],
)
def test_what_the_catalogue_lacks_is_not_taken_from_an_engine(sample: str) -> None:
    assert metric_of(of_engine(Sample(sample), 3, "decode")) is None
