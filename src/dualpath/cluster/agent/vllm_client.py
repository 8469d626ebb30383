"""What an agent asks of its vLLM server over HTTP: whether it serves, and to compute a prompt's KV."""

import os

import httpx

from dualpath.cluster.attachment import Owner

API_KEY_VARIABLE = "VLLM_API_KEY"
CONNECT_S = 5.0
HEALTH_S = 5.0
MAX_ERROR_CHARACTERS = 500
"""Of a server's own words, in ours."""


class VllmAnswerError(Exception):
    """The server has answered with an error, or not at all."""


class VllmClient:
    """Used from one asyncio thread. No proxy stands between an agent and its server."""

    def __init__(self, url: str, model: str, dp_rank: int | None) -> None:
        self._url, self._model = url.rstrip("/"), model
        headers = {"X-data-parallel-rank": str(dp_rank)} if dp_rank is not None else {}
        if key := os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx.AsyncClient(
            trust_env=False,
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),  # core bounds the prompts that an engine has
            verify=url.startswith("https:"),
        )

    async def healthy(self) -> bool:
        try:
            return (await self._http.get(f"{self._url}/health", timeout=HEALTH_S)).is_success
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    async def prefill(self, owner: Owner, token_ids: list[int], hit_tokens: int) -> None:
        """Have the prompt computed; its one token is of no use. Whoever waits sets the deadline, and ends it by
        cancelling. Raises VllmAnswerError.
        """
        body = {
            "model": self._model,
            "prompt": token_ids,
            "max_tokens": 1,
            "temperature": 0.0,
            "kv_transfer_params": {"dualpath": {"owner": owner, "hit_tokens": hit_tokens}},
        }
        try:
            answer = await self._http.post(f"{self._url}/v1/completions", json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise VllmAnswerError(f"{self._url} does not answer: {error!r}") from error
        if not answer.is_success:
            text = answer.text[:MAX_ERROR_CHARACTERS]
            raise VllmAnswerError(f"{self._url} answers with status {answer.status_code}: {text}")

    async def close(self) -> None:
        await self._http.aclose()
