"""Token ids that a replay sends: a function of the seed, the trajectory and the round alone."""

import hashlib

import numpy as np


def append_tokens(seed: int, trajectory: str, round_index: int, count: int, below: int) -> list[int]:
    """Returns the `count` ids in ``[0, below)`` that round `round_index` appends."""
    return _draw(f"{seed}/{trajectory}/{round_index}", count, below)


def fill_tokens(seed: int, trajectory: str, round_index: int, count: int, below: int) -> list[int]:
    """Returns ids that stand for what the round generated, if the server does not return them."""
    return _draw(f"{seed}/{trajectory}/{round_index}/generated", count, below)


def digest(token_ids: list[int]) -> str:
    return hashlib.blake2b(np.array(token_ids, "<u4").tobytes(), digest_size=8).hexdigest()


def _draw(key: str, count: int, below: int) -> list[int]:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    tokens: list[int] = np.random.default_rng(seed).integers(0, below, size=count).tolist()
    return tokens
