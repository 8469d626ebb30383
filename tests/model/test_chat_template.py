"""The template of our checkpoints: ChatML, tools in the Hermes format, and turns that begin as they were generated."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dualpath.model import make_checkpoint

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
QUESTION = {"role": "user", "content": "Where?"}


def calling(*arguments: Any, content: str | None = None) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": "look", "arguments": each}} for each in arguments]
    return {"role": "assistant", "content": content, "tool_calls": calls}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(make_checkpoint(tmp_path_factory.mktemp("tiny"), "llama"))


@pytest.fixture
def render(tokenizer: PreTrainedTokenizerFast) -> Any:
    def text(*messages: dict[str, Any], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    return text


def test_without_tools_it_is_chatml(render: Any) -> None:
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Here."}
    assert render(system, QUESTION, answer, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
        "<|im_start|>assistant\nHere.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(QUESTION) == "<|im_start|>user\nWhere?<|im_end|>\n"


@pytest.mark.parametrize("opening", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_stand_in_the_system_message(render: Any, opening: list[dict[str, Any]]) -> None:
    text = render(*opening, QUESTION, tools=[TOOL, TOOL])
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\n" + "Be brief.\n\n" * len(opening) + "You have these tools")
    assert system.count('{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}\n') == 2
    assert rest == "<|im_start|>user\nWhere?<|im_end|>\n"


def test_calls_and_their_results(render: Any) -> None:
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("a", "b")]
    text = render(QUESTION, calling({"at": "é"}, '{"at":  1}', content="Let me look."), *results, QUESTION)
    assert text.partition("Where?<|im_end|>\n")[2] == (
        '<|im_start|>assistant\nLet me look.\n<tool_call>\n{"name": "look", "arguments": {"at": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "look", "arguments": {"at":  1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n"
    )


def test_a_generated_call_is_written_again_as_it_was(render: Any) -> None:
    prompt = render(QUESTION, tools=[TOOL], add_generation_prompt=True)
    generated = '<tool_call>\n{"name": "look", "arguments": {"at": "home"}}\n</tool_call><|im_end|>'
    result = {"role": "tool", "content": "no"}
    assert render(QUESTION, calling({"at": "home"}), result, tools=[TOOL]).startswith(prompt + generated)


@pytest.mark.slow
@pytest.mark.parametrize("opening", [[], [{"role": "system", "content": "Be brief."}]])
def test_the_real_model_reads_what_its_own_template_writes(real_model: Path, opening: list[dict[str, Any]]) -> None:
    from dualpath.model.real_checkpoint import ORIGINAL_TEMPLATE

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    original = (real_model / ORIGINAL_TEMPLATE).read_text(encoding="utf-8")
    chat = [*opening, QUESTION, {"role": "assistant", "content": "Here."}, QUESTION]
    for turns in (chat[:1], chat[:2], chat):
        ours, theirs = (
            tokenizer.apply_chat_template(turns, chat_template=one, tokenize=False, add_generation_prompt=True)
            for one in (None, original)
        )
        assert ours == theirs
