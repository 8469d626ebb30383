"""More bounded types (`spec.bounds`) of what control messages and attachments carry."""

from typing import Annotated

from msgspec import Meta

from dualpath.core.vocabulary import Leg
from dualpath.kv.keys import KEY_BYTES
from dualpath.spec.bounds import MAX_ADDRESS_CHARS, MAX_ITEMS, Count, TokenId
from dualpath.spec.metrics import Sample

Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
"""A `kv.keys.BlockKey`."""
Address = Annotated[str, Meta(max_length=MAX_ADDRESS_CHARS)]
"""Of a data server; a fabric's may hold metadata."""
Figures = Annotated[
    dict[Annotated[Sample, Meta(max_length=512, pattern=r"\A[ -~]*\Z")], Annotated[float, Meta(ge=-1e18, le=1e18)]],
    Meta(max_length=4_096),
]
"""`spec.metrics.Figures` that can be shown: neither NaN nor infinite."""
Keys = Annotated[list[Key], Meta(max_length=MAX_ITEMS)]
Pages = Annotated[list[Count], Meta(max_length=MAX_ITEMS)]
Tokens = Annotated[list[TokenId], Meta(max_length=MAX_ITEMS)]
Legs = Annotated[list[Leg], Meta(max_length=2)]
Logprobs = Annotated[list[Annotated[list[float], Meta(max_length=MAX_ITEMS)]], Meta(max_length=MAX_ITEMS)]
