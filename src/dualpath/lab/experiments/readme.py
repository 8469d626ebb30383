"""Writes one Markdown page with all experiments of a directory: figures, findings and tables."""

from pathlib import Path

from dualpath.lab.experiments.catalog import EXPERIMENTS, Definition
from dualpath.lab.report.run_table import markdown_table
from dualpath.results.file import ResultFile, ResultFileError, load_results

PAGE = "README.md"
HEADING = """\
# Experiments

Real clusters on one machine: real processes, tokens and bytes, storage NICs held to a rate. Written by
`dualpath experiment`; every figure can be had again with the command under it.
"""


def write_page(out: Path) -> Path:
    """Writes the page of every experiment whose result file is in `out`, in the catalog's order."""
    sections = []
    for definition in EXPERIMENTS:
        path = out / f"{definition.name}.json"
        try:
            sections.append(section(definition, load_results(path), out))
        except ResultFileError:
            continue  # not run yet, or by a version that wrote another format
    page = out / PAGE
    page.write_text("\n".join([HEADING, *sections]), encoding="utf-8")
    return page


def section(definition: Definition, result: ResultFile, out: Path) -> str:
    """Returns one experiment in Markdown."""
    configuration, work = result.configuration, result.workload
    rate = configuration.snic_rate
    repeats = "once" if configuration.repeats == 1 else f"{configuration.repeats} times"
    parts = [
        f"## {definition.name}: {definition.summary}",
        f"Mirrors {definition.mirrors}. Expected: {definition.expect}.",
    ]
    if (out / f"{definition.name}.png").exists():
        parts.append(f"![{definition.summary}]({definition.name}.png)")
    parts += [
        "\n".join(f"- {sentence}" for sentence in definition.find(result)),
        markdown_table(result),
        (
            f"Each run {repeats}; {work.source}; at most {work.agents} agents, {work.turns} turns; storage NICs at "
            f"{'no limit' if rate is None else f'{rate / 1e6:g} MB/s'}; {configuration.machine}. `{result.command}`"
        ),
    ]
    return "\n\n".join(parts) + "\n"
