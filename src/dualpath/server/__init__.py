"""The OpenAI-compatible server of a cluster (`cluster.generator.Generator`). Start with `app.py`."""

from dualpath.server.app import create_app
from dualpath.server.codec import load_tokenizer
from dualpath.server.limits import ServerLimits
from dualpath.server.listening import bind, serve

__all__ = ["ServerLimits", "bind", "create_app", "load_tokenizer", "serve"]
