"""Answers of the endpoints for rollouts: vLLM's GenerateResponse and SGLang's text with meta_info."""

import uuid
from typing import Any, Protocol

import msgspec

from dualpath.cluster.generator import Generator, TokenLogprob
from dualpath.server.answers import DONE, usage_body
from dualpath.server.codec import TextCodec
from dualpath.server.errors import ApiError
from dualpath.server.generation import Piece, Usage, by_choice, merged
from dualpath.server.logprobs import LogprobShapes, number
from dualpath.server.requests import CheckedRequest

_encode = msgspec.json.Encoder().encode


class Serves(Protocol):
    """What a writer asks of the service."""

    generator: Generator
    codec: TextCodec


class VllmWriter:
    """/inference/v1/generate: token ids, with log-probabilities under the name ``token_id:N``."""

    def __init__(self, service: Serves, checked: CheckedRequest, request_id: str | None) -> None:
        self._service = service
        self._checked = checked
        self._request_id = request_id or uuid.uuid4().hex
        self._shapes = LogprobShapes(service.codec, tokens_as_ids=True)

    def event(self, piece: Piece) -> bytes:
        return self._event({"choices": [self._choice(piece)]})

    def end(self, usage: Usage) -> bytes:
        if not self._checked.include_usage:
            return DONE
        return self._event({"choices": [], "usage": usage_body(usage)}) + DONE

    def failed(self, error: ApiError) -> bytes:
        return b"data: %b\n\n" % error.body

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:
        choices = [self._choice(piece) for piece in by_choice(pieces)]
        scores = next((piece.prompt_logprobs for piece in pieces if piece.prompt_logprobs), [])
        body = {"request_id": self._request_id, "model": self._service.generator.model.name, "choices": choices}
        prompt = None if self._checked.prompt_logprobs is None else self._shapes.prompt(scores)
        return _encode(body | {"usage": usage_body(usage), "prompt_logprobs": prompt, "kv_transfer_params": None})

    def _event(self, body: dict[str, Any]) -> bytes:
        return b"data: %b\n\n" % _encode({"request_id": self._request_id, **body})

    def _choice(self, piece: Piece) -> dict[str, Any]:
        scored = self._checked.logprobs is not None
        return {
            "index": piece.choice,
            "token_ids": piece.token_ids,
            "logprobs": self._shapes.chat(piece.logprobs or []) if scored else None,
            "finish_reason": piece.finish_reason,
        }


class SglangWriter:
    """/generate: one record per choice, `several` in a list. An event has everything up to it, as SGLang's do."""

    def __init__(
        self, service: Serves, checked: CheckedRequest, several: bool, with_text: bool, scored_from: int | None
    ) -> None:
        """`scored_from`: the first prompt token whose log-probability is asked for."""
        self._service = service
        self._checked = checked
        self._several = several
        self._with_text = with_text
        self._scored_from = scored_from
        self._so_far: dict[int, Piece] = {}

    def event(self, piece: Piece) -> bytes:
        before = self._so_far.get(piece.choice)
        self._so_far[piece.choice] = piece = piece if before is None else merged([before, piece])
        record = self._record(piece)
        return b"data: %b\n\n" % _encode({**record, "index": piece.choice} if self._several else record)

    def end(self, usage: Usage) -> bytes:  # noqa: ARG002  every record has its own figures
        return DONE

    def failed(self, error: ApiError) -> bytes:
        return b"data: %b\n\n" % error.body

    def whole(self, pieces: list[Piece], usage: Usage) -> bytes:  # noqa: ARG002
        records = [self._record(piece) for piece in by_choice(pieces)]
        return _encode(records if self._several else records[0])

    def _record(self, piece: Piece) -> dict[str, Any]:
        request = self._checked.choices[piece.choice].request
        meta: dict[str, Any] = {
            "id": request.request_id or uuid.uuid4().hex,
            "finish_reason": self._finish(piece),
            "prompt_tokens": len(request.prompt_token_ids),
            "completion_tokens": len(piece.token_ids),
            "cached_tokens": piece.cached_tokens,
            "weight_version": self._service.generator.model.weight_version,
        }
        if self._checked.logprobs is not None:
            entries = piece.logprobs or []
            meta["output_token_logprobs"] = [self._logprob(entry[0]) for entry in entries]
            if self._checked.logprobs:
                meta["output_top_logprobs"] = [[self._logprob(token) for token in entry[1:]] for entry in entries]
        if self._scored_from is not None:
            meta |= self._prompt_scores(piece, request.prompt_token_ids, self._scored_from)
        return {"text": piece.text, "output_ids": piece.token_ids, "meta_info": meta}

    def _prompt_scores(self, piece: Piece, prompt: list[int], first: int) -> dict[str, Any]:
        """Returns the log-probabilities of the prompt's tokens from `first` on; token 0 has nothing before it."""
        rows: list[list[Any]] = [[(None, prompt[0], self._text(prompt[0]))]]
        rows += [[self._logprob(token) for token in score.tokens] for score in piece.prompt_logprobs or []]
        scores = {"input_token_logprobs": [row[0] for row in rows[first:]]}
        return scores | (
            {"input_top_logprobs": [row[1:] for row in rows[first:]]} if self._checked.prompt_logprobs else {}
        )

    def _finish(self, piece: Piece) -> dict[str, Any] | None:
        match piece.finish_reason:
            case None:
                return None
            case "length":
                return {"type": "length", "length": len(piece.token_ids)}
            case "abort":
                return {"type": "abort", "message": "aborted"}
            case reason:
                stops = self._checked.choices[piece.choice].request.sampling.stop_token_ids
                last = piece.token_ids[-1] if piece.token_ids else None
                return {"type": reason, "matched": piece.stop_string or (last if last in stops else None)}

    def _logprob(self, token: TokenLogprob) -> tuple[float, int, str | None]:
        return number(token), token.token_id, self._text(token.token_id)

    def _text(self, token_id: int) -> str | None:
        return self._service.codec.token_text(token_id) if self._with_text else None
