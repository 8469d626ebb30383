"""Types with bounds, of what another process may send: a decoder refuses a record whose values are beyond them."""

from typing import Annotated

from msgspec import Meta

MAX_ITEMS = 1 << 20
"""Of a list: more than the tokens of the longest prompt, and than the pages of a buffer that one request takes."""

Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
"""A number of things, of bytes, or of a thing."""
TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]
Name = Annotated[str, Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
"""One line, for logs and people."""
MAX_ADDRESS_CHARS = 65_536
"""Of the address that peers connect to: RDMA transports put their registered memory's description into it."""
Text = Annotated[str, Meta(max_length=65_536)]
