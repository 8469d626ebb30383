"""PyTorch engines: layerwise prefill and paged decode of Transformers models, unforked.

Knows nothing of transport, policy or processes: the runtime hands it tokens and the callbacks that move bytes.
"""

from dualpath.engine.attention import UnsupportedModelError
from dualpath.engine.batch import PrefillItem, PrefillOutput
from dualpath.engine.checkpoint import make_checkpoint, model_fingerprint
from dualpath.engine.decode import DecodeEngine, StepOutput
from dualpath.engine.layers import LayerIOTimeoutError
from dualpath.engine.model import LoadedModel
from dualpath.engine.paged import OutOfBlocksError
from dualpath.engine.prefill import LayerIO, LayerwisePrefill, PrefillStatistics
from dualpath.engine.profiling import profile_attention
from dualpath.engine.sampling import TokenDraw

__all__ = [
    "DecodeEngine",
    "LayerIO",
    "LayerIOTimeoutError",
    "LayerwisePrefill",
    "LoadedModel",
    "OutOfBlocksError",
    "PrefillItem",
    "PrefillOutput",
    "PrefillStatistics",
    "StepOutput",
    "TokenDraw",
    "UnsupportedModelError",
    "make_checkpoint",
    "model_fingerprint",
    "profile_attention",
]
