"""What a real cluster's /metrics shows is the catalogue, after answers, errors and a dead engine."""

import os
import signal
from pathlib import Path

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dualpath.spec.metrics import CATALOGUE

from .test_serve import serving


@pytest.mark.slow
def test_a_cluster_shows_the_catalogue_and_nothing_else(model: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path, "--topology", "1P2D") as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        prompt = list(range(10, 210))
        for _ in range(2):
            client.completions.create(model=name, prompt=prompt, max_tokens=4)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="another", prompt="x", max_tokens=1)
        decode = [one["pid"] for one in httpx.get(f"{url}/health").json()["engines"] if one["role"] == "decode"]
        streams = [
            client.completions.create(
                model=name, prompt=[*prompt, n], max_tokens=300, stream=True, extra_body={"ignore_eos": True}
            )
            for n in (1, 2)
        ]
        for stream in streams:
            next(iter(stream))
        os.kill(decode[0], signal.SIGKILL)
        for stream in streams:
            list(stream)
        families = list(text_string_to_metric_families(httpx.get(f"{url}/metrics").text))

    described = {(f.name + "_total" * (f.type == "counter"), f.type, f.documentation) for f in families}
    assert described == {(metric.name, metric.kind, metric.help) for metric in CATALOGUE.values()}
    for family in families:
        labels = CATALOGUE[family.name + "_total" * (family.type == "counter")].shown_labels
        assert {frozenset(sample.labels) - {"le"} for sample in family.samples} <= {frozenset(labels)}, family.name
    found = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert found["dualpath_scheduler_retried_total", "engine_lost"] >= 1
    assert found["dualpath_lost_engines_total",] == 1
    assert found["dualpath_store_hit_blocks_total",] >= 3
    assert found["dualpath_unknown_series",] == 0
