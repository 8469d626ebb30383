"""The paper's cache-compute table, cell by cell, and the direction of the ratio."""

import pytest

from dualpath.lab.facts.cache_compute import cache_compute_gb_per_pflop, paper_table
from dualpath.lab.facts.models import MODELS

CELLS = paper_table()


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.model}-{cell.context_tokens}")
def test_every_cell_is_within_three_percent(cell):
    assert abs(cell.error) < 0.03


def test_the_table_has_five_models_at_two_contexts():
    assert len({(cell.model, cell.context_tokens) for cell in CELLS}) == 10


def test_only_mla_differs_from_the_textbook():
    differing = {cell.model for cell in CELLS if cell.textbook_gb_per_pflop != cell.ours_gb_per_pflop}
    assert differing == {"deepseek-v3", "deepseek-v3.2"}


def test_the_ratio_by_hand():
    # 262,144 bytes × 1,000 tokens over 10 tokens × (2·params + 4·64 layers·40 heads·128 · 1,000)
    flops = 10 * (2 * MODELS["qwen2.5-32b"].active_parameters + 4 * 64 * 40 * 128 * 1000)
    assert cache_compute_gb_per_pflop(MODELS["qwen2.5-32b"], 1000, 10) == pytest.approx(
        262_144_000 / 1e9 * 1e15 / flops
    )


def test_half_the_append_doubles_the_ratio():
    model = MODELS["gpt-oss-120b"]
    assert cache_compute_gb_per_pflop(model, 30_000, 100) == 2 * cache_compute_gb_per_pflop(model, 30_000, 200)


@pytest.mark.parametrize(("context", "append"), [(0, 429), (100, 0)])
def test_empty_turns_are_refused(context, append):
    with pytest.raises(ValueError, match="must be above zero"):
        cache_compute_gb_per_pflop(MODELS["ds-27b"], context, append)
