"""A prefill engine's record of one attempt, and the item that one chunk of it is."""

from dualpath.cluster import messages as m
from dualpath.cluster.engines.host import Owner
from dualpath.core.batching import Chunk
from dualpath.core.vocabulary import Leg
from dualpath.model import PrefillItem, Scored, TokenConstraints


class PrefillAttempt:
    """The PE's record of one attempt."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.leg: Leg | None = None
        self.pages: list[int] = []
        self.start: m.StartPrefill | None = None
        self.constraints: TokenConstraints | None = None
        self.busy = False
        """True while it is reading, connecting or in a batch: its pages can't be freed yet."""
        self.aborted = False
        self.quiet = True
        """False once a transfer has failed half-way: its last bytes may still be on their way."""


def prefill_item(chunk: Chunk, start: m.StartPrefill, constraints: TokenConstraints | None) -> PrefillItem:
    """Returns what the model computes for one chunk; a prompt's last chunk draws the next token."""
    first = chunk.past_tokens - start.hit_tokens
    end = first + chunk.new_tokens
    top = start.sampling.prompt_logprobs
    return PrefillItem(
        token_ids=start.miss_token_ids[first:end],
        past_tokens=chunk.past_tokens,
        sampling=start.sampling if chunk.last else None,
        generated_so_far=start.generated_tokens,
        constraints=constraints if chunk.last else None,
        scored=None if top is None else Scored(start.miss_token_ids[first + 1 : end + 1], top),
    )
