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

from dualpath.kv.layout import WHOLE_KV_LAYER_TYPES, KVLayout, KVPart, parts_of
from dualpath.model.allocator import keep_freed_memory
from dualpath.model.attention import (
    IMPLEMENTATION,
    GroupedForm,
    LatentForm,
    PackedPass,
    UnsupportedModelError,
    packed_attention,
)
from dualpath.model.linears import pack_linears
from dualpath.model.rules import PLAIN, AttentionRules
from dualpath.model.spans import PackedSequence
from dualpath.model.sparse import SparseLatentForm

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
        self.form, parts = _form_of(config)
        self.layer_mask = torch.zeros(1, 1, 1, 1) if isinstance(self.form, SparseLatentForm) else None
        """What layers get as their mask. An indexer demands one; this hides nothing, for our selection is causal."""
        self.layout = KVLayout(
            layers=config.num_hidden_layers, parts=parts, dtype=str(self.dtype).removeprefix("torch.")
        )
        self.vocab_size: int = config.vocab_size
        self.max_length_tokens: int = config.max_position_embeddings
        self.eos_token_ids = eos_token_ids
        _Probe(self).run()
        self.scores_prompts = _Probe(self).head_alone()
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
    def token_elems(self) -> int:
        """Elements of one token's row in one layer."""
        return self.layout.token_bytes // self.layout.itemsize_bytes

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

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Returns the logits ``[n, vocab]`` of hidden states ``[n, width]``."""
        logits: Tensor = self.network.get_output_embeddings()(hidden)
        return logits

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
        if isinstance(self.form, LatentForm):
            pair = 2 * self.form.heads * (self.form.nope_dim + self.form.rope_dim + self.form.value_dim)
            if isinstance(self.form, SparseLatentForm):
                pair += 2 * self.form.index_heads * self.form.index_dim
            return pair
        return 4 * self.form.heads * self.form.head_dim


def load_network(path: str | Path, dtype: torch.dtype) -> Any:
    """Returns a local checkpoint's network in host memory, with our attention. Raises OSError if it is none."""
    network = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=IMPLEMENTATION, use_safetensors=True, local_files_only=True
    )
    return pack_linears(network.eval())


class _Probe(PackedPass):
    """Runs two tokens through every layer and records what each layer passes to us."""

    def __init__(self, model: LoadedModel) -> None:
        sequence = PackedSequence(first_query=0, new_tokens=2, past_tokens=0, extents=((0, 2),))
        super().__init__(model.form, (sequence,), torch.arange(2, device=model.device))
        self._model = model
        self._buffer = torch.zeros(2, model.token_elems, dtype=model.dtype, device=model.device)
        self._updated: list[int] = []
        self._indexed_layers: list[int] = []
        self._computed: list[int] = []
        self._windows: list[int | None] = []

    def layer_rows(self, layer: int) -> Tensor:  # noqa: ARG002  one buffer serves all layers
        return self._buffer

    def update(self, first: Tensor, second: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._updated.append(layer_idx)
        expected = [(1, part.heads, 2, part.dim) for part in self._model.layout.parts[:2]]
        if [tuple(first.shape), tuple(second.shape)] != expected or args or kwargs:
            raise UnsupportedModelError(
                f"layer {layer_idx} passes KV of shapes {tuple(first.shape)} and {tuple(second.shape)}, but its config "
                f"says {expected[0]} and {expected[1]}"
            )
        return super().update(first, second, layer_idx)

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Any:
        self._indexed_layers.append(layer_idx)
        expected = [(1, 2, part.dim) for part in self._model.layout.parts[2:]]
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

    def run(self) -> None:
        """Raises UnsupportedModelError when the model does not use the seam once per layer, in order."""
        name = type(self._model.network).__name__
        try:
            self._model.forward(self, [0, 0], [0, 1], [1])
        except (AttributeError, NotImplementedError, TypeError) as error:
            raise UnsupportedModelError(f"{name} does not run through the packed-attention seam: {error}") from error
        layers = list(range(self._model.layout.layers))
        if self._updated != layers or self._computed != layers:
            raise UnsupportedModelError(
                f"{name} updated KV in layers {self._updated} and attended in {self._computed}; every one of its "
                f"{len(layers)} layers must do both, in order"
            )
        if len(self._model.layout.parts) > 2 and self._indexed_layers != layers:
            raise UnsupportedModelError(
                f"{name} keeps index keys in layers {self._indexed_layers}, not in all {layers}"
            )
        self._check_windows()

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

    def head_alone(self) -> bool:
        """Whether the model's logits are its output head's, so that a prompt can be scored slice by slice.

        Some models scale or cap the head's output. A cap hardly changes small logits, so they are made large.
        """
        network = self._model.network
        try:
            hook = network.get_output_embeddings().register_forward_hook(_enlarged)
        except (AttributeError, TypeError):
            return False
        try:
            whole = self._model.forward(self, [0, 1], [0, 1], [1])
            alone = self._model.head(self._model.hidden(self, [0, 1], [0, 1])[1:])
        except (AttributeError, TypeError):
            return False
        finally:
            hook.remove()
        return torch.allclose(whole.float(), alone.float(), rtol=1e-3, atol=1e-3 * _LARGE_LOGIT)


_LARGE_LOGIT = 1000.0
"""Beyond any model's cap of its logits (30 in Gemma 2), within float16."""


def _enlarged(module: Any, inputs: Any, output: Tensor) -> Tensor:
    """A hook that scales each row of a head's logits to a largest one of `_LARGE_LOGIT`."""
    del module, inputs
    return output * (_LARGE_LOGIT / output.abs().amax(-1, keepdim=True).clamp(min=1e-3))


def _refuse_other_attention(config: Any) -> None:
    others = sorted(set(getattr(config, "layer_types", None) or ()) - WHOLE_KV_LAYER_TYPES)
    if others:
        raise UnsupportedModelError(
            f"{config.model_type} has layers of type {', '.join(others)}; only full, sliding-window and indexed "
            "attention has KV of every token in every layer, which is what is stored and moved here"
        )


def _form_of(config: Any) -> tuple[GroupedForm | LatentForm, tuple[KVPart, ...]]:
    try:
        parts = parts_of(config)
    except ValueError as error:
        raise UnsupportedModelError(f"{config.model_type}: {error}") from error
    if getattr(config, "kv_lora_rank", None):
        latent = LatentForm(
            config.num_attention_heads,
            config.kv_lora_rank,
            config.qk_rope_head_dim,
            config.qk_nope_head_dim,
            config.v_head_dim,
        )
        if len(parts) == 3:
            return SparseLatentForm(latent, config.index_n_heads, config.index_head_dim), parts
        return latent, parts
    return GroupedForm(config.num_attention_heads, parts[0].heads, parts[0].dim), parts


def _eos_token_ids(path: str | Path, config: Any) -> tuple[int, ...]:
    eos = config.eos_token_id
    if (Path(path) / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id or eos
    return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
