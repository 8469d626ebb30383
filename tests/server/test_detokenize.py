"""Incremental text equals the whole text, however tokens and strings are split."""

import asyncio
import random

import pytest
from fake_cluster import EOS, TOKENIZER, ids
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dualpath.model.checkpoint import SPECIAL_TOKENS
from dualpath.server.codec import IncrementalDetokenizer, StopMatcher, TextCodec

CODEC = TextCodec(TOKENIZER)


def decode(token_ids: list[int]) -> str:
    return CODEC.decode(token_ids, skip_special_tokens=True)


def streamed(detokenizer: IncrementalDetokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token) for token in token_ids), detokenizer.finish()]


def _byte_characters() -> dict[int, str]:
    """Byte → the printable character that stands for it in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_IDS = {byte: TOKENIZER.convert_tokens_to_ids(char) for byte, char in _byte_characters().items()}


@given(st.text(max_size=200))
def test_any_text_survives_one_byte_at_a_time(text: str) -> None:
    assume(not any(special in text for special in SPECIAL_TOKENS))  # which are tokens, and not shown
    assert "".join(streamed(IncrementalDetokenizer(decode), ids(text))) == text


@given(st.lists(st.integers(0, 258), max_size=150))
def test_any_tokens_even_invalid_utf8_give_the_text_of_the_whole(token_ids: list[int]) -> None:
    assert "".join(streamed(IncrementalDetokenizer(decode), token_ids)) == decode(token_ids)


@given(st.binary(max_size=12), st.integers(1, 60))
def test_long_repetitions_of_invalid_bytes(pattern: bytes, times: int) -> None:
    token_ids = [BYTE_IDS[byte] for byte in pattern] * times
    assert "".join(streamed(IncrementalDetokenizer(decode), token_ids)) == decode(token_ids)


def test_a_character_comes_out_with_its_last_byte_and_not_before() -> None:
    assert streamed(IncrementalDetokenizer(decode), ids("a€b")) == ["a", "", "", "€", "b", ""]


def test_a_character_never_completed_comes_out_at_the_end() -> None:
    assert streamed(IncrementalDetokenizer(decode), ids("€")[:2]) == ["", "", "\ufffd"]


def test_special_tokens_are_no_text() -> None:
    assert "".join(streamed(IncrementalDetokenizer(decode), [*ids("a"), EOS, *ids("b")])) == "ab"


def test_window_stays_small_over_a_long_stream_of_junk() -> None:
    junk = random.Random(7)
    longest = 0

    def measured(token_ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return decode(token_ids)

    token_ids = [junk.randrange(259) for _ in range(3000)] + [BYTE_IDS[0x80]] * 500 + ids("end")
    assert "".join(streamed(IncrementalDetokenizer(measured), token_ids)) == decode(token_ids)
    assert longest < 100


def sentencepiece_like() -> Tokenizer:
    """Words with a leading ▁ whose first space is stripped, and byte fallback, as Llama's first tokenizers have."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s", "▁", "▁a"]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


SENTENCEPIECE = sentencepiece_like()


@example(["▁the"] * 15 + ["é", "😀", "😀", "😀", "😀"], True)  # the window is full while a character is on its way
@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "▁", "▁a", "é", "€", "😀"]), max_size=120), st.booleans())
def test_sentencepiece_keeps_its_spaces_after_a_prompt(pieces: list[str], with_prompt: bool) -> None:
    token_ids: list[int] = []
    for piece in pieces:
        known = SENTENCEPIECE.token_to_id(piece)
        encoded = [SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in piece.encode()]
        token_ids += encoded if known is None else [known]
    prompt = [SENTENCEPIECE.token_to_id("▁the")] if with_prompt else []
    expected = SENTENCEPIECE.decode(prompt + token_ids)[len(SENTENCEPIECE.decode(prompt)) :]
    assert "".join(streamed(IncrementalDetokenizer(SENTENCEPIECE.decode, prompt), token_ids)) == expected


def test_a_prompt_that_ends_inside_a_character_is_no_context() -> None:
    first, second, third = (SENTENCEPIECE.token_to_id(f"<0x{byte:02X}>") for byte in "€".encode())
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE.decode, [first, second])
    assert "".join(streamed(detokenizer, [third, SENTENCEPIECE.token_to_id("▁cat")])) == "\ufffd cat"


def cut_at_first_complete(text: str, stops: list[str]) -> tuple[str, str | None]:
    """What `StopMatcher` must do, the slow way: grow the text until a stop string ends it."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            longest = max(ended, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.text(alphabet="ab€", max_size=40),
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=6), max_size=4),
    st.randoms(use_true_random=False),
)
def test_stop_strings_cut_where_the_first_is_complete_however_text_is_split(
    text: str, stops: list[str], split: random.Random
) -> None:
    matcher, shown, rest = StopMatcher(stops), "", text
    while rest and matcher.matched is None:
        size = split.randint(1, 5)
        shown += matcher.push(rest[:size])
        rest = rest[size:]
        assert not any(stop in shown for stop in stops)
    shown += "" if matcher.matched else matcher.finish()
    assert (shown, matcher.matched) == cut_at_first_complete(text, stops)


def test_only_what_may_begin_a_stop_string_is_withheld() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hello\n") == "Hello"
    assert matcher.push("World\n\nUs") == "\nWorld"
    assert matcher.push("er") == ""
    assert matcher.push("s") == "\n\nUsers"
    assert matcher.push(" \n\nUser: more") == " "
    assert matcher.matched == "\n\nUser:"


@pytest.mark.parametrize("text", ["", "short", "long " * 1000])
def test_codec_round_trip_inline_and_in_a_thread(text: str) -> None:
    token_ids = asyncio.run(CODEC.encode(text, add_special_tokens=False))
    assert CODEC.decode(token_ids, skip_special_tokens=True) == text
