"""Long prompts: refused by their length where they can't fit, else tokenised beside the loop, a few at once."""

import asyncio
import re
import threading
from typing import Any

import httpx
import pytest
from fake_cluster import MAX_MODEL_LEN_TOKENS, TOKENIZER, FakeGenerator, running_server, says

from dualpath.cluster.generator import overflow_message
from dualpath.server import ServerLimits
from dualpath.server.budget import Budget
from dualpath.server.codec import TextCodec
from dualpath.server.errors import ApiError
from dualpath.server.lanes import Lanes


class Counting:
    """A tokenizer's backend that says how much text it was given at once."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self._backend = TOKENIZER.backend_tokenizer

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.lengths += map(len, texts)
        return self._backend.encode_batch_fast(texts, **options)

    decoder = None

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def no_truncation(self) -> None: ...
    def no_padding(self) -> None: ...


class Tokenizer:
    chat_template = "any"

    def __init__(self, longest_token: str) -> None:
        self.backend_tokenizer = Counting()
        self._longest_token = longest_token

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1, self._longest_token: 2}

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return "".join(message["content"] for message in messages)


def refused(codec: TextCodec, text: str, chat: bool = False) -> ApiError:
    async def ask() -> None:
        if chat:
            await codec.encode_chat([{"role": "user", "content": text}], {})
        else:
            await codec.encode(text, add_special_tokens=True)

    with pytest.raises(ApiError) as caught:
        asyncio.run(ask())
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    assert "This model's maximum context length is" in caught.value.message
    return caught.value


@pytest.mark.parametrize("chat", [False, True])
def test_text_that_no_tokens_could_cover_is_not_tokenised(chat: bool) -> None:
    tokenizer = Tokenizer("aaaa")
    codec = TextCodec(tokenizer, most_tokens=1000)
    error = refused(codec, "a" * 4001, chat)
    assert error.param == ("messages" if chat else "prompt")
    assert tokenizer.backend_tokenizer.lengths == []


@pytest.mark.parametrize("chat", [False, True])
def test_giant_text_is_tokenised_no_further_than_shows_that_it_is_too_long(chat: bool) -> None:
    tokenizer = Tokenizer("a" * 1000)
    codec = TextCodec(tokenizer, most_tokens=100_000)
    error = refused(codec, "b" * 10_000_000, chat)
    assert tokenizer.backend_tokenizer.lengths == [800_000]
    assert "(799744 in the messages" in error.message


def test_text_that_may_fit_is_tokenised_as_a_whole() -> None:
    """Its parts are counted first, with room for what cutting it costs."""
    tokenizer = Tokenizer("a" * 1000)
    codec = TextCodec(tokenizer, most_tokens=10_000)
    text = "b" * 10_000
    assert len(asyncio.run(codec.encode(text, add_special_tokens=True))) == 10_000
    assert tokenizer.backend_tokenizer.lengths == [10_000]
    most = 200_000
    codec = TextCodec(tokenizer, most_tokens=most)
    codec_text = "b" * (most + 100)
    assert len(asyncio.run(codec.encode(codec_text, add_special_tokens=True))) == most + 100


def test_a_budget_is_shared_in_order_and_given_back() -> None:
    async def main() -> None:
        budget = Budget(10, max_waiting=2, timeout_s=30, what="work")
        claims = [asyncio.create_task(budget.claim(n)) for n in (6, 8, 4)]
        await asyncio.sleep(0)
        assert [claim.done() for claim in claims] == [True, False, False]  # 4 would fit, but 8 came first
        with pytest.raises(ApiError) as caught:
            await budget.claim(1)
        assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "overloaded", 1.0)
        claims[1].cancel()
        await asyncio.gather(*claims, return_exceptions=True)
        assert await claims[2] == 4
        budget.give_back(6)
        budget.give_back(4)
        assert await budget.claim(1000) == 10  # more than there is: alone
        budget.give_back(10)
        assert await budget.claim(10) == 10

    asyncio.run(main())


def test_a_claim_that_waits_too_long_is_refused_and_holds_nothing() -> None:
    async def main() -> None:
        budget = Budget(10, max_waiting=2, timeout_s=0.01, what="work")
        await budget.claim(10)
        with pytest.raises(ApiError, match="busy with work of other requests"):
            await budget.claim(1)
        budget.give_back(10)
        assert await budget.claim(10) == 10

    asyncio.run(main())


def test_short_texts_pass_long_ones_and_a_client_that_left_holds_its_share_until_its_thread_ends() -> None:
    async def main() -> None:
        lanes = Lanes(ServerLimits(max_tokenising_characters=100_000, tokenise_timeout_s=0.05))
        release, started = threading.Event(), threading.Event()

        def work() -> bool:
            started.set()
            return release.wait(30)

        long = asyncio.create_task(lanes.run(10**6, work))
        await asyncio.to_thread(started.wait, 30)
        assert await lanes.run(30_000, lambda: "short") == "short"
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        with pytest.raises(ApiError, match="busy with long prompts"):
            await lanes.run(50_000, lambda: "long")
        release.set()
        while True:
            try:
                assert await lanes.run(50_000, lambda: "long") == "long"
                break
            except ApiError:
                continue

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("/v1/completions", {"prompt": "b" * 10**6}, 10**6),
        ("/v1/completions", {"prompt": ["a", "b" * 10**6]}, 10**6),
        ("/v1/completions", {"prompt": [1] * 10**6}, 10**6),
        ("/v1/completions", {"prompt": [[1], [1] * 10**6]}, 10**6),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "b" * 10**6}]}, 10**6),
        ("/tokenize", {"prompt": "b" * 10**6}, 10**6),
        ("/tokenize", {"messages": [{"role": "user", "content": "b" * 10**6}]}, 10**6),
    ],
)
def test_giant_prompts_at_every_door(path: str, body: dict[str, Any], tokens: int) -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        response = httpx.post(f"{url}{path}", json=body)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert f"maximum context length is {MAX_MODEL_LEN_TOKENS} tokens" in error["message"]


@pytest.mark.parametrize("kind", ["text", "ids"])
def test_a_prompt_that_is_to_be_cut_may_have_some_contexts(kind: str) -> None:
    for contexts, status in ((3, 200), (1000, 400)):
        prompt = [1] * contexts * MAX_MODEL_LEN_TOKENS if kind == "ids" else "b" * contexts * MAX_MODEL_LEN_TOKENS
        with running_server(FakeGenerator(says("ok"))) as url:
            response = httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "truncate_prompt_tokens": 5})
        assert response.status_code == status


@pytest.mark.parametrize("prompts", [["a"] * 129, [[1]] * 129, ["a"] * 100_000])
def test_prompts_are_counted_before_they_are_tokenised(prompts: list[Any]) -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        response = httpx.post(f"{url}/v1/completions", json={"prompt": prompts})
    assert response.status_code == 400
    assert f"{len(prompts)} prompts" in response.json()["error"]["message"]


# What agents and their libraries search the error for, as their sources have it.
OVERFLOW = {
    "LiteLLM, and by it aider, mini-SWE-agent, smolagents": r"this model's maximum context length is",
    "Cline": r"\bcontext\s*(?:length|window)\b|\bmaximum\s*context\b|\btoo\s*many\s*tokens?\b",
    "opencode": r"maximum context length is \d+ tokens|context[_ ]length[_ ]exceeded",
    "pi": r"reduce the length of the messages",
    "CrewAI": r"maximum context length|context length exceeded|context_length_exceeded",
    "LangChain": r"context_length_exceeded",
    "benchmarks that lower max_tokens": r"maximum context length is (\d+) tokens.*requested (\d+) tokens "
    r"\((\d+) in the messages, (\d+) in the completion\)",
}


@pytest.mark.parametrize("agent", OVERFLOW)
def test_the_overflow_error_has_the_words_that_agents_search(agent: str) -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": "b" * 200}], "max_tokens": 100}
        response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    found = re.search(OVERFLOW[agent], response.text, re.IGNORECASE)
    assert found is not None
    if found.groups():
        context, requested, prompt, completion = map(int, found.groups())
        assert (context, completion, requested) == (MAX_MODEL_LEN_TOKENS, 100, prompt + 100)
        assert prompt > 200


def test_no_overflow_message_looks_like_a_rate_limit() -> None:
    assert "limit" not in overflow_message(4096, 5000, 16)
