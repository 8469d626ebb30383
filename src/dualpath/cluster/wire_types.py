"""Types of what control messages carry, with bounds. A decoder refuses a message whose values are beyond them."""

from typing import Annotated

from msgspec import Meta

from dualpath.core.vocabulary import Leg
from dualpath.kv.keys import KEY_BYTES
from dualpath.spec.metrics import Sample

MAX_ITEMS = 1 << 20
"""Of a list: more than the tokens of the longest prompt, and than the pages of a buffer that one request takes."""

Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
"""A number of things, of bytes, or of a thing."""
TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]
Key = Annotated[bytes, Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
"""A `kv.keys.BlockKey`."""
Name = Annotated[str, Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f]*\Z")]
"""One line, for logs and people."""
Address = Annotated[str, Meta(max_length=65_536)]
"""Of a data server; a fabric's may hold metadata."""
Text = Annotated[str, Meta(max_length=65_536)]
Figures = Annotated[
    dict[Annotated[Sample, Meta(max_length=512, pattern=r"\A[ -~]*\Z")], Annotated[float, Meta(ge=-1e18, le=1e18)]],
    Meta(max_length=4_096),
]
"""`spec.metrics.Figures` that can be shown: neither NaN nor infinite."""
Keys = Annotated[list[Key], Meta(max_length=MAX_ITEMS)]
Pages = Annotated[list[Count], Meta(max_length=MAX_ITEMS)]
Tokens = Annotated[list[TokenId], Meta(max_length=MAX_ITEMS)]
Legs = Annotated[list[Leg], Meta(max_length=2)]
