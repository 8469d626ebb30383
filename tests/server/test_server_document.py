"""docs/how-to/openai-api.md says what the code does, and its example runs."""

import re
from pathlib import Path

import pytest
from fake_cluster import EOS, FakeGenerator, ids, running_server, says

from dualpath.server.protocol import _NEUTRAL, ChatRequest, CompletionRequest
from dualpath.spec.timings import Timings

DOCUMENT = (Path(__file__).parents[2] / "docs/how-to/openai-api.md").read_text()


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    with running_server(FakeGenerator(says("none do", cached_tokens=0))) as url:
        exec(compile(example.replace("http://127.0.0.1:8000", url), "openai-api.md", "exec"), {})
    text, usage, token_ids = capsys.readouterr().out.splitlines()
    assert text == "none do"
    assert re.fullmatch(r"0 of \d+ prompt tokens read", usage)
    assert token_ids == str([*ids("none do"), EOS])


def test_every_timing_is_documented_and_nothing_else() -> None:
    table = DOCUMENT.split("## Timings")[1].split("## Errors")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == list(Timings.__struct_fields__)


def test_every_parameter_is_documented_and_nothing_else() -> None:
    parameters = DOCUMENT.split("## Parameters")[1].split("## Timings")[0]
    table, refused = parameters.split("Refused with")
    rows = re.findall(r"^\| (`.*?) \|", table, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)} | {"top_logprobs"}
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__} - {"prompt", "messages"}
    assert named == fields
    assert set(re.findall(r"`(\w+)`", refused)) - {"unsupported_parameter"} == set(_NEUTRAL)
