"""A causal language model of Transformers, loaded unforked, with our packed attention in place of its own.

Loading ends with a probe: one short forward through the seam. It checks that every layer passes its KV to
`past_key_values.update` in the expected shape and takes its attention from us. A model that would compute something
else is therefore refused, with a reason, before it serves a token. Read `attention` next.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, GenerationConfig

from dualpath.kv.layout import KVLayout, KVPart, LayerKV, layer_parts
from dualpath.kv.refusals import refusal
from dualpath.model.allocator import keep_freed_memory
from dualpath.model.attention import (
    IMPLEMENTATION,
    IndexedForm,
    LatentForm,
    PackedPass,
    UnsupportedModelError,
    packed_attention,
)
from dualpath.model.forms import forms_of
from dualpath.model.head import logits_of
from dualpath.model.linears import pack_linears
from dualpath.model.rules import PLAIN, AttentionRules
from dualpath.model.seam_checks import (
    FOREIGN_ERRORS,
    CheckedPass,
    head_alone,
    longest_context_tokens,
    not_through_the_seam,
)
from dualpath.model.spans import PackedSequence
from dualpath.model.sparse import SelectedLatentForm

# No mask function is registered under this name, so Transformers builds no mask.
AttentionInterface.register(IMPLEMENTATION, packed_attention)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedModel:
    """Weights on a device, and the facts that engines need about them."""

    def __init__(self, network: Any, eos_token_ids: tuple[int, ...]) -> None:
        """`network` is a Transformers causal LM made with our attention. May raise UnsupportedModelError."""
        config = network.config
        _refuse_other_attention(config)
        self.network = network
        self.dtype: torch.dtype = network.dtype
        self.device: torch.device = network.device
        parts = _layer_parts(config)
        self.forms = forms_of(config, parts)
        self.layer_mask = torch.zeros(1, 1, 1, 1) if any(isinstance(one, IndexedForm) for one in self.forms) else None
        """What layers get as their mask. An indexer demands one; this hides nothing, for our selection is causal."""
        dtype = str(self.dtype).removeprefix("torch.")
        self.layout = KVLayout.of([LayerKV(kept) for kept in parts], dtype)
        self.vocab_size: int = config.vocab_size
        self.eos_token_ids = eos_token_ids
        windows = _Probe(self).run()
        self.layout = KVLayout.of([LayerKV(*kept) for kept in zip(parts, windows, strict=True)], dtype)
        self.max_length_tokens = longest_context_tokens(config)
        self.scores_prompts = head_alone(self, _Probe(self))
        """Whether `hidden` and `head` together compute what `forward` does."""

    @staticmethod
    def load(path: str | Path, device: str = "cpu", dtype: str = "float32", threads: int = 1) -> LoadedModel:
        """Load a local checkpoint folder (safetensors only). Sets torch's thread count, and what becomes of
        freed memory, for the whole process.

        Raises ValueError for a bad argument, OSError when the folder is not a checkpoint, UnsupportedModelError for a
        model that the seam can't run.
        """
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
        if torch.device(device).type not in ("cpu", "cuda"):
            raise ValueError(f"device {device!r} is not supported; choose cpu or cuda")
        if threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        torch.set_num_threads(threads)
        keep_freed_memory()
        local = {"local_files_only": True}
        config = AutoConfig.from_pretrained(path, **local)
        _refuse_other_attention(config)
        network = load_network(path, _DTYPES[dtype]).to(device)
        return LoadedModel(network, _eos_token_ids(path, config))

    @property
    def row_elements(self) -> tuple[int, ...]:
        """For each layer, the elements of one token's row."""
        return tuple(row // self.layout.itemsize_bytes for row in self.layout.row_bytes)

    @torch.inference_mode()
    def forward(self, packed: PackedPass, token_ids: list[int], positions: list[int], keep: list[int]) -> Tensor:
        """One packed forward. Returns logits ``[len(keep), vocab]`` of the pack's tokens at indices `keep`.

        When `keep` is empty, no logits are computed and the result is empty.
        """
        ids, places, kept = (torch.tensor(x, device=self.device) for x in (token_ids, positions, keep or [0]))
        output = self.network(
            input_ids=ids[None],
            position_ids=places[None],
            past_key_values=packed,
            use_cache=True,
            logits_to_keep=kept,
            attention_mask=self._masks(),
            packed=packed,
        )
        logits: Tensor = output.logits[0]
        return logits[: len(keep)]

    @torch.inference_mode()
    def hidden(self, packed: PackedPass, token_ids: list[int], positions: list[int]) -> Tensor:
        """One packed forward without the output head. Returns ``[tokens, width]``, what `head` takes."""
        ids, places = (torch.tensor(x, device=self.device) for x in (token_ids, positions))
        output = self.network.get_decoder()(
            input_ids=ids[None],
            position_ids=places[None],
            past_key_values=packed,
            use_cache=True,
            attention_mask=self._masks(),
            packed=packed,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Returns the logits ``[n, vocab]`` of hidden states ``[n, width]``."""
        return logits_of(self.network, hidden)

    def _masks(self) -> dict[str, Tensor] | None:
        """Returns ready masks by type of layer, which models with an indexer take as they are; None for others."""
        return None if self.layer_mask is None else {"indexed_attention": self.layer_mask}

    @property
    def attention_flops_per_token(self) -> int:
        """FLOPs of one attention layer's projections for one new token; they do not depend on its context."""
        attention = self.network.get_decoder().layers[0].self_attn
        weights = sum(p.numel() for name, p in attention.named_parameters() if p.dim() == 2 and name.endswith("weight"))
        return int(2 * weights)

    @property
    def attention_flops_per_pair(self) -> int:
        """FLOPs of one attention layer for a new token and one it attends to: score and weighted value, all heads.

        With an indexer, those of its score as well, as if every token were selected: too many beyond top-k tokens.
        """
        form: Any = self.forms[0]
        if isinstance(form, LatentForm):
            pair: int = 2 * form.heads * (form.nope_dim + form.rope_dim + form.value_dim)
            if isinstance(form, SelectedLatentForm):
                pair += 2 * form.index_heads * form.index_dim
            return pair
        key, value = self.layout.kind(0).parts
        return int(2 * form.heads * (key.dim + value.dim))


def load_network(path: str | Path, dtype: torch.dtype) -> Any:
    """Returns a local checkpoint's network in host memory, with our attention. Raises OSError if it is none."""
    network = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=IMPLEMENTATION, use_safetensors=True, local_files_only=True
    )
    return pack_linears(network.eval())


class _Probe(CheckedPass):
    """Runs two tokens through every layer and records what each layer passes to us."""

    def __init__(self, model: LoadedModel) -> None:
        sequence = PackedSequence(first_query=0, new_tokens=2, past_tokens=0, extents=((0, 2),))
        super().__init__(model.forms, (sequence,), torch.arange(2, device=model.device))
        self._model = model
        self._buffers = [torch.zeros(2, row, dtype=model.dtype, device=model.device) for row in model.row_elements]
        self._updated: list[int] = []
        self._indexed_layers: list[int] = []
        self._computed: list[int] = []
        self._windows: list[int | None] = []

    def layer_rows(self, layer: int) -> Tensor:
        return self._buffers[layer]

    def _parts(self, layer: int) -> tuple[KVPart, ...]:
        return self._model.layout.kind(layer).parts

    def update(self, first: Tensor, second: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._updated.append(layer_idx)
        expected = [(1, part.heads, 2, part.dim) for part in self._parts(layer_idx)[:2]]
        if [tuple(first.shape), tuple(second.shape)] != expected or args or kwargs:
            raise UnsupportedModelError(
                f"layer {layer_idx} passes KV of shapes {tuple(first.shape)} and {tuple(second.shape)}, but its config "
                f"says {expected[0]} and {expected[1]}"
            )
        return super().update(first, second, layer_idx)

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Any:
        self._indexed_layers.append(layer_idx)
        expected = [(1, 2, part.dim) for part in self._parts(layer_idx)[2:]]
        if [tuple(keys.shape)] != expected:
            raise UnsupportedModelError(
                f"layer {layer_idx} passes index keys of shape {tuple(keys.shape)}, but its config says "
                f"{expected[0] if expected else 'none'}"
            )
        return super().update_indexer(keys, layer_idx)

    def attend(
        self, module: Any, query: Tensor, scale: float, rules: AttentionRules = PLAIN, selection: Any = None
    ) -> Tensor:
        self._windows.append(rules.window_tokens)
        return super().attend(module, query, scale, rules, selection)

    def attended(self, layer: int) -> None:
        self._computed.append(layer)

    def run(self) -> list[int | None]:
        """Returns each layer's window. Raises UnsupportedModelError when layers don't use the seam once, in order."""
        name = type(self._model.network).__name__
        try:
            self._model.forward(self, [0, 1], [0, 1], [1])
        except (UnsupportedModelError, torch.OutOfMemoryError):
            raise
        except FOREIGN_ERRORS as error:
            raise not_through_the_seam(name, error) from error
        layers = list(range(self._model.layout.layers))
        if self._updated != layers or self._computed != layers:
            raise UnsupportedModelError(
                f"{name} updated KV in layers {self._updated} and attended in {self._computed}; every one of its "
                f"{len(layers)} layers must do both, in order"
            )
        indexed = [layer for layer in layers if len(self._parts(layer)) > 2]
        if self._indexed_layers != indexed:
            raise UnsupportedModelError(
                f"{name} keeps index keys in layers {self._indexed_layers}, but its config says in {indexed}"
            )
        self._check_windows()
        return self._windows

    def _check_windows(self) -> None:
        """Raises UnsupportedModelError when a model masks what lies outside a window that it does not tell us."""
        network, config = self._model.network, self._model.network.config
        name = type(network).__name__
        types = getattr(config, "layer_types", None) or ()
        for layer, (kind, window_tokens) in enumerate(zip(types, self._windows, strict=False)):
            if (kind == "sliding_attention") != (window_tokens is not None):
                raise UnsupportedModelError(
                    f"{name}: layer {layer} is of type {kind} and passes its attention function a window of "
                    f"{window_tokens} tokens; one of them is wrong"
                )
        masks_windows = "create_sliding_window_causal_mask" in vars(sys.modules[type(network).__module__])
        if masks_windows and not types and getattr(config, "sliding_window", None) and not any(self._windows):
            raise UnsupportedModelError(f"{name} has a sliding window, but does not pass it to its attention function")


def _refuse_other_attention(config: Any) -> None:
    if (reason := refusal(config)) is not None:
        raise UnsupportedModelError(f"{config.model_type} {reason}")


def _layer_parts(config: Any) -> tuple[tuple[KVPart, ...], ...]:
    try:
        return layer_parts(config)
    except ValueError as error:
        raise UnsupportedModelError(f"{config.model_type}: {error}") from error


def _eos_token_ids(path: str | Path, config: Any) -> tuple[int, ...]:
    eos = config.eos_token_id
    if (Path(path) / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id or eos
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
