"""Layerwise prefill and paged decode of unforked Transformers models, in PyTorch.

It knows no transport, policy or processes: engines give it tokens and callbacks that move bytes. Start with `model.py`.
"""

from dualpath.model.attention import UnsupportedModelError
from dualpath.model.batch import PrefillItem, PrefillOutput, Scored
from dualpath.model.checkpoint import make_checkpoint, model_fingerprint
from dualpath.model.constraints import TokenConstraints
from dualpath.model.decode import PagedDecode
from dualpath.model.decode_sequence import StepOutput
from dualpath.model.device_copies import DeviceCopies, DeviceCopiesError, MemcpyCopies
from dualpath.model.grammar import GrammarError, Grammars
from dualpath.model.layers import LayerIOTimeoutError
from dualpath.model.model import LoadedModel
from dualpath.model.paged import OutOfBlocksError
from dualpath.model.prefill import LayerIO, LayerwisePrefill, PrefillStatistics
from dualpath.model.profiling import profile_attention
from dualpath.model.sampling import NoTokenError, TokenDraw
from dualpath.model.scoring import PromptScores, ScoringError
from dualpath.model.weights import (
    NewWeights,
    WeightsMismatchError,
    read_weights,
    release_weights,
    restore_weights,
    use_weights,
)

__all__ = [
    "DeviceCopies",
    "DeviceCopiesError",
    "GrammarError",
    "Grammars",
    "LayerIO",
    "LayerIOTimeoutError",
    "LayerwisePrefill",
    "LoadedModel",
    "MemcpyCopies",
    "NewWeights",
    "NoTokenError",
    "OutOfBlocksError",
    "PagedDecode",
    "PrefillItem",
    "PrefillOutput",
    "PrefillStatistics",
    "PromptScores",
    "Scored",
    "ScoringError",
    "StepOutput",
    "TokenConstraints",
    "TokenDraw",
    "UnsupportedModelError",
    "WeightsMismatchError",
    "make_checkpoint",
    "model_fingerprint",
    "profile_attention",
    "read_weights",
    "release_weights",
    "restore_weights",
    "use_weights",
]
