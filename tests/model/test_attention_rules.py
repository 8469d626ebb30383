"""Sliding windows, sinks and capped scores: what `rules` computes, against the definition and against Transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import WINDOWED
from engine_world import PLACES, Buffers, Engines, buffers_of, packed_logits, random_tokens
from transformers import AutoModelForCausalLM

from dualpath.model import LoadedModel, release_weights, restore_weights, rules
from dualpath.model.attention import GroupedForm, LayerQueries
from dualpath.model.rules import AttentionRules
from dualpath.model.spans import PackedSequence

HEADS, KV_HEADS, DIM = 6, 3, 8
WINDOW = 50


def by_definition(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, ruled: AttentionRules
) -> torch.Tensor:
    """``[heads, n, dim]`` over ``[heads, rows, dim]``, in float64; the queries are the last n tokens."""
    n, rows = query.shape[1], keys.shape[1]
    scores = query.double() @ keys.double().transpose(1, 2) * scale
    if ruled.softcap is not None:
        scores = ruled.softcap * torch.tanh(scores / ruled.softcap)
    behind = torch.arange(rows - n, rows)[:, None] - torch.arange(rows)[None]
    scores = scores.masked_fill((behind < 0) | (behind >= (ruled.window_tokens or rows)), -torch.inf)
    sinks = torch.full((len(query),), -torch.inf) if ruled.sinks is None else ruled.sinks
    scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, n, 1)], dim=-1)
    return scores.softmax(-1)[..., :-1] @ values.double()


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 50, 64, 199, 200, 1000])
@pytest.mark.parametrize(("new", "extents"), [*PLACES, (200, ((20, 200),))])
def test_rules_compute_their_definition(
    new: int,
    extents: tuple[tuple[int, int], ...],
    window: int | None,
    sinks: bool,
    softcap: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that no query may see are NaN: reading one would show, even under a mask."""
    monkeypatch.setattr(rules, "BLOCK_TOKENS", 16)
    generator = torch.Generator().manual_seed(new)
    rows = torch.randn(260, 2 * KV_HEADS * DIM, generator=generator)
    query = torch.randn(HEADS, new, DIM, generator=generator) * 3
    total = sum(count for _, count in extents)
    ruled = AttentionRules(window, softcap, 2 * torch.randn(HEADS, generator=generator) if sinks else None)
    order = torch.cat([torch.arange(first, first + count) for first, count in extents])
    visible = rows[order]
    unseen = torch.ones(260, dtype=torch.bool)
    unseen[order[max(0, total - new - (window or total) + 1) :]] = False
    rows[unseen] = torch.nan
    asked = LayerQueries(None, query, rows, (PackedSequence(0, new, total - new, extents),), 0.4)
    out = GroupedForm(HEADS, KV_HEADS, DIM).attend(asked, ruled)
    keys, values = visible.view(total, 2, KV_HEADS, DIM).permute(1, 2, 0, 3).repeat_interleave(2, dim=1)
    expected = by_definition(query, keys, values, 0.4, ruled)
    assert torch.allclose(out.transpose(0, 1).double(), expected, atol=4e-6)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_token_in_half_precision(sinks: bool, softcap: float | None) -> None:
    """Over three runs of rows, of which the window cuts the first; in the precision that bfloat16 has."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(260, 2 * KV_HEADS * DIM, generator=generator).bfloat16()
    query = torch.randn(HEADS, 1, DIM, generator=generator).bfloat16()
    ruled = AttentionRules(90, softcap, 2 * torch.randn(HEADS, generator=generator) if sinks else None)
    sequence = PackedSequence(0, 1, 127, ((192, 64), (0, 50), (100, 14)))
    form = GroupedForm(HEADS, KV_HEADS, DIM)
    paged = form.paged(torch.zeros_like(rows))
    paged.copy_(rows.view(paged.shape))
    out = form.attend(LayerQueries(None, query, paged, (sequence,), 0.4), ruled)
    visible = torch.cat([rows[first : first + count] for first, count in sequence.extents])
    keys, values = visible.view(-1, 2, KV_HEADS, DIM).permute(1, 2, 0, 3).repeat_interleave(2, dim=1)
    assert torch.allclose(out.transpose(0, 1).double(), by_definition(query, keys, values, 0.4, ruled), atol=0.02)


@pytest.mark.parametrize("scores", [1, 2**12, 2**24])
def test_bounded_pieces_do_not_change_the_result(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of other devices and of capped scores, with few and with many scores at a time."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(400, 2 * KV_HEADS * DIM, generator=generator)
    query = torch.randn(HEADS, 300, DIM, generator=generator)
    sequence = PackedSequence(0, 300, 90, ((10, 390),))
    form, ruled = GroupedForm(HEADS, KV_HEADS, DIM), AttentionRules(200, 3.0)
    asked = LayerQueries(None, query, rows, (sequence,), 0.4)
    expected = form.attend(asked, ruled)
    monkeypatch.setattr(rules, "SCORES", scores)
    monkeypatch.setattr(rules, "BLOCK_TOKENS", 64)
    assert torch.allclose(form.attend(asked, ruled), expected, atol=2e-6)


def test_a_window_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="a sliding window of 0 tokens"):
        AttentionRules(window_tokens=0)


@pytest.fixture(params=WINDOWED)
def windowed(request: pytest.FixtureRequest, engines_of: Callable[[str], Engines]) -> Engines:
    return engines_of(request.param)


@pytest.fixture
def eager(windowed: Engines, checkpoint: Callable[[str], Path]) -> Callable[[list[int]], torch.Tensor]:
    """Logits of a whole prompt, ``[tokens, vocabulary]``, by Transformers' plainest attention."""
    path = checkpoint(windowed.architecture)
    network = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.inference_mode()
    def logits(prompt: list[int]) -> torch.Tensor:
        return network(input_ids=torch.tensor([prompt])).logits[0]

    return logits


@pytest.mark.parametrize("tokens", [1, 40, WINDOW, WINDOW + 1, 3 * WINDOW])
def test_logits_are_those_of_eager_attention(
    windowed: Engines, eager: Callable[[list[int]], torch.Tensor], tokens: int
) -> None:
    model, prompt = windowed.model, random_tokens(tokens, seed=5)
    packed = Buffers(model, buffers_of(model, tokens), [(0, tokens, ((0, tokens),))])
    logits = model.forward(packed, prompt, list(range(tokens)), list(range(tokens)))
    assert torch.allclose(logits, eager(prompt), atol=1e-4, rtol=0)


def test_packed_chunks_over_cached_rows(windowed: Engines, eager: Callable[[list[int]], torch.Tensor]) -> None:
    """Three prompts, in passes that hold chunks of all three; each has its own rows."""
    model = windowed.model
    prompts = [random_tokens(count, seed=count) for count in (190, 35, 120)]
    found = packed_logits(model, prompts, (7, 200, 240), (20, 21, 90, 190))
    for prompt, logits in zip(prompts, found, strict=True):
        assert torch.allclose(logits, eager(prompt), atol=1e-4, rtol=0)


def test_decode_over_fragments(windowed: Engines, eager: Callable[[list[int]], torch.Tensor]) -> None:
    """Two sequences of one step; the rows of the longer one lie in three runs, out of order."""
    model = windowed.model
    long, short = random_tokens(140, seed=1), random_tokens(20, seed=2)
    runs: dict[int, tuple[tuple[int, int], ...]] = {0: ((192, 64), (0, 64), (70, 12)), 1: ((100, 20),)}
    buffers, whole = buffers_of(model, 260), buffers_of(model, 160)
    model.forward(
        Buffers(model, whole, [(0, 140, ((0, 140),)), (0, 20, ((140, 20),))]),
        long + short,
        [*range(140), *range(20)],
        [],
    )
    rows = [row for extents in runs.values() for first, count in extents for row in range(first, first + count)]
    for source, target in zip(whole, buffers, strict=True):
        target[rows] = source
        target[[81, 119]] = torch.nan  # the step's own rows
    packed = Buffers(model, buffers, [(139, 1, runs[0]), (19, 1, runs[1])])
    logits = model.forward(packed, [long[-1], short[-1]], [139, 19], [0, 1])
    assert torch.allclose(logits, torch.stack([eager(long)[-1], eager(short)[-1]]), atol=1e-4, rtol=0)


def test_half_precision_stays_near_full(checkpoint: Callable[[str], Path]) -> None:
    """Sinks and masks are merged with outputs of another type than theirs."""
    for architecture in ("gpt_oss", "gemma2"):
        model = LoadedModel.load(checkpoint(architecture), dtype="bfloat16")
        buffers = [torch.zeros(120, elements, dtype=model.dtype) for elements in model.row_elements]
        logits = model.forward(
            Buffers(model, buffers, [(0, 120, ((0, 120),))]), random_tokens(120, seed=3), list(range(120)), [119]
        )
        assert logits.isfinite().all()


def test_the_head_is_that_of_the_weights_that_serve(checkpoint: Callable[[str], Path]) -> None:
    """Also after the deepest sleep, when the network is another."""
    path = checkpoint("gemma2")
    model = LoadedModel.load(path)
    hidden = torch.randn(3, model.network.config.hidden_size)
    before = model.head(hidden)
    release_weights(model, keep=False)
    restore_weights(model, path, path)
    assert torch.equal(model.head(hidden), before)
    with torch.no_grad():
        model.network.get_output_embeddings().weight.mul_(3)
    assert not torch.allclose(model.head(hidden), before)


def test_caps_and_scales_of_logits_are_the_heads_too(windowed: Engines) -> None:
    """Also where logits are so large that a cap changes them."""
    model, network = windowed.model, windowed.reference.network
    assert model.scores_prompts
    ids = torch.tensor([random_tokens(30, seed=4)])
    with torch.inference_mode():
        hidden = 50 * network.get_decoder()(ids).last_hidden_state[0]
        plain = network.get_output_embeddings()(hidden)
        logits = model.head(hidden)
    config = network.config
    cap, scale = getattr(config, "final_logit_softcapping", None), getattr(config, "logit_scale", 1.0)
    expected = cap * torch.tanh(plain / cap) if cap else plain * scale
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(logits, plain, rtol=0.1) or windowed.architecture not in ("gemma2", "cohere2")
