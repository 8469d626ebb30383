"""Engines of several workers, and nodes of several engines, answer as one plain vLLM server of one worker does."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from test_equal_answers import cached, complete, ids
from vllm_models import Pair
from vllm_servers import VLLM_PYTHON, cluster, figures, plain_vllm

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
DTYPE = ("--dtype", "float32")
KINDS = {
    "tensor parallel": ("1P1D", ("--tensor-parallel-size", "2")),
    "two decode engines on a node": ("1Px1+1Dx2", ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_turns_of_four_agents_at_once(kind: str, tmp_path: Path) -> None:
    if not VLLM_PYTHON.exists():
        pytest.skip("there is no .venv-vllm: make setup-vllm")
    topology, arguments = KINDS[kind]
    pair = Pair("qwen3", tmp_path)
    first = [pair.prompt(tokens) for tokens in (90, 333, 700, 64)]
    with plain_vllm(pair.model, tmp_path / "plain.log", *DTYPE, "--block-size", "64") as plain:
        expected = [ids(complete(plain, prompt, 70)) for prompt in first]
        second = [prompt + ids_[0] + pair.prompt(37) for prompt, ids_ in zip(first, expected, strict=True)]
        expected += [ids(complete(plain, prompt, 70)) for prompt in second]
    with cluster(pair.model, tmp_path, "--topology", topology, *DTYPE, vllm=arguments) as (url, _):
        with ThreadPoolExecutor(len(first)) as threads:
            turns = [list(threads.map(lambda prompt: complete(url, prompt, 70), each)) for each in (first, second)]
        assert [ids(answer) for turn in turns for answer in turn] == expected
        stored = [(len(prompt) + 70 - 1) // 64 * 64 for prompt in first]  # the last token has no KV yet
        assert [cached(answer) for answer in turns[1]] == stored
        assert set(figures(url, "dualpath_buffer_held_blocks").values()) == {0.0}
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "ok"
