"""One turn of one agent on its way through the cluster, and what it was seen to take."""

from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, Leg
from dualpath.prediction.processes import Signal


class Turn:
    """From the client's sending to the end of its answer. Times in nanoseconds of virtual time, 0 where not yet."""

    def __init__(
        self, request: int, trajectory: str, round_index: int, prompt_tokens: int, hit_tokens: int, generate_tokens: int
    ) -> None:
        self.request = request
        self.trajectory = trajectory
        self.round_index = round_index
        self.prompt_tokens = prompt_tokens
        self.hit_tokens = hit_tokens
        self.generate_tokens = generate_tokens
        self.legs: list[Leg] = []
        self.prefill_engine: EngineId = -1
        self.decode_engine: EngineId = -1
        self.generated_tokens = 0
        self.ended = Signal()
        """The client has the end of the stream."""
        self.sent_ns = 0
        # What the client sees.
        self.first_token_ns = self.second_token_ns = self.last_token_ns = 0
        # What the server says (`Timings`).
        self.arrived_ns = self.placed_ns = self.allocated_ns = self.read_ns = 0
        self.first_out_ns = self.last_out_ns = 0

    @property
    def context_tokens(self) -> int:
        """Tokens it sees when it generates the next one."""
        return self.prompt_tokens + self.generated_tokens

    @property
    def hit_blocks(self) -> int:
        return self.hit_tokens // BLOCK_TOKENS

    @property
    def prompt_blocks(self) -> int:
        """Pages of the DE buffer that the prompt takes, the last perhaps in part."""
        return -(-self.prompt_tokens // BLOCK_TOKENS)

    @property
    def full_blocks(self) -> int:
        """Blocks of the prompt that are full, and so have a key."""
        return self.prompt_tokens // BLOCK_TOKENS


def whole_blocks(tokens: int) -> int:
    """Tokens of the whole blocks among `tokens`."""
    return max(0, tokens) // BLOCK_TOKENS * BLOCK_TOKENS
