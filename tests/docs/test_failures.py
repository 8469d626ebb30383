"""What documents name is there: ``file:symbol`` in the source, ``file::test``, series of /metrics.

`docs/failures.md` names all three in every row; other documents are held to what they name.
"""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from dualpath.spec.metrics import CATALOGUE

ROOT = Path(__file__).parents[2]
SYMBOL = re.compile(r"`((?!tests/)[\w/]+\.py):([A-Za-z_][\w.]*)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
SERIES = re.compile(r'`(dualpath_[a-z_]+|vllm:[a-z0-9_]+)(?:\{(\w+)="[^"`]*"\})?`')
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "failures.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| what |")
]
DOCUMENTS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}


@cache
def symbols(path: Path) -> frozenset[str]:
    """Functions, classes with their members, and assigned names of a module: ``Class.method``, ``CONSTANT``."""

    def within(body: list[ast.stmt], prefix: str) -> list[str]:
        found = []
        for node in body:
            match node:
                case ast.ClassDef():
                    found += [prefix + node.name, *within(node.body, f"{prefix}{node.name}.")]
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    found.append(prefix + node.name)
                case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                    found.append(prefix + name)
        return found

    return frozenset(within(ast.parse(path.read_text()).body, ""))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_exists(document: str) -> None:
    text = DOCUMENTS[document]
    for pattern, root in ((SYMBOL, ROOT / "src" / "dualpath"), (TEST, ROOT)):
        for file, name in pattern.findall(text):
            assert (root / file).is_file(), f"docs/{document} names {file}, which is not there (it looks for {name})"
            assert name in symbols(root / file), f"docs/{document}: {file} has no {name}"
    for name, label in SERIES.findall(text):
        assert name in CATALOGUE, f"docs/{document}: no metric is called {name}"
        assert not label or label in CATALOGUE[name].shown_labels, f"docs/{document}: {name} has no label {label}"


def test_there_are_rows() -> None:
    assert len(ROWS) > 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:60])
def test_a_row_says_who_what_and_where(row: list[str]) -> None:
    _, noticed, follows, seen, counted, shown = row
    unnamed = ("as above", "nobody")
    assert SYMBOL.search(noticed) or noticed.startswith(unnamed), f"who notices? {noticed}"
    assert SYMBOL.search(follows), f"what follows, and where? {follows}"
    assert seen
    assert SERIES.search(counted) or counted.startswith(("none", "as ")), f"which metric? {counted}"
    assert TEST.search(shown), f"which test? {shown}"
    assert "`" not in re.sub(f"{TEST.pattern}|, ", "", shown), f"not a test's name: {shown}"
