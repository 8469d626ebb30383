"""A cluster without engines for the server's tests, and the server itself on a real port.

`FakeGenerator` plays a script of steps for each request and records what the server asked and closed, so that a test
can see a cancellation arrive.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fake_control import FakeControl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dualpath.cluster.generator import GeneratedTokens, GenerateRequest, ModelFacts, PromptLogprob, TokenLogprob
from dualpath.model.checkpoint import CHATML_TEMPLATE
from dualpath.server import bind, create_app, serve
from dualpath.server.request_log import Observer, RequestLog
from dualpath.spec.generation_defaults import GenerationDefaults
from dualpath.spec.metrics import Figures

MAX_MODEL_LEN_TOKENS = 256
VOCABULARY_TOKENS = 300
"""More than the tokenizer has (259), as models pad their embedding."""


def byte_tokenizer() -> Any:
    """One token per byte, ChatML's special tokens, no merges: token positions are byte positions."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHATML_TEMPLATE)


TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.convert_tokens_to_ids("<|im_end|>")


def ids(text: str) -> list[int]:
    return list(TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids)


Script = Callable[[GenerateRequest], list[GeneratedTokens | Exception | threading.Event]]


def says(text: str, *, tokens_per_step: int = 1, finish_reason: str = "stop", cached_tokens: int = 0) -> Script:
    """A script that generates `text`, cut off at max_tokens, then an end-of-sequence token if it may stop there."""

    def script(request: GenerateRequest) -> list[GeneratedTokens | Exception | threading.Event]:
        tokens = ids(text) + ([EOS] if finish_reason == "stop" else [])
        limit = request.sampling.max_tokens
        reason = finish_reason if len(tokens) <= limit else "length"
        tokens = tokens[:limit]
        starts = range(0, len(tokens), tokens_per_step)
        return [
            GeneratedTokens(
                token_ids=(part := tokens[start : start + tokens_per_step]),
                logprobs=_logprobs(part, request.sampling.logprobs),
                finish_reason=reason if start == starts[-1] else None,
                cached_tokens=cached_tokens,
                prompt_logprobs=_prompt_logprobs(request) if start == 0 else None,
            )
            for start in starts
        ]

    return script


def _prompt_logprobs(request: GenerateRequest) -> list[PromptLogprob] | None:
    """Each prompt token is the second best; the best ones are those after it in the alphabet."""
    top = request.sampling.prompt_logprobs
    if top is None:
        return None
    return [
        PromptLogprob(2, [TokenLogprob(token, -1.5), *(TokenLogprob((token + i) % 256, -i) for i in range(1, top + 1))])
        for token in request.prompt_token_ids[1:]
    ]


def _logprobs(tokens: list[int], top: int | None) -> list[list[TokenLogprob]] | None:
    if top is None:
        return None
    return [
        [TokenLogprob(token, -0.5), *(TokenLogprob((token + i) % 256, -0.5 - i) for i in range(top))]
        for token in tokens
    ]


class FakeGenerator:
    """`Generator` by script. An Exception in a script is raised there; an Event is waited for there."""

    def __init__(self, script: Script, defaults: GenerationDefaults | None = None) -> None:
        self.script = script
        self.defaults = defaults or GenerationDefaults()
        self.requests: list[GenerateRequest] = []
        self.open = 0
        self._kept: list[AsyncIterator[GeneratedTokens]] = []  # or the garbage collector would close what nobody did
        self.all_closed = threading.Event()
        self.all_closed.set()
        self.status = "ok"
        self.numbers: Figures = {}
        self.max_model_len_tokens = MAX_MODEL_LEN_TOKENS
        self.control = FakeControl()

    @property
    def model(self) -> ModelFacts:
        return ModelFacts(
            name="tiny",
            path="/models/tiny",
            max_model_len_tokens=self.max_model_len_tokens,
            vocab_size=VOCABULARY_TOKENS,
            eos_token_ids=(EOS,),
            defaults=self.defaults,
        )

    def generate(self, request: GenerateRequest) -> AsyncIterator[GeneratedTokens]:
        steps = self._steps(request)
        self._kept.append(steps)
        return steps

    async def _steps(self, request: GenerateRequest) -> AsyncIterator[GeneratedTokens]:
        self.requests.append(request)
        self.open += 1
        self.all_closed.clear()
        try:
            for step in self.script(request):
                await asyncio.sleep(0)
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, threading.Event):
                    while not step.is_set():
                        await asyncio.sleep(0.005)
                else:
                    yield step
        finally:
            self.open -= 1
            if not self.open:
                self.all_closed.set()

    def health(self) -> dict[str, object]:
        return {"status": self.status, "engines": []}

    def gauges(self) -> Figures:
        return self.numbers


@contextlib.contextmanager
def running_server(
    generator: FakeGenerator,
    tokenizer: Any = TOKENIZER,
    *,
    drain_s: float = 2.0,
    observers: tuple[Observer, ...] = (),
    tls: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[str]:
    """The app on a free port, in a thread with its own loop; gives its address and shuts down gracefully."""
    ready = threading.Event()
    state: dict[str, Any] = {}

    async def main() -> None:
        def on_bound(port: int) -> None:
            state["port"] = port
            ready.set()

        state["loop"] = asyncio.get_running_loop()
        state["task"] = asyncio.current_task()
        with contextlib.suppress(asyncio.CancelledError):
            app = RequestLog(create_app(generator, tokenizer, **options), observers)
            await serve(app, bind("127.0.0.1", 0), on_bound=on_bound, drain_s=drain_s, tls=tls)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert ready.wait(30), "the server did not start"
        yield f"http://127.0.0.1:{state['port']}"
    finally:
        state["loop"].call_soon_threadsafe(state["task"].cancel)
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"
