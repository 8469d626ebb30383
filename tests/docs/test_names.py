"""What a document names is there: ``file:symbol`` in the source, ``file::test``, series of /metrics, files, links."""

import re

import pytest
from documents import ALL, GUIDES, LINK, PATH, ROOT, SERIES, SOURCE, SYMBOL, TEST, headings, section, symbols, there

from dualpath.cli import COMMANDS, build_parser
from dualpath.lab.experiments.catalog import EXPERIMENTS
from dualpath.spec.metrics import CATALOGUE

TIMELESS = [name for name in GUIDES if name not in ("CHANGELOG.md", "docs/lab-log.md")]
"""They may name nothing that is gone."""


@pytest.mark.parametrize("document", [name for name in ALL if name != "CHANGELOG.md"])
def test_what_a_document_names_exists(document: str) -> None:
    text = ALL[document]
    for pattern, root in ((SYMBOL, SOURCE), (TEST, ROOT)):
        for file, name in pattern.findall(text):
            assert (root / file).is_file(), f"{document} names {file}, which is not there (it looks for {name})"
            assert name in symbols(root / file), f"{document}: {file} has no {name}"
    for name, label in SERIES.findall(text):
        assert name in CATALOGUE, f"{document}: no metric is called {name}"
        assert not label or label in CATALOGUE[name].shown_labels, f"{document}: {name} has no label {label}"


@pytest.mark.parametrize("document", ALL)
def test_links_lead_somewhere(document: str) -> None:
    for target, heading in LINK.findall(ALL[document]):
        if target.startswith("http"):
            continue
        file = (ROOT / document).parent / target if target else ROOT / document
        assert file.exists(), f"{document} links {target}"
        assert not heading or heading in headings(file.read_text()), f"{document} links {target}#{heading}"


@pytest.mark.parametrize("document", TIMELESS)
def test_files_and_folders_that_a_guide_names_are_there(document: str) -> None:
    for path in PATH.findall(GUIDES[document]):
        if path.endswith((".py", ".md", ".toml", "/")):
            assert there(path), f"{document} names {path}, which is neither in the repository nor in the package"


@pytest.mark.parametrize("document", [name for name in ALL if name not in GUIDES])
def test_tests_and_benchmarks_that_other_documents_name_are_there(document: str) -> None:
    for path in PATH.findall(ALL[document]):
        if path.startswith(("tests/", "benchmarks/", "examples/")):
            assert there(path), f"{document} names {path}"


def tree_of_readme() -> list[tuple[str, str]]:
    """README's tree: each path, with the folders it stands in, and what is said of it."""
    (tree,) = re.findall(r"```\n(src/dualpath/\n.*?)```", GUIDES["README.md"], re.DOTALL)
    found: list[tuple[str, str]] = []
    folders: list[tuple[int, str]] = []
    for line in tree.splitlines():
        names, _, said = line.strip().partition("  ")
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        above = "".join(folder for _, folder in folders)
        found += [(above + name, said) for name in names.split(", ")]
        if names.endswith("/"):
            folders.append((indent, names))
    return found


@pytest.mark.parametrize(("path", "said"), tree_of_readme(), ids=[path for path, _ in tree_of_readme()])
def test_a_path_of_the_tree_in_readme_is_there(path: str, said: str) -> None:
    assert (ROOT / path).exists()
    folder = ROOT / path if path.endswith("/") else (ROOT / path).parent
    for name in re.findall(r"[\w/]+\.(?:py|md)|\w+/(?=[ ,)]|$)", said):
        assert (folder / name).exists(), f"{path} has no {name}"


def test_the_tree_in_readme_has_every_package() -> None:
    packages = {
        f"{p.parent.relative_to(ROOT)}/" for root in (SOURCE, SOURCE / "lab") for p in root.glob("*/__init__.py")
    }
    assert len(packages) > 20
    assert packages <= {path for path, _ in tree_of_readme()}


def test_readme_lists_every_command_and_no_other() -> None:
    table = section(GUIDES["README.md"], "Use it")
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    listed = {name for cell in cells for name in re.findall(r"`dualpath ([a-z]+)", cell)}
    assert listed == {module.__name__.rpartition(".")[2] for module in COMMANDS}


@pytest.mark.parametrize("document", TIMELESS)
def test_commands_and_targets_that_a_guide_names_exist(document: str) -> None:
    (commands,) = [action.choices for action in build_parser()._actions if isinstance(action.choices, dict)]
    for name in re.findall(r"(?:`|^)(?:\.venv/bin/)?dualpath ([a-z]+)", GUIDES[document], re.MULTILINE):
        assert name in commands, f"{document} names dualpath {name}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", GUIDES[document], re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document} names make {target}"


def test_the_index_links_every_document() -> None:
    linked = {(ROOT / "docs" / target).resolve() for target, _ in LINK.findall(GUIDES["docs/README.md"])}
    documents = {(ROOT / name).resolve() for name in ALL if name.startswith("docs/")}
    assert documents - linked == {ROOT / "docs" / "README.md"}


def test_every_idea_of_the_paper_has_a_symbol() -> None:
    ideas = re.findall(r"^\| (.*(?:§|future work).*?) \| (.*) \|$", GUIDES["docs/paper-map.md"], re.MULTILINE)
    assert len(ideas) > 20
    assert [paper for paper, here in ideas if not SYMBOL.search(here)] == []


def test_the_how_to_of_experiments_lists_each() -> None:
    (table,) = re.findall(r"\| name \| varies .*?\n\n", ALL["docs/how-to/experiment.md"], re.DOTALL)
    assert re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE) == [one.name for one in EXPERIMENTS]
