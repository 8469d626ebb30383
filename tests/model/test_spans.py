"""Attention pieced together from spans is attention over the whole."""

import pytest
import torch
from engine_world import PLACES

from dualpath.model import spans
from dualpath.model.attention import GroupedForm, LayerQueries
from dualpath.model.spans import PackedSequence


def plain(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """``[heads, n, dim]`` over ``[heads, rows, dim]``; query i of n sees all but the last n − 1 − i rows."""
    n, rows = query.shape[1], keys.shape[1]
    scores = query.double() @ keys.double().transpose(1, 2) * scale
    seen = torch.arange(rows)[None] <= torch.arange(rows - n, rows)[:, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values.double()


@pytest.mark.parametrize(("new", "extents"), PLACES)
@pytest.mark.parametrize("by_matmul", [False, True])
@pytest.mark.parametrize("paged", [False, True])
def test_any_extents_give_plain_attention(
    new: int, extents: tuple[tuple[int, int], ...], by_matmul: bool, paged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU's kernel and with the one for other devices; rows as prefill keeps them, and as decode does."""
    if by_matmul:
        monkeypatch.setattr(spans, "_partial", spans.partial_by_matmul)
    heads, kv_heads, dim = 6, 3, 8
    form = GroupedForm(heads, kv_heads, dim)
    generator = torch.Generator().manual_seed(new)
    rows = torch.randn(260, 2 * kv_heads * dim, generator=generator)
    query = torch.randn(heads, new, dim, generator=generator) * 3
    total = sum(count for _, count in extents)
    sequence = PackedSequence(0, new, total - new, extents)
    kept = rows
    if paged:
        kept = form.paged(torch.zeros_like(rows))
        kept.copy_(rows.view(kept.shape))
    out = form.attend(LayerQueries(None, query, kept, (sequence,), 0.4))
    visible = torch.cat([rows[first : first + count] for first, count in extents])
    keys, values = visible.view(total, 2, kv_heads, dim).permute(1, 2, 0, 3).repeat_interleave(2, dim=1)
    assert torch.allclose(out.transpose(0, 1).double(), plain(query, keys, values, 0.4), atol=2e-6)


def test_merging_survives_scores_of_any_size() -> None:
    parts = [(torch.full((1, 2), 1.0), torch.tensor([900.0])), (torch.full((1, 2), 5.0), torch.tensor([-900.0]))]
    assert spans.merge(parts).tolist() == [[1.0, 1.0]]
