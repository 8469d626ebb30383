"""Turns a request's sampling fields into `SamplingParams`. Every number has bounds, so that nothing that passes here
fails to encode, or overflows a computation.
"""

import msgspec

from dualpath.cluster.generator import ModelFacts
from dualpath.server.codec import TextCodec
from dualpath.server.errors import bad_parameter
from dualpath.server.protocol import GenerationRequest
from dualpath.spec.sampling import SamplingParams

MAX_LOGPROBS = 20
MAX_SCORED = 2**17
"""Most log-probabilities of prompt tokens in one answer: they take about 10 MB of JSON."""
SEEDS = 2**63
_GREEDY_BELOW = 1e-5
_MAX_STOP_TOKENS = 1024
_MAX_BIASES = 1024
_MAX_BAD_WORDS = 1000
_MAX_BAD_WORD_CHARACTERS = 200
_BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),
    "seed": (-SEEDS, SEEDS - 1),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
_DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logprobs_mode")


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks for beside its own sampling fields."""

    max_tokens: int
    """0: nothing is generated."""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""


class SamplingChecker:
    """Checks sampling fields against the model. Every method raises ApiError."""

    def __init__(self, model: ModelFacts, codec: TextCodec) -> None:
        self._model = model
        self._codec = codec

    async def bad_words(self, words: list[str] | None) -> tuple[tuple[int, ...], ...]:
        """Returns the token sequences of words as vLLM finds them: at the start of a text, and after a space."""
        if not words:
            return ()
        if len(words) > _MAX_BAD_WORDS or not all(0 < len(w.strip()) <= _MAX_BAD_WORD_CHARACTERS for w in words):
            raise bad_parameter(
                "bad_words", f"bad_words may be {_MAX_BAD_WORDS} texts of 1 to {_MAX_BAD_WORD_CHARACTERS} characters"
            )
        bare = [word.lstrip() for word in dict.fromkeys(words)]
        texts = [*bare, *(f" {word}" for word in bare)]
        encoded = await self._codec.encode_all(texts, add_special_tokens=False)
        found: dict[tuple[int, ...], None] = {}
        for word, plain, spaced in zip(bare, encoded, encoded[len(bare) :], strict=False):
            if not plain:
                raise bad_parameter("bad_words", f"bad_words: {word!r} has no tokens")
            found[tuple(plain)] = None
            if len(spaced) == len(plain) and spaced[0] != plain[0]:
                found[tuple(spaced)] = None
        return tuple(found)

    def params(self, fields: GenerationRequest, asked: Asked, bad_words: tuple[tuple[int, ...], ...]) -> SamplingParams:
        for name, (least, most) in _BOUNDS.items():
            check_range(name, getattr(fields, name), least, most)
        if fields.top_p == 0:
            raise bad_parameter("top_p", "top_p must be above 0; for greedy decoding set temperature to 0")
        check_range("min_tokens", fields.min_tokens, 0, asked.max_tokens)
        if fields.allowed_token_ids == []:
            raise bad_parameter("allowed_token_ids", "allowed_token_ids is empty, which leaves no token; leave it out")
        given = {name: getattr(fields, name) for name in _DEFAULTED}
        chosen = {n: getattr(self._model.defaults, n) if value is None else value for n, value in given.items()}
        return SamplingParams(
            **chosen
            | {
                "top_k": max(chosen["top_k"], 0),
                "temperature": 0.0 if chosen["temperature"] < _GREEDY_BELOW else chosen["temperature"],
            },
            max_tokens=max(asked.max_tokens, 1),
            min_tokens=fields.min_tokens or 0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            presence_penalty=fields.presence_penalty or 0.0,
            logit_bias=self._logit_bias(fields.logit_bias),
            bad_words=bad_words,
            allowed_token_ids=self._ids("allowed_token_ids", fields.allowed_token_ids, self._model.vocab_size),
            stop_token_ids=self._stop_tokens(fields, asked.grammar),
            ignore_eos=bool(fields.ignore_eos),
            logprobs=asked.logprobs if asked.max_tokens else None,
            prompt_logprobs=asked.prompt_logprobs,
            grammar=asked.grammar,
        )

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        """Refuse token ids for which the model has no embedding."""
        vocabulary = self._model.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocabulary):
            at, token = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocabulary)
            raise bad_parameter(
                param, f"token id {token} at position {at} is outside the model's vocabulary of {vocabulary} tokens"
            )

    def _stop_tokens(self, fields: GenerationRequest, grammar: str) -> tuple[int, ...]:
        """A grammar's text ends with an end-of-sequence token, also where these don't end other texts."""
        stops = self._ids("stop_token_ids", fields.stop_token_ids, _MAX_STOP_TOKENS)
        ends = () if fields.ignore_eos and not grammar else self._model.eos_token_ids
        return tuple(dict.fromkeys((*stops, *ends)))

    def _ids(self, param: str, token_ids: list[int] | None, most: int) -> tuple[int, ...]:
        if len(token_ids or ()) > most:
            raise bad_parameter(param, f"{param} may have {most} token ids")
        self.check_token_ids(token_ids or [], param)
        return tuple(dict.fromkeys(token_ids or ()))

    def _logit_bias(self, biases: dict[int, float] | None) -> tuple[tuple[int, float], ...]:
        biases = biases or {}
        if len(biases) > _MAX_BIASES:
            raise bad_parameter("logit_bias", f"logit_bias may have {_MAX_BIASES} tokens")
        self.check_token_ids(list(biases), "logit_bias")
        for bias in biases.values():
            check_range("logit_bias", bias, -100, 100)
        return tuple(biases.items())


def check_range(param: str, value: float | None, least: float, most: float | None) -> None:
    """Raises ApiError where a number is out of its bounds; None is not given."""
    if value is None:
        return
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise bad_parameter(param, f"{param} is {value}; it must be {bounds}")
