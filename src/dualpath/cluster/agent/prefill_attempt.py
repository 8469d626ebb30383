"""A prefill engine's record of one attempt, and the item that one chunk of it is."""

from dualpath.cluster import messages as m
from dualpath.cluster.attachment import ChunkItem, Owner
from dualpath.core.batching import Chunk
from dualpath.core.vocabulary import Leg


class PrefillAttempt:
    """The agent's record of one attempt on a PE."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.leg: Leg | None = None
        self.pages: list[int] = []
        self.start: m.StartPrefill | None = None
        self.busy = False
        """True while it is reading, connecting or in a batch: its pages can't be freed yet."""
        self.aborted = False
        self.quiet = True
        """False once a transfer has failed half-way: its last bytes may still be on their way."""


def chunk_item(chunk: Chunk, start: m.StartPrefill) -> ChunkItem:
    """Returns what the engine computes for one chunk; a prompt's last chunk draws the next token."""
    first = chunk.past_tokens - start.hit_tokens
    end = first + chunk.new_tokens
    top = start.sampling.prompt_logprobs
    return ChunkItem(
        owner=(chunk.request, chunk.attempt),
        token_ids=start.miss_token_ids[first:end],
        past_tokens=chunk.past_tokens,
        sampling=start.sampling if chunk.last else None,
        generated_tokens=start.generated_tokens,
        next_token_ids=None if top is None else start.miss_token_ids[first + 1 : end + 1],
        top=top or 0,
    )
