"""MLA in its two forms: the same result, and the cheaper one by count."""

import pytest
import torch
from engine_world import DeBuffer, Engines, drain, enter, greedy, prefill, random_tokens

from dualpath.model import LayerwisePrefill, PagedDecode
from dualpath.model.attention import LatentForm, LayerQueries
from dualpath.model.rules import PLAIN, AttentionRules
from dualpath.model.spans import PackedSequence


def test_absorbing_is_for_short_chunks() -> None:
    """DeepSeek-V3: 768 more multiplications a (query, row) pair, against 131,072 to expand a row for one head."""
    deepseek_v3 = LatentForm(heads=128, rank=512, rope_dim=64, nope_dim=128, value_dim=128)
    assert [deepseek_v3.absorbs(n) for n in (1, 170, 171, 4096)] == [True, True, False, False]


@pytest.mark.parametrize("value_dim", [5, 11, 16])
@pytest.mark.parametrize(
    "rules", [PLAIN, AttentionRules(20, sinks=torch.tensor([1.0, 4, -2])), AttentionRules(64, 2.0)]
)
def test_both_forms_agree(value_dim: int, rules: AttentionRules) -> None:
    form = LatentForm(heads=3, rank=12, rope_dim=4, nope_dim=7, value_dim=value_dim)
    generator = torch.Generator().manual_seed(0)

    class Layer:
        kv_b_proj = torch.nn.Linear(12, 3 * (7 + value_dim), bias=False)

    torch.nn.init.normal_(Layer.kv_b_proj.weight, generator=generator)
    rows = torch.randn(100, 16, generator=generator)
    query = torch.randn(3, 9, 11, generator=generator)
    sequence = PackedSequence(0, new_tokens=9, past_tokens=60, extents=((13, 69),))
    asked = LayerQueries(Layer, query, rows, (sequence,), 0.3)
    with torch.no_grad():
        absorbed, expanded = (how(asked, query, sequence, rules) for how in (form._absorbed, form._expanded))
    assert absorbed.shape == (9, 3, value_dim)
    assert torch.allclose(absorbed, expanded, atol=1e-5)


def test_decode_never_expands_its_context(engines_of, monkeypatch: pytest.MonkeyPatch) -> None:
    engines: Engines = engines_of("deepseek_v3")
    prompt = random_tokens(100, seed=8)
    buffer, engine = DeBuffer(engines.model.layout, prompt), LayerwisePrefill(engines.model)
    (first,) = prefill(engine, [buffer], [greedy(10)])
    engine.close()
    decode = PagedDecode(engines.model, blocks=2)
    enter(decode, 0, buffer, first, greedy(10))

    def refuse(*arguments: object) -> None:
        raise AssertionError("decode expanded its context")

    monkeypatch.setattr(LatentForm, "_expanded", refuse)
    assert [first.token.token_id, *drain(decode)[0]] == engines.reference.generate(prompt, 10)
