"""Sequences that follow a grammar: the tokens of Transformers with the same grammar, and an end for every text."""

import json
from collections.abc import Callable
from pathlib import Path

import llguidance.hf
import msgspec
import numpy as np
import pytest
import torch
from engine_world import BufferIO, DeBuffer, Engines, greedy, random_tokens
from llguidance import LLMatcher
from transformers import AutoTokenizer, LogitsProcessor

from dualpath.model import GrammarError, Grammars, LayerwisePrefill, PagedDecode, PrefillItem, TokenConstraints
from dualpath.model.grammar import KEPT_GRAMMARS
from dualpath.model.sampling import NoTokenError, TokenDraw, draw
from dualpath.spec.sampling import SamplingParams, TokenHistory, finish_reason

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "size": {"enum": [1, 2, 30]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
OBJECT = LLMatcher.grammar_from_json_schema(json.dumps(SCHEMA), overrides={"whitespace_flexible": False})
CHOICE = LLMatcher.grammar_from_regex("yes|no")
PROMPT = random_tokens(70, seed=3)


class InGrammar(LogitsProcessor):
    """The grammar as Transformers' users would give it: llguidance's own mask, in a processor of their own."""

    def __init__(self, path: Path, grammar: str, eos: tuple[int, ...], prompt_tokens: int) -> None:
        tokenizer = llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(path), eos_token=list(eos))
        self.matcher = LLMatcher(tokenizer, grammar)
        self.seen = prompt_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert self.matcher.consume_tokens(input_ids[0, self.seen :].tolist())
        self.seen = input_ids.shape[1]
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        mask = torch.from_numpy(bits[: scores.shape[1]].astype(bool))
        return scores.masked_fill(~mask, -torch.inf)


@pytest.fixture
def grammars(checkpoint: Callable[[str], Path], qwen: Engines) -> Grammars:
    return Grammars(checkpoint("qwen3"), qwen.model.vocab_size, qwen.model.eos_token_ids)


def constraints(grammars: Grammars, params: SamplingParams, generated: list[int] | None = None) -> TokenConstraints:
    return TokenConstraints(params, TokenHistory([], generated or []), grammars.matcher(params.grammar))


def follow(grammars: Grammars, params: SamplingParams, seed: int, vocabulary: int = 259) -> tuple[list[int], str]:
    """Draw from random logits until the sequence ends."""
    rules, tokens = constraints(grammars, params), []
    generator = torch.Generator().manual_seed(seed)
    while True:
        logits = torch.randn(1, vocabulary, generator=generator)
        (row,) = draw(logits, [params], [len(tokens)], [rules])
        assert isinstance(row, TokenDraw), row
        tokens.append(row.token_id)
        if reason := finish_reason(params, row.token_id, len(tokens)):
            return tokens, reason
        rules.accept(row.token_id)


@pytest.mark.parametrize("grammar", [OBJECT, CHOICE], ids=["json", "choice"])
def test_tokens_are_those_of_transformers_with_the_same_grammar(
    engines: Engines,
    checkpoint: Callable[[str], Path],
    prefill_of: Callable[..., LayerwisePrefill],
    grammar: str,
) -> None:
    model, path = engines.model, checkpoint(engines.architecture)
    params = greedy(40, grammar=grammar, stop_token_ids=model.eos_token_ids)
    rules = constraints(Grammars(path, model.vocab_size, model.eos_token_ids), params)
    buffer = DeBuffer(model.layout, PROMPT)
    item = PrefillItem(PROMPT, 0, params, constraints=rules)
    (first,) = prefill_of(model).run([item], BufferIO([buffer], [item]))
    assert first.token is not None
    rules.accept(first.token.token_id)
    decode = PagedDecode(model, blocks=4)
    decode.admit(0, len(PROMPT), first.token.token_id, params, constraints=rules)
    for block, page in enumerate(buffer.pages):
        decode.fill_block(0, block, page.reshape(-1), min(64, len(PROMPT) - block * 64))
    decode.join(0)
    tokens = [first.token.token_id]
    while steps := decode.step():
        tokens += [step.draw.token_id for step in steps if step.draw]
    ids = torch.tensor([PROMPT])
    expected = engines.reference.network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=list(model.eos_token_ids),
        pad_token_id=0,
        logits_processor=[InGrammar(path, grammar, model.eos_token_ids, len(PROMPT))],
    )
    assert tokens == expected[0, len(PROMPT) :].tolist()
    assert len(tokens) > 2 and tokens[-1] in model.eos_token_ids


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 30}, {"ignore_eos": True, "min_tokens": 30}])
def test_a_complete_text_ends_the_sequence_whatever_the_request_says(grammars: Grammars, more: dict[str, int]) -> None:
    params = SamplingParams(max_tokens=40, grammar=CHOICE, stop_token_ids=(258, 256), **more)
    tokens, reason = follow(grammars, params, seed=1)
    assert reason == "stop"
    assert grammars_text(tokens) in ("yes", "no")


def test_ends_are_held_back_while_anything_else_may_come(grammars: Grammars) -> None:
    """After ``a`` the text may end at any letter; under ignore_eos it goes on to the last."""
    grammar = LLMatcher.grammar_from_regex("a{1,20}")
    ending = SamplingParams(max_tokens=40, grammar=grammar, stop_token_ids=(258, 256))
    lengths = {len(follow(grammars, ending, seed)[0]) for seed in range(8)}
    assert min(lengths) < 15
    tokens, reason = follow(grammars, SamplingParams(**(as_dict(ending) | {"ignore_eos": True})), seed=1)
    assert (grammars_text(tokens), reason) == ("a" * 20, "stop")
    early = SamplingParams(**(as_dict(ending) | {"min_tokens": 12}))
    assert all(len(follow(grammars, early, seed)[0]) > 12 for seed in range(8))


def test_logits_beyond_the_tokenizer_are_never_drawn(grammars: Grammars) -> None:
    params = SamplingParams(max_tokens=40, temperature=2.0, grammar=OBJECT, stop_token_ids=(258, 256))
    for seed in range(5):
        tokens, _ = follow(grammars, params, seed, vocabulary=400)
        assert max(tokens) < 259


@pytest.mark.parametrize("grammar", ["not a grammar {{{", "start: missing", '{"grammars": 3}'])
def test_a_grammar_that_is_none_is_an_error_of_its_own(grammars: Grammars, grammar: str) -> None:
    with pytest.raises(GrammarError, match="can't be compiled"):
        grammars.matcher(grammar)


def test_a_matcher_that_fails_fails_its_row_only(grammars: Grammars) -> None:
    params = SamplingParams(max_tokens=9, temperature=0, grammar=CHOICE, stop_token_ids=(258,))
    rules = constraints(grammars, params)
    with pytest.raises(GrammarError, match="can't be followed"):
        rules.accept(5)
    bad, good = draw(torch.randn(2, 259), [params, greedy(9)], [0, 0], [rules, None])
    assert isinstance(bad, GrammarError) and isinstance(good, TokenDraw)


def test_settings_that_leave_no_token_fail_their_row_only(grammars: Grammars) -> None:
    params = SamplingParams(max_tokens=9, grammar=CHOICE, allowed_token_ids=(5, 6), stop_token_ids=(258,))
    bad, good = draw(torch.randn(2, 259), [params, greedy(9)], [0, 0], [constraints(grammars, params), None])
    assert isinstance(bad, NoTokenError) and isinstance(good, TokenDraw)


def test_grammars_kept_are_bounded_and_copies_are_apart(grammars: Grammars) -> None:
    for i in range(KEPT_GRAMMARS + 5):
        grammars.matcher(LLMatcher.grammar_from_regex(f"x{i}"))
    assert len(grammars._fresh) == KEPT_GRAMMARS
    one, other = grammars.matcher(CHOICE), grammars.matcher(CHOICE)
    before = other.allowed(259)
    one.advance([int(before.nonzero()[0])])
    assert torch.equal(other.allowed(259), before)
    assert not torch.equal(one.allowed(259), before)


def test_a_model_without_an_end_takes_no_grammar(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(GrammarError, match="no end-of-sequence token"):
        Grammars(checkpoint("qwen3"), 259, ()).matcher(CHOICE)


def test_a_checkpoint_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(GrammarError, match="need the model's tokenizer"):
        Grammars(tmp_path, 259, (258,)).matcher(CHOICE)


def as_dict(params: SamplingParams) -> dict[str, object]:

    return msgspec.structs.asdict(params)


def grammars_text(tokens: list[int]) -> str:
    """The bytes of a tiny checkpoint's tokens but the end: ids up to 255 are the byte-level alphabet in order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return "".join(sorted(ByteLevel.alphabet())[token] for token in tokens if token < 256)
