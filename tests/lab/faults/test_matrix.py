"""The table: what makes sense, and a reason for everything else."""

from itertools import product

import pytest

from dualpath.lab.faults.matrix import (
    Combination,
    Fault,
    Path,
    Phase,
    Victim,
    combinations,
    not_in,
    sample,
    select,
    selected,
    why_not,
)
from dualpath.lab.faults.tables import cells

ALL = [Combination(*names) for names in product(Fault, Victim, Path, Phase)]


def test_every_cell_makes_sense_or_has_a_reason() -> None:
    sound = set(combinations())
    assert {at for at in ALL if why_not(at) is None} == sound
    assert all(len(why_not(at) or "") > 10 for at in ALL if at not in sound)


@pytest.mark.parametrize("body", ["sim", "real"])
def test_what_one_body_leaves_out_the_other_runs(body: str) -> None:
    other = {"sim": "real", "real": "sim"}[body]
    left_out = set(combinations()) - set(combinations(body))
    assert left_out <= set(combinations(other))
    assert all(not_in(body, at) for at in left_out)


def test_every_fault_victim_path_and_phase_is_in_both_bodies_where_it_can_be() -> None:
    for body in ("sim", "real"):
        for kind, values in (("fault", Fault), ("victim", Victim), ("path", Path), ("phase", Phase)):
            seen = {getattr(at, kind) for at in combinations(body)}
            missing = {"sim": {Fault.FULL, Victim.COORDINATOR}, "real": set()}[body]
            assert set(values) - seen <= missing, (body, kind)


@pytest.mark.parametrize(
    ("text", "makes_sense"),
    [
        (("kill", "DE", "PE", "decoding"), True),
        (("kill", "DE", "split", "decoding"), False),  # the path is over
        (("kill", "PE", "PE", "persisting"), False),
        (("hung", "store", "DE", "reading"), True),
        (("full", "store", "PE", "persisting"), True),
        (("full", "store", "PE", "reading"), False),
        (("partition_to", "link", "split", "shipping"), True),
        (("stop", "client", "PE", "queued"), False),
        (("stop", "coordinator", "PE", "decoding"), True),
        (("corrupt", "agent", "PE", "reading"), False),
    ],
)
def test_some_cells_by_hand(text: tuple[str, str, str, str], makes_sense: bool) -> None:
    fault, victim, path, phase = text
    at = Combination(Fault(fault), Victim(victim), Path(path), Phase(phase))
    assert (why_not(at) is None) is makes_sense


def test_a_sample_takes_of_each_fault_and_victim_before_it_takes_of_one_again() -> None:
    cells = list(combinations("real"))
    kinds = {at[:2] for at in cells}
    for seed in range(3):
        drawn = sample(cells, len(kinds) + 5, seed)
        assert {at[:2] for at in drawn} == kinds
        assert drawn == [at for at in cells if at in set(drawn)] and len(drawn) == len(kinds) + 5
    assert sample(cells, 10, 1) == sample(cells, 10, 1) != sample(cells, 10, 2)
    assert sample(cells, 10_000, 1) == cells


def test_a_selection_takes_names_and_refuses_what_is_none() -> None:
    wanted = select("fault=kill,victim=DE,victim=PE")
    chosen = [at for at in combinations() if selected(at, wanted)]
    assert {(at.fault, at.victim) for at in chosen} == {(Fault.KILL, Victim.DE), (Fault.KILL, Victim.PE)}
    assert select("") == {}
    for wrong in ("fault=rain", "colour=red", "kill"):
        with pytest.raises(ValueError, match="selects nothing; write fault=kill"):
            select(wrong)


def test_the_cells_for_people_are_those_of_the_table() -> None:
    assert sum(not cell.why_not for cell in cells({})) == sum(1 for _ in combinations())
