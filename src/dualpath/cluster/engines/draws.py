"""The engine's drawn token as a control message."""

from dualpath.cluster.messages import Draw
from dualpath.model import TokenDraw


def draw_message(draw: TokenDraw) -> Draw:
    """The chosen token's log-probability comes first, then the most likely ones'."""
    if draw.logprob is None:
        return Draw(draw.token_id)
    return Draw(draw.token_id, [(draw.token_id, draw.logprob), *draw.top])
