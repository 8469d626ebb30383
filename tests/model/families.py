"""Every causal language model of the installed Transformers, tried: tiny, seeded, against its own eager attention.

``PYTHONPATH=src python tests/model/families.py > docs/models.md`` writes the table; `test_families` holds it to this.
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import msgspec
import torch
import transformers
from engine_world import Buffers, buffers_of, packed_logits, random_tokens
from tiny_families import FIELDS, NotTinyError, tiny_network
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from dualpath.kv.refusals import refusal
from dualpath.model import LoadedModel, UnsupportedModelError
from dualpath.model.attention import IMPLEMENTATION, LatentForm
from dualpath.model.rules import PLAIN, AttentionRules
from dualpath.model.sparse import SelectedLatentForm

ATOL = 1e-4


class Tried(msgspec.Struct):
    """What came of one family: it is served, refused for a `reason`, or could not be made tiny, for a `reason`."""

    model_type: str
    outcome: str
    attention: str = ""
    keeps: str = ""
    reason: str = ""
    error: float = 0.0
    """The largest difference to the eager logits."""


def tried(model_type: str) -> Tried:
    """Makes the family's tiny model and compares it. Raises AssertionError when it is served wrongly."""
    reason = _refused_by_config(model_type)
    if reason is not None:
        return Tried(model_type, "refused", reason=reason)
    try:
        network = tiny_network(model_type)
    except NotTinyError as error:
        return Tried(model_type, "not tried", reason=str(error))
    network.set_attn_implementation(IMPLEMENTATION)
    try:
        model = LoadedModel(network, ())
    except UnsupportedModelError as error:
        return Tried(model_type, "refused", reason=str(error))
    prompts = [random_tokens(tokens, seed=tokens, vocabulary=64) for tokens in (24, 15)]
    found = packed_logits(model, prompts, (3, 30), (9, 20, 21, 22, 23, 24))
    attention = _attention(model)
    network.set_attn_implementation("eager")
    with torch.inference_mode():
        eager = [network(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]
    error = max(float((a - b).abs().max()) for a, b in zip(found, eager, strict=True))
    return Tried(model_type, "served", attention, _keeps(model), error=error)


def _refused_by_config(model_type: str) -> str | None:
    with suppress(Exception):
        return refusal(CONFIG_MAPPING[model_type](**FIELDS.get(model_type, {})))
    return refusal(SimpleNamespace(model_type=model_type))


class _Noting(Buffers):
    """Keeps the rules that layers attend by."""

    noted: list[AttentionRules]

    def attend(
        self, module: Any, query: Any, scale: float, rules: AttentionRules = PLAIN, selection: Any = None
    ) -> Any:
        self.noted.append(rules)
        return super().attend(module, query, scale, rules, selection)


def _attention(model: LoadedModel) -> str:
    """Returns the kind of heads, and what layers do besides plain causal attention."""
    packed = _Noting(model, buffers_of(model, 2), [(0, 2, ((0, 2),))])
    packed.noted = []
    model.forward(packed, [0, 1], [0, 1], [])
    form = model.forms[0]
    kinds = ["MLA"] if isinstance(form, LatentForm) else ["MHA" if form.heads == form.kv_heads else "GQA"]
    if isinstance(form, SelectedLatentForm):
        kinds.append("top-k by an indexer")
    windows = [rules.window_tokens is not None for rules in packed.noted]
    if any(windows):
        kinds.append("windows" if all(windows) else "windows in some layers")
    if any(rules.sinks is not None for rules in packed.noted):
        kinds.append("sinks")
    if any(rules.softcap is not None for rules in packed.noted):
        kinds.append("capped scores")
    return ", ".join(kinds)


def _keeps(model: LoadedModel) -> str:
    names = dict.fromkeys(part.name for kind in model.layout.kinds for part in kind.parts)
    return ", ".join(names)


def all_tried() -> list[Tried]:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with warnings.catch_warnings(action="ignore"):
        return [tried(model_type) for model_type in sorted(FAMILIES)]


def document(families: list[Tried]) -> str:
    """Returns docs/models.md."""
    served = [f"| {family.model_type} | {family.attention} | {family.keeps} |" for family in families if family.keeps]
    sections = {"served": served}
    for outcome in ("refused", "not tried"):
        by_reason: dict[str, list[str]] = {}
        for family in families:
            if family.outcome == outcome:
                by_reason.setdefault(_generic(family), []).append(family.model_type)
        sections[outcome] = [f"| {', '.join(names)} | {reason} |" for reason, names in sorted(by_reason.items())]
    counts = {outcome: sum(family.outcome == outcome for family in families) for outcome in sections}
    tables = {name.replace(" ", "_"): "\n".join(rows) for name, rows in sections.items()}
    numbers = {f"{name.replace(' ', '_')}_count": count for name, count in counts.items()}
    return DOCUMENT.format(**tables, **numbers, version=transformers.__version__, families=len(families))


def _generic(family: Tried) -> str:
    """Returns the reason without the family's own names, so that families with the same reason stand together."""
    without_names = _CLASS.sub("…", family.reason.removeprefix(f"{family.model_type}: "))
    return without_names.removeprefix(f"{family.model_type} ").replace("|", "/")


_CLASS = re.compile(r"\b[A-Z]\w*(?:Attention|CausalLM|LMHeadModel|Decoder)\b")

DOCUMENT = """# Models

Every family of causal language models in Transformers {version}, tried: of {families}, {served_count} are served,
{refused_count} are refused, and {not_tried_count} could not be made tiny here. A checkpoint's family is the
`model_type` of its `config.json`. A refused one is refused when it is loaded, with that reason; where its config says
enough, before any engine starts.

`PYTHONPATH=src python tests/model/families.py > docs/models.md` makes this page, and a test holds it to what the code
does. Each family gets a tiny seeded model with layers of every kind that its config class knows by default. Two prompts
share passes that prefill them in chunks over cached rows, then decode. The logits must be those of Transformers' eager
attention, within 1e-4 in float32. What else a family can be configured to do is checked when a checkpoint is loaded:
each layer's attention is compared with plain attention over what the model itself passes on
([engine seam](design/engine-seam.md)).

## Served

| model_type | attention | a layer keeps, for each token |
|---|---|---|
{served}

GQA: query heads share KV heads; MHA: each has its own; MLA: all share a latent. Windows: only the last tokens are seen.

## Refused

Of names, `…` is the model's own class. Models that keep a state: [what it would take](design/hybrids.md).

| model_type | why |
|---|---|
{refused}

## Not tried

| model_type | what stands in the way of a tiny one |
|---|---|
{not_tried}
"""


if __name__ == "__main__":
    print(document(all_tried()), end="")
