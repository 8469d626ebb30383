"""The laboratory's results, for people."""

from collections import Counter
from itertools import product

import msgspec
from rich.table import Table

from dualpath.lab.faults.matrix import Combination, Fault, Path, Phase, Victim, combinations, not_in, selected, why_not
from dualpath.lab.faults.real.trial import Trial
from dualpath.lab.faults.sim.episodes import Report


class Cell(msgspec.Struct, frozen=True):
    """A combination, and why it makes no sense or a body leaves it out; empty where it is run."""

    fault: Fault
    victim: Victim
    path: Path
    phase: Phase
    why_not: str
    not_sim: str
    not_real: str


def cells(wanted: dict[str, set[str]]) -> list[Cell]:
    """Returns the cells of the table that `wanted` selects (`matrix.select`)."""
    chosen = [at for at in map(Combination._make, product(Fault, Victim, Path, Phase)) if selected(at, wanted)]
    return [
        Cell(*at, *(reason or "" for reason in (why_not(at), not_in("sim", at), not_in("real", at)))) for at in chosen
    ]


def matrix_table(found: list[Cell]) -> Table:
    """A row for each fault and victim: in which phases it is run, and why not in the others."""
    table = Table(title=f"{sum(not cell.why_not for cell in found)} of {len(found)} combinations make sense")
    for column in ("fault", "victim", "phases (and paths, where they differ)", "why not the others"):
        table.add_column(column, overflow="fold")
    for fault, victim in dict.fromkeys((cell.fault, cell.victim) for cell in found):
        row = [cell for cell in found if (cell.fault, cell.victim) == (fault, victim)]
        runs: dict[str, list[str]] = {}
        for cell in row:
            if not cell.why_not:
                runs.setdefault(cell.phase, []).append(cell.path)
        phases = ", ".join(
            phase if len(paths) == 1 else f"{phase} ({' '.join(paths)})" for phase, paths in runs.items()
        )
        reasons = dict.fromkeys(cell.why_not for cell in row if cell.why_not and "stands for all" not in cell.why_not)
        bodies = {f"not in {body}: {why}" for cell in row for body, why in _left_out(cell)}
        table.add_row(fault, victim, phases or "-", "; ".join([*reasons, *sorted(bodies)]))
    return table


def _left_out(cell: Cell) -> list[tuple[str, str]]:
    return [(body, why) for body, why in (("sim", cell.not_sim), ("real", cell.not_real)) if why and not cell.why_not]


def sim_table(report: Report) -> Table:
    """How often each fault hit a request in each phase; a blank where that makes no sense or is not core's."""
    rate = f"{report.steps / report.seconds:,.0f} a second"
    told = f"{report.steps:,} steps, {report.audited:,} audited, {rate}, seed {report.seed}: nothing broke"
    cells_hit = f"{len(report.hit)} of {sum(1 for _ in combinations('sim'))} combinations hit"
    table = Table("fault", "victim", *Phase, title=f"{told}; {cells_hit}")
    hits: Counter[tuple[Fault, Victim, Phase]] = Counter()
    for at in combinations("sim"):
        hits[at.fault, at.victim, at.phase] += report.hit.get(str(at), 0)
    for fault, victim in dict.fromkeys(key[:2] for key in hits):
        row = [f"{hits[fault, victim, phase]:,}" if (fault, victim, phase) in hits else "" for phase in Phase]
        table.add_row(fault, victim, *row)
    return table


def trial_line(trial: Trial) -> str:
    """One line for one combination."""
    others = ", ".join(f"{n} {text}" for text, n in sorted(trial.others.items()))
    again = f"; served again after {trial.served_again_s:g} s" if trial.served_again_s >= 0 else ""
    noticed = f"; noticed after {trial.noticed_s:g} s" if trial.noticed_s >= 0 else ""
    told = f"{trial.looked_at}; others: {others}{noticed}{again}" if trial.looked_at else ""
    return f"{trial.outcome:<8} {trial.combination}: {'; '.join(filter(None, [*trial.found, told]))}"


def trials_table(trials: list[Trial]) -> Table:
    """What failed, what was skipped and why, and how many held."""
    counts = Counter(trial.outcome for trial in trials)
    table = Table("outcome", "combinations", "why", title=", ".join(f"{n} {what}" for what, n in counts.items()))
    reasons: dict[tuple[str, str], list[str]] = {}
    for trial in trials:
        reasons.setdefault((trial.outcome, "; ".join(trial.found)), []).append(trial.combination)
    for (outcome, why), which in sorted(reasons.items()):
        table.add_row(outcome, ", ".join(which) if outcome != "ok" else str(len(which)), why)
    return table
