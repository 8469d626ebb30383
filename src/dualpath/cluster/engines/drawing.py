"""A drawn token as messages carry it."""

from dualpath.cluster.messages import Draw
from dualpath.model import TokenDraw


def as_draw(token: TokenDraw | None) -> Draw | None:
    return None if token is None else Draw(token.token_id, token.logprobs)
