"""The table of formats, and what follows from it: help, messages, docs, the explicit choice of one."""

import json
import pathlib

import pytest
from smallest import RECORDS

import dualpath.traces
from dualpath.cli import arguments
from dualpath.lab.planning.plan import load_of
from dualpath.lab.sim.workloads import agents_of
from dualpath.traces.formats import FORMATS, PAPER_ROWS, SOURCES_HELP
from dualpath.traces.paper import PAPER_TRACES
from dualpath.traces.reading import TraceError
from dualpath.traces.sources import format_of, load_source

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "traces.md"


@pytest.fixture
def write(tmp_path):
    def writes(record, name="trace.jsonl"):
        path = tmp_path / name
        path.write_text(json.dumps(record) + "\n")
        return path

    return writes


@pytest.mark.parametrize("format_", FORMATS, ids=lambda one: one.name)
def test_every_format_is_told_and_read_by_every_loader(write, format_):
    path = write(RECORDS[format_.name])
    assert format_of(path) is format_
    for name in (str(path), f"{format_.name}:{path}", f"{format_.name}:{path.parent}"):
        (one,) = load_source([name]).trajectories
        assert [(r.append_tokens, r.generate_tokens) for r in one.rounds] == [(70, 2)]
        assert load_of([name]).generate_tokens == 2
        assert agents_of([name]).total_turns() == 1


@pytest.mark.parametrize("format_", FORMATS, ids=lambda one: one.name)
def test_help_messages_and_docs_follow_from_the_table(write, format_):
    assert format_.title in SOURCES_HELP and arguments.SOURCES_HELP is SOURCES_HELP
    with pytest.raises(TraceError) as caught:
        load_source([str(write({"unknown": 1}))])
    assert format_.title in str(caught.value) and all(key in str(caught.value) for key in format_.keys)
    assert f"| `{format_.name}` | {format_.title} | {format_.summary} |" in DOCS.read_text()


def test_the_papers_rows_are_named_as_in_its_table():
    assert tuple(PAPER_TRACES) == PAPER_ROWS


def test_a_file_of_two_formats_asks_for_one(write):
    path = write(RECORDS["chat"] | RECORDS["sharegpt"])
    with pytest.raises(TraceError, match="may be chat messages or ShareGPT conversations: say which, such as chat:"):
        load_source([str(path)])
    assert load_source([f"sharegpt:{path}"]).description.startswith("1 agents of ShareGPT conversations")


def test_a_file_read_as_another_format_is_refused_with_its_line(write):
    path = write(RECORDS["chat"])
    with pytest.raises(TraceError, match=r"trace\.jsonl: line 1: not a WEKA session: .*missing required field `id`"):
        load_source([f"weka:{path}"])


def test_block_sizes_are_given_with_the_name(write, tmp_path, monkeypatch):
    path = write(RECORDS["mooncake"] | {"input_length": 1389, "hash_ids": [1, 2, 3, 4]})
    with pytest.raises(TraceError, match="give the size, such as mooncake@348:"):
        load_source([str(path)])
    assert len(load_source([f"mooncake@400:{path}"]).trajectories) == 1
    for name, message in (
        (f"mooncake@0:{path}", "must be a whole number from 1 up, not '0'"),
        (f"mooncake@x:{path}", "must be a whole number from 1 up, not 'x'"),
        (f"weka@64:{path}", rf"weka has no blocks, so no block size can be given; write weka:{path}"),
        (f"unknown:{path}", "no trace 'unknown:"),
    ):
        with pytest.raises(TraceError, match=message):
            load_source([name])
    monkeypatch.chdir(tmp_path)
    path.rename("weka:1")
    assert len(load_source(["mooncake@400:weka:1"]).trajectories) == 1
    write(RECORDS["chat"], "weka:1")
    assert "chat" in load_source(["weka:1"]).description  # a file of that very name


def test_one_id_twice_becomes_two(write, tmp_path):
    write(RECORDS["weka"], "a.json")
    write(RECORDS["weka"], "b.json")
    write(RECORDS["weka"], "c.json")
    assert [one.id for one in load_source([str(tmp_path)]).trajectories] == ["w", "w~2", "w~3"]


def test_the_public_face_has_what_it_names():
    homes = [name for names in dualpath.traces._HOMES.values() for name in names]
    assert sorted(homes) == sorted(dualpath.traces.__all__)
    assert dualpath.traces.load_source is load_source
    for name in dualpath.traces.__all__:
        assert getattr(dualpath.traces, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        dualpath.traces.absent  # noqa: B018
