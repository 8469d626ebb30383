"""The cache-compute ratio: gigabytes of KV to load per PFLOP of prefill (paper §1's table).

An agent's turn loads the KV of a context of n tokens and computes a appended ones::

    GB/PFLOP = B·n / (a · (F + A(n)))      B KV bytes a token, F dense FLOPs a token, A(n) attention FLOPs at context n

The higher it is, the more a storage NIC must give a GPU. The table keeps two conventions of the paper: B leaves out
sparse attention's index keys, and MLA takes 1,920 FLOPs per head and pair. That number is *fitted* to the paper's
DeepSeek-V3 row: computing on the latents takes 2·(576 + 512) = 2,176, which is 10 % off there; the field
`textbook_gb_per_pflop` has it.
"""

import msgspec

from dualpath.lab.facts.model_spec import ModelSpec
from dualpath.lab.facts.models import MODELS

PAPER_APPEND_TOKENS = 429
PAPER_CONTEXT_TOKENS = (16_384, 65_536)
PAPER_GB_PER_PFLOP: dict[str, tuple[float, float]] = {
    "qwen2.5-32b": (117, 267),
    "gpt-oss-120b": (47, 95),
    "qwen3-235b-a22b": (39, 60),
    "deepseek-v3.2": (13, 36),
    "deepseek-v3": (4.8, 5.8),
}
"""The paper's values at the two contexts, as printed."""
PAPER_MLA_FLOPS_PER_HEAD_PAIR = 1920
"""Fitted, see above."""


class CacheComputeCell(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one context."""

    model: str
    context_tokens: int
    theirs_gb_per_pflop: float
    ours_gb_per_pflop: float
    """Ratio in the paper's conventions."""
    textbook_gb_per_pflop: float
    """Ratio with the FLOPs that MLA takes on its latents."""

    @property
    def error(self) -> float:
        """Ours over theirs, less one."""
        return self.ours_gb_per_pflop / self.theirs_gb_per_pflop - 1


def cache_compute_gb_per_pflop(
    model: ModelSpec, context_tokens: int, append_tokens: float = PAPER_APPEND_TOKENS, kv_dtype: str | None = None
) -> float:
    """GB (1e9 bytes) to load per PFLOP of prefill. Every appended token is taken to see the whole context, as above."""
    if context_tokens < 1 or append_tokens <= 0:
        raise ValueError(f"context ({context_tokens}) and append ({append_tokens}) must be above zero tokens")
    flops = append_tokens * (model.dense_flops_per_token + model.attention_flops(context_tokens - 1, 1))
    kv = model.kv(kv_dtype, index_keys=False)
    return (kv.seen_bytes(0, context_tokens, context_tokens) / 1e9) / (flops / 1e15)


def paper_table() -> list[CacheComputeCell]:
    """Returns every cell of the paper's table."""
    return [
        CacheComputeCell(
            model=name,
            context_tokens=context_tokens,
            theirs_gb_per_pflop=theirs,
            ours_gb_per_pflop=cache_compute_gb_per_pflop(_as_counted_by_paper(MODELS[name]), context_tokens),
            textbook_gb_per_pflop=cache_compute_gb_per_pflop(MODELS[name], context_tokens),
        )
        for name, row in PAPER_GB_PER_PFLOP.items()
        for context_tokens, theirs in zip(PAPER_CONTEXT_TOKENS, row, strict=True)
    ]


def _as_counted_by_paper(model: ModelSpec) -> ModelSpec:
    half = PAPER_MLA_FLOPS_PER_HEAD_PAIR // 4
    runs = (
        msgspec.structs.replace(run, score_dim=half, value_dim=half) if run.score_dim != run.value_dim else run
        for run in model.attention
    )
    return msgspec.structs.replace(model, attention=tuple(runs))
