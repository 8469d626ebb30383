"""Whatever a file holds, it loads or is refused in one line that names the file and the place."""

import copy
import errno
import json
import os
import pathlib
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smallest import RECORDS

from dualpath.cli import main
from dualpath.lab.planning.traces import load_of
from dualpath.lab.sim.workloads import agents_of
from dualpath.traces.formats import BY_NAME
from dualpath.traces.reading import TraceError
from dualpath.traces.sources import load_source

PLACE = re.compile(r": (line \d+: |\$\[\d+\]: |not .*\$|holds no |may be |the keys of |the file is empty|blocks of )")
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([[], {}, [[]], 2**31, 2**63, 10**30, -1, 0, 1e300, -0.0, "4", "\ud800"]),
)


def places(value, here=()):
    """The path of everything inside a record."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*here, key)
        yield from places(one, (*here, key))


@st.composite
def mutated(draw, records):
    """Records with a few values replaced, removed or doubled."""
    records = copy.deepcopy(records)
    for _ in range(draw(st.integers(0, 3))):
        every = list(places(records))
        if not every:
            break
        *path, last = draw(st.sampled_from(every))
        at = records
        for key in path:
            at = at[key]
        action = draw(st.sampled_from(["replace", "remove", "double"]))
        if action == "remove":
            del at[last]
        elif action == "double" and isinstance(at, list):
            at.insert(last, copy.deepcopy(at[last]))
        else:
            at[last] = copy.deepcopy(draw(JUNK))
    return records


@st.composite
def files(draw, kind):
    """The text of a file of `kind`, with faults of value, of layout, and of bytes."""
    records = draw(mutated([copy.deepcopy(RECORDS[kind]) for _ in range(draw(st.integers(1, 3)))]))
    layout = draw(st.sampled_from(["lines", "array", "indented"]))
    text = {
        "lines": "\n".join(json.dumps(one) for one in records) + "\n",
        "array": json.dumps(records),
        "indented": json.dumps(records[0] if records else {}, indent=1),
    }[layout].encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(text)))
        text = draw(
            st.sampled_from([text[:at], text[at:], text[:at] + b"\xff" + text[at:], text[:at] + b"\n" + text[at:]])
        )
    return text


def check(path, name):
    """It loads everywhere, or is refused in one line."""
    try:
        found = load_source([name]).trajectories
        load_of([name])
        agents_of([name])
    except TraceError as error:
        message = str(error)
        assert str(path) in message and "\n" not in message
        assert PLACE.search(message), message
    else:
        assert found


@pytest.mark.parametrize("kind", BY_NAME)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_files_load_or_are_refused_with_their_place(tmp_path, kind, data):
    path = tmp_path / "trace.json"
    path.write_bytes(data.draw(files(kind)))
    check(path, str(path))
    check(path, f"{kind}:{path}")


@pytest.mark.parametrize("kind", BY_NAME)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"[]", "holds no requests"),
        (b"\xff\xfe", "line 1: not a"),
        (b"%r\n\n{oops\n", "line 3: not a"),
        (b'%r\n{"x": ' + b"[" * 100_000, "line 2: not a .*nested too deeply"),
        (b'[{"x": ' + b"[" * 100_000, "not a .*nested too deeply"),
        (b'{"x": ' + b"[" * 100_000, "line 1: not a .*nested too deeply"),
        (b"\n\n[%r,\n{oops", "line 4: not a"),
        (b"%r\n[1]\n", "line 2: not a .*got `array`"),
        (b"%r\nNaN\n", "line 2: not a"),
        (b"%r\n%r", None),
        (b'[%r,\n%r,\n{"', "line 3: not a .*truncated"),
        (b"[%r,\n3]", r"not a .*got `int` - at `\$\[1\]`"),
        (b"%r\n" + b'{"n": ' + b"9" * 5000 + b"}", "line 2: not a"),
        (b'[%r,\n{"id": "\xff"}]', "line 2: not a .*: it is not UTF-8|not a .*missing required"),
    ],
)
def test_each_kind_of_bad_file_is_refused_with_its_line(tmp_path, kind, content, message):
    path = tmp_path / "trace.json"
    path.write_bytes(content.replace(b"%r", json.dumps(RECORDS[kind]).encode()))
    if message is None:
        assert load_source([f"{kind}:{path}"]).trajectories
        return
    with pytest.raises(TraceError, match=rf"^{re.escape(str(path))}: .*{message}"):
        load_source([f"{kind}:{path}"])


def test_numbers_too_large_for_the_columns_are_refused(tmp_path):
    path = tmp_path / "trace.jsonl"
    for change in ({"input_length": 2**31}, {"output_length": 10**30}, {"timestamp": 1e20}, {"delay": -1}):
        path.write_text(json.dumps(RECORDS["mooncake"] | change))
        with pytest.raises(TraceError, match=rf"line 1: .*\$\.{next(iter(change))}"):
            load_source([str(path)])
    path.write_text(json.dumps(RECORDS["mooncake"] | {"input_length": 2**30 - 1, "output_length": 2**30 - 1}))
    assert agents_of([f"mooncake@{2**30}:{path}"]).table.context_tokens.tolist() == [2**31 - 2]


def test_names_that_can_not_be_opened_are_refused(tmp_path, monkeypatch):
    loop, inside = tmp_path / "loop.json", tmp_path / "directory"
    loop.symlink_to(loop)
    (inside / "sub.json").mkdir(parents=True)
    for name, message in (
        (loop, "loop.json: can't be read: Too many levels"),
        (inside, "sub.json: can't be read: Is a directory"),
        (tmp_path / ("n" * 300), "can't be read: File name too long"),
        ("a\0b", "no trace 'a"),
        ("", "no trace ''|directory"),
    ):
        with pytest.raises(TraceError, match=message):
            load_source([str(name)])
    with pytest.raises(TraceError, match=r"32K can't be mixed with other sources"):
        load_source(["32K", str(loop)])
    with pytest.raises(TraceError, match=r"bad\.json: not a tokenizer"):
        load_source([f"chat:{inside}"], tokenizer=tmp_path / "bad.json")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = tmp_path / "trace.json"
    path.write_text(json.dumps(RECORDS["weka"]))
    monkeypatch.setattr(pathlib.Path, "open", denied)  # a mode would not stop root
    with pytest.raises(TraceError, match=r"trace\.json: can't be read: Permission denied"):
        load_source([str(path)])


def test_a_command_ends_with_the_line_and_code_2(tmp_path, capsys):
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(RECORDS["weka"]) + "\n{oops\n")
    for command in (["plan", "ds27b-1p1d"], ["simulate", "ds27b-1p1d"], ["replay", "http://127.0.0.1:1"], ["demo"]):
        assert main([*command, "--trace", str(path)]) == 2
        assert f"{path}: line 2: not a WEKA session" in capsys.readouterr().err
