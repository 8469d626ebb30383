"""The project's documents, and what text in them may name."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dualpath"
DOCS = ROOT / "docs"
ALL = {str(path.relative_to(ROOT)): path.read_text() for path in sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])}
GUIDES = {name: text for name, text in ALL.items() if name.count("/") < 2}
"""They name things as they are now: the front page and the pages right under docs/."""

SYMBOL = re.compile(r"`((?!tests/)[\w/]+\.py):([A-Za-z_][\w.]*)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")
SERIES = re.compile(r'`(dualpath_[a-z_]+|vllm:[a-z0-9_]+)(?:\{(\w+)="[^"`]*"\})?`')
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/?)`")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
"""A file, which is empty where the link stays in its own, and a heading."""


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


def there(path: str) -> bool:
    """Whether a file or folder is in the repository, or in the package; ``NAME`` stands for one to be written."""
    return "NAME" in path or any((root / path).exists() for root in (ROOT, SOURCE))


def block(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def headings(text: str) -> set[str]:
    """Of a document, as links write them."""
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


def section(text: str, heading: str) -> str:
    """What stands under a heading of level two."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
