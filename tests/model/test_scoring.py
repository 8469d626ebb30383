"""Log-probabilities of prompt tokens equal those of one plain forward of Transformers, however the prompt is cut."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from engine_world import BufferIO, DeBuffer, Engines, greedy, random_tokens

from dualpath.model import LayerwisePrefill, PrefillItem, Scored, scoring

PROMPT = random_tokens(150, seed=5)


def expected(engines: Engines, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of tokens 1…: their log-probabilities, their ranks, and the best ones'."""
    with torch.inference_mode():
        logprobs = engines.reference.network(torch.tensor([PROMPT])).logits[0, :-1].float().log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(PROMPT[1:])[:, None])
    return own[:, 0].numpy(), (logprobs >= own).sum(1).numpy(), logprobs.topk(top).values.numpy()


@pytest.mark.parametrize("chunk", [150, 64, 37])
def test_scores_are_those_of_a_plain_forward(
    engines: Engines,
    prefill_of: Callable[..., LayerwisePrefill],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
) -> None:
    """In chunks, in slices of ten positions, and beside a prompt that is not scored."""
    monkeypatch.setattr(scoring, "SLICE_ELEMENTS", 10 * engines.model.vocab_size)
    engine = prefill_of(engines.model)
    scored, plain = DeBuffer(engines.model.layout, PROMPT), DeBuffer(engines.model.layout, random_tokens(20, seed=6))
    found = []
    for start in range(0, len(PROMPT), chunk):
        end = min(start + chunk, len(PROMPT))
        last = end == len(PROMPT)
        items = [
            PrefillItem(plain.prompt, 0, greedy(4)),
            PrefillItem(
                PROMPT[start:end], start, greedy(4) if last else None, scored=Scored(PROMPT[start + 1 : end + 1], 3)
            ),
        ]
        beside, output = engine.run(items, BufferIO([plain, scored], items))
        assert beside.scores is None and beside.token is not None
        assert beside.token.token_id == engines.reference.generate(plain.prompt, 1)[0]
        assert output.error is None
        found.append(output.scores)
    own, ranks, best = expected(engines, 3)
    logprobs = np.concatenate([scores.logprobs for scores in found if scores])
    assert np.concatenate([s.token_ids for s in found if s])[:, 0].tolist() == PROMPT[1:]
    assert np.allclose(logprobs[:, 0], own, atol=2e-4)
    assert np.allclose(logprobs[:, 1:], best, atol=2e-4)
    assert (np.concatenate([s.ranks for s in found if s]) == ranks).mean() > 0.98  # near ties may swap
    assert output.token is not None
    assert output.token.token_id == engines.reference.generate(PROMPT, 1)[0]


def test_a_model_that_changes_its_head_s_logits_is_known(qwen: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualpath.model.model import _Probe
    from dualpath.model.seam_checks import head_alone

    assert qwen.model.scores_prompts
    forward = qwen.model.forward
    monkeypatch.setattr(qwen.model, "forward", lambda *args: forward(*args) * 0.5)
    assert not head_alone(qwen.model, _Probe(qwen.model))
