"""What reading a chat's answer costs a token: from the cluster's step to the bytes of its event.

Each row generates the same number of tokens of one kind of text through `run_choice`'s parts and a streaming
`ChatWriter`, and gives the median of several rounds, the kinds in turn. ``plain`` has no parser at all: what a chat
without tools and reasoning costs.

    python benchmarks/chat_parsing.py [--tokens 4000] [--rounds 9]
"""

import argparse
import statistics
import time
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dualpath.cluster.generator import GeneratedTokens, GenerateRequest
from dualpath.server.answers import ChatWriter
from dualpath.server.chat.formats import find_call_format, find_reasoning_format
from dualpath.server.chat.parsing import ReadingPlan
from dualpath.server.codec import TextCodec
from dualpath.server.generation import ChoiceText, MessageOfChoice
from dualpath.server.requests import CheckedRequest, Choice
from dualpath.spec.sampling import SamplingParams


def tokenizer() -> Any:
    """Bytes, with no merges: what decoding costs is the same for every kind of text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()

    class Fast:
        backend_tokenizer = made

    return Fast()


def prose(length: int) -> str:
    return ("The tests of the scheduler are in tests/core. " * (length // 40 + 1))[:length]


def kinds(tokens: int) -> dict[str, tuple[str, ReadingPlan | None]]:
    hermes, coder = find_call_format("hermes", ""), find_call_format("qwen3_coder", "")
    think = find_reasoning_format("qwen3", "")
    arguments = '{"command": "' + prose(tokens).replace(".", '. \\"x\\"')[:tokens] + '"}'
    return {
        "plain": (prose(tokens), None),
        "content, tools offered": (prose(tokens), ReadingPlan(calls=hermes, reasoning=think)),
        "reasoning": (prose(tokens), ReadingPlan(calls=hermes, reasoning=think, reasoning_open=True)),
        "arguments, JSON": (
            f'<tool_call>\n{{"name": "run", "arguments": {arguments}}}\n</tool_call>',
            ReadingPlan(calls=hermes, reasoning=think),
        ),
        "arguments, tagged": (
            f"<tool_call>\n<function=run>\n<parameter=command>\n{prose(tokens)}\n</parameter>\n</function>\n</tool_call>",
            ReadingPlan(calls=coder, reasoning=think),
        ),
    }


def seconds(codec: TextCodec, text: str, plan: ReadingPlan | None) -> tuple[float, int]:
    """Returns the CPU time that one answer takes, and its tokens."""
    ids = codec._encode(text, False)
    request = GenerateRequest(prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=len(ids)))
    choice = Choice(0, 0, request)
    checked = CheckedRequest(
        prompts=[[1, 2, 3]],
        choices=[choice],
        stop=(),
        skip_special_tokens=True,
        stream=True,
        include_usage=False,
        return_token_ids=False,
        return_timings=False,
        logprobs=None,
        is_chat=True,
        reading=plan,
    )
    steps = [GeneratedTokens(token_ids=[token]) for token in ids]
    texts, message = ChoiceText(codec, choice, (), True), MessageOfChoice(plan)
    writer = ChatWriter("model", checked, codec)
    begin = time.process_time()
    for step in steps:
        piece = texts.take(step)
        message.read(piece)
        writer.event(piece)
    return time.process_time() - begin, len(ids)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    codec = TextCodec(tokenizer())
    taken: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, (text, plan) in kinds(options.tokens).items():
            spent, tokens = seconds(codec, text, plan)
            taken.setdefault(name, []).append(spent / tokens * 1e6)
    for name, values in taken.items():
        print(f"{name:24} {statistics.median(values):6.2f} µs a token (least {min(values):.2f})")


if __name__ == "__main__":
    main()
