"""The OpenAI-compatible server of a cluster (`cluster.generator.Generator`). Start with `app.py`."""

from dualpath.server.app import create_app
from dualpath.server.codec import load_tokenizer
from dualpath.server.http import serve
from dualpath.server.service import ServerLimits

__all__ = ["ServerLimits", "create_app", "load_tokenizer", "serve"]
