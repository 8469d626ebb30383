"""A real model through `dualpath serve`: its tokens are Transformers' own, turn after turn, and it makes sense."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from .test_serve import serving

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {"model": "smollm2", "max_tokens": 16, "temperature": 0}
CHATS = {
    "facts": ("What is the capital of France?", "And of Italy?", "Which of the two is older?"),
    "code": ("Write a Python function that adds two numbers.", "Now make it multiply them.", "Thank you."),
    "rules": ("A rule: " + "use short words. " * 50 + "What is a tree?", "What is a river?", "What is snow?"),
}
BLOCK_TOKENS = 64


@pytest.fixture(scope="module")
def url(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = tmp_path_factory.mktemp("real")
    with serving(real_model, where, "--name", "smollm2", "--buffer", "256MiB", "--hbm", "512MiB") as (url, _process):
        yield url


@pytest.fixture(scope="module")
def reference(real_model: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # two, beside other tests, wait for each other
    network = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()

    def generate(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        whole = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=SETTINGS["max_tokens"], do_sample=False
        )
        return [int(token) for token in whole[0, len(prompt) :]]

    return generate


@pytest.mark.parametrize("chat", CHATS)
def test_every_turn_has_the_tokens_of_transformers(url: str, reference: Any, chat: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = []
    before = 0
    for question in CHATS[chat]:
        messages.append({"role": "user", "content": question})
        answer = client.chat.completions.create(messages=messages, extra_body={"return_token_ids": True}, **SETTINGS)
        prompt, choice = answer.prompt_token_ids, answer.choices[0]  # type: ignore[attr-defined]
        assert choice.token_ids == reference(prompt)  # type: ignore[attr-defined]
        assert answer.usage.prompt_tokens_details.cached_tokens == before // BLOCK_TOKENS * BLOCK_TOKENS
        before = len(prompt) + len(choice.token_ids) - 1  # the KV of the last token was never computed
        messages.append({"role": "assistant", "content": choice.message.content})
    assert "Paris" in messages[1]["content"] or chat != "facts"


def test_the_agent_of_the_examples_finds_the_answer(url: str) -> None:
    shown = run("examples/agent.py", "--url", f"{url}/v1")
    *turns, answer = shown.splitlines()
    assert answer == "smollm2 says: 12 apples, 30 pears"
    cached = [int(line.split(", ")[1].split()[0]) for line in turns if " cached: " in line]
    assert len(cached) == 3 and 0 < cached[1] < cached[2]  # each turn finds the KV of the one before


@pytest.mark.parametrize("client", ["openai_python", "anthropic_python"])
def test_a_client_runs_unchanged(url: str, client: str) -> None:
    """Those that the development environment has; ``make clients`` runs all."""
    assert run(f"benchmarks/clients/{client}.py", url, SETTINGS["model"])


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / script), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
