"""Half a character in a body: what JavaScript sends of an emoji that was cut."""

import httpx
import pytest
from fake_cluster import FakeGenerator, running_server, says


@pytest.mark.parametrize("half", [r"\ud83d", r"x\ud83d.", r"\ude00", r"\ud83d\ud83d\ude00"])
def test_half_a_character_is_called_that(half: str) -> None:
    with running_server(FakeGenerator(says("ok"))) as url:
        for body in (rf'{{"prompt": "{half}"}}', rf'{{"prompt": "x", "user": "{half}", "model": "{half}"}}'):
            error = httpx.post(f"{url}/v1/completions", content=body).json()["error"]
            assert error["code"] == "invalid_json" and "is half of a character" in error["message"]
        whole = r'{"prompt": "\ud83d\ude00 \\ud83d"}'
        assert httpx.post(f"{url}/v1/completions", content=whole).status_code == 200
