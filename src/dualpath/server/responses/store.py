"""Responses that clients may ask for again, or continue, by their ids: in memory, within a bound of bytes."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from dualpath.server.errors import ApiError
from dualpath.server.responses.items import Item


def response_id(key: str) -> str:
    return f"resp_{key}"


def item_id(prefix: str, key: str, index: int) -> str:
    """Returns the id of an output item of the response with that key."""
    return f"{prefix}_{key}_{index}"


class Owner(NamedTuple):
    """Who may have a response: who has the API key, and, to continue it, the same cache salt."""

    key_digest: bytes
    cache_salt: str | None = None


class Stored(NamedTuple):
    owner: Owner
    body: bytes
    input: bytes
    output: bytes
    previous: str | None

    @property
    def size_bytes(self) -> int:
        return len(self.body) + len(self.input) + len(self.output)


class ResponseStore:
    """The most recently used responses. Each has only its own items; a conversation is a chain of responses."""

    def __init__(self, max_bytes: int, max_responses: int) -> None:
        self._max_bytes = max_bytes
        self._max_responses = max_responses
        self._responses: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def put(self, key: str, owner: Owner, body: bytes, own: Sequence[Item], output: Any, previous: str | None) -> None:
        encode = msgspec.json.encode
        stored = Stored(owner, body, encode(own), encode(output), previous)
        self._responses[response_id(key)] = stored
        self._bytes += stored.size_bytes
        while self._bytes > self._max_bytes or len(self._responses) > self._max_responses:
            self._bytes -= self._responses.popitem(last=False)[1].size_bytes

    def get(self, given_id: str, key_digest: bytes) -> bytes:
        """Returns the body. Raises ApiError (404)."""
        return self._find(given_id, key_digest).body

    def delete(self, given_id: str, key_digest: bytes) -> None:
        self._bytes -= self._find(given_id, key_digest).size_bytes
        del self._responses[given_id]

    def conversation(self, last_id: str | None, owner: Owner) -> list[Item]:
        """Returns all items up to the end of that response. Raises ApiError (400)."""
        chain: list[Stored] = []
        link = last_id
        while link is not None:
            stored = self._responses.get(link)
            if stored is None or stored.owner != owner:
                raise ApiError(
                    400,
                    f"Previous response with id {link!r} not found: it was never stored, was deleted, or made room for "
                    "newer ones. Send the whole conversation as input",
                    code="previous_response_not_found",
                    param="previous_response_id",
                )
            chain.append(stored)
            link = stored.previous
        link = last_id
        for stored in chain:  # the newest first, so that a conversation's end goes before its beginning
            self._responses.move_to_end(str(link))
            link = stored.previous
        return [item for stored in reversed(chain) for item in _items(stored.input) + _items(stored.output)]

    def item(self, wanted: str, owner: Owner) -> Item | None:
        """Returns the output item with that id."""
        _prefix, _, rest = wanted.partition("_")
        stored = self._responses.get(response_id(rest.partition("_")[0]))
        if stored is None or stored.owner != owner:
            return None
        return next((item for item in _items(stored.output) if item.id == wanted), None)

    def _find(self, given_id: str, key_digest: bytes) -> Stored:
        stored = self._responses.get(given_id)
        if stored is None or stored.owner.key_digest != key_digest:
            raise ApiError(404, f"Response with id {given_id!r} not found.", code="not_found")
        self._responses.move_to_end(given_id)
        return stored


def _items(encoded: bytes) -> list[Item]:
    return msgspec.json.decode(encoded, type=list[Item])
