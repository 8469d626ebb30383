"""Log-probabilities of a prompt's tokens: the output head runs in slices, and only what was asked for is kept.

The logits of a whole chunk would take gigabytes (8,192 tokens × 152,000 × 4 bytes). So the decoder runs once, and the
head over a few hundred positions at a time.
"""

import msgspec
import numpy as np
import torch
from torch import Tensor

from dualpath.model.model import LoadedModel

SLICE_ELEMENTS = 2**24
"""Logits computed at a time: 64 MiB of float32."""


class ScoringError(ValueError):
    """This model's prompts can't be scored."""


class PromptScores(msgspec.Struct, frozen=True):
    """Scores at n successive positions, for the tokens that follow them.

    ``token_ids`` and ``logprobs`` are ``[n, 1 + top]``: the token that does follow, then the most likely ones, best
    first. ``ranks`` ``[n]`` says how many tokens are at least as likely as the one that follows (1: it is the best).
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray


@torch.inference_mode()
def score(model: LoadedModel, hidden: Tensor, next_token_ids: list[int], top: int) -> PromptScores:
    """Score `next_token_ids` at the first positions of `hidden` ``[n, width]``."""
    hidden = hidden[: len(next_token_ids)]
    slices = []
    step = max(1, SLICE_ELEMENTS // model.vocab_size)
    for start in range(0, len(next_token_ids), step):
        targets = torch.tensor(next_token_ids[start : start + step], device=hidden.device)[:, None]
        logprobs = model.head(hidden[start : start + step]).float().log_softmax(-1)
        own = logprobs.gather(1, targets)
        best = logprobs.topk(min(top, logprobs.shape[1]))
        slices.append(
            (
                torch.cat([targets, best.indices], 1).int(),
                torch.cat([own, best.values], 1),
                (logprobs >= own).sum(1).int(),
            )
        )
    token_ids, values, ranks = (torch.cat(parts).cpu().numpy() for parts in zip(*slices, strict=True))
    return PromptScores(token_ids, values, ranks)
