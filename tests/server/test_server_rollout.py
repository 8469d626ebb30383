"""Token ids in and out: /inference/v1/generate as vLLM's clients use it, /generate as SGLang's do."""

import json
from typing import Any

import httpx
import pytest
from fake_cluster import EOS, MAX_MODEL_LEN_TOKENS, FakeGenerator, ids, running_server, says

from dualpath.cluster.generator import GeneratedTokens, PromptLogprob, TokenLogprob

PROMPT = ids("hello")


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=30)


def events(url: str, path: str, body: dict[str, Any]) -> list[Any]:
    text = post(url, path, body | {"stream": True}).text
    return [data if data == "[DONE]" else json.loads(data) for data in text.replace("data: ", "").split("\n\n")[:-1]]


class TestVllm:
    path = "/inference/v1/generate"

    def body(self, **sampling: Any) -> dict[str, Any]:
        return {"token_ids": PROMPT, "sampling_params": sampling, "request_id": "mine"}

    def test_token_ids_and_log_probabilities(self) -> None:
        cluster = FakeGenerator(says("ab", cached_tokens=2))
        with running_server(cluster) as url:
            answer = post(url, self.path, self.body(logprobs=1, temperature=0.5, top_p=0.9, seed=5)).json()
        asked = cluster.requests[0]
        assert (asked.prompt_token_ids, asked.request_id) == (PROMPT, "mine")
        assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.seed) == (0.5, 0.9, 5)
        assert asked.sampling.max_tokens == MAX_MODEL_LEN_TOKENS - len(PROMPT)  # not completions' 16
        (choice,) = answer["choices"]
        assert answer["request_id"] == "mine"
        assert (choice["token_ids"], choice["finish_reason"]) == ([*ids("ab"), EOS], "stop")
        first = choice["logprobs"]["content"][0]
        assert (first["token"], first["logprob"]) == (f"token_id:{ids('a')[0]}", -0.5)
        assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5]
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}

    def test_streamed(self) -> None:
        body = self.body(n=2, max_tokens=2) | {"stream_options": {"include_usage": True}}
        with running_server(FakeGenerator(says("abc", finish_reason="length"))) as url:
            *chunks, usage, done = events(url, self.path, body)
        assert done == "[DONE]"
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
        for index in (0, 1):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert [token for choice in own for token in choice["token_ids"]] == ids("ab")
            assert [choice["finish_reason"] for choice in own] == [None, "length"]

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"token_ids": "text"}, "token_ids"),
            ({"token_ids": [[1], [2]]}, "token_ids"),
            ({"token_ids": []}, "token_ids"),
            ({"token_ids": [10**6]}, "token_ids"),
            ({"features": {"mm_hashes": {}}}, "features"),
            ({"sampling_params": {"temperature": -1}}, "temperature"),
            ({"sampling_params": {"max_tokens": "x"}}, "max_tokens"),
            ({"sampling_params": {"use_beam_search": True}}, "use_beam_search"),
            ({"request_id": "x" * 1000}, "rid"),
        ],
    )
    def test_what_is_wrong_is_named(self, change: dict[str, Any], param: str) -> None:
        with running_server(FakeGenerator(says("ab"))) as url:
            answer = post(url, self.path, self.body() | change)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


class TestSglang:
    path = "/generate"

    def body(self, **more: Any) -> dict[str, Any]:
        return {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4, "temperature": 0.7}, **more}

    def test_text_ids_and_meta_info(self) -> None:
        cluster = FakeGenerator(says("ab", cached_tokens=2))
        with running_server(cluster) as url:
            answer = post(url, self.path, self.body(return_logprob=True, top_logprobs_num=2, rid="r1")).json()
        assert (cluster.requests[0].sampling.max_tokens, cluster.requests[0].sampling.temperature) == (4, 0.7)
        assert cluster.requests[0].request_id == "r1"
        meta = answer["meta_info"]
        assert (answer["text"], answer["output_ids"]) == ("ab", [*ids("ab"), EOS])
        assert meta["output_token_logprobs"] == [[-0.5, token, None] for token in answer["output_ids"]]
        assert [len(top) for top in meta["output_top_logprobs"]] == [2, 2, 2]
        assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
        assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == ("r1", 5, 3, 2)
        assert meta["weight_version"] == "default"

    def test_sampling_parameters_by_their_names_there(self) -> None:
        cluster = FakeGenerator(says("ab"))
        params = {"min_new_tokens": 2, "sampling_seed": 7, "min_p": 0.1, "frequency_penalty": 0.5, "regex": "[ab]+"}
        with running_server(cluster) as url:
            post(url, self.path, {"input_ids": PROMPT, "sampling_params": params | {"top_k": -1, "n": 2}})
            raw = {"logprobs_mode": "raw_logprobs"}
            post(url, self.path, {"input_ids": PROMPT, "sampling_params": raw, "return_logprob": True})
            post(url, "/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": {"logprobs": 1}})
            post(url, "/inference/v1/generate", {"token_ids": PROMPT, "sampling_params": raw | {"logprobs": 1}})
            post(url, "/v1/completions", {"prompt": PROMPT, "logprobs": 1})
        first = cluster.requests[0].sampling
        assert (first.min_tokens, first.min_p, first.frequency_penalty, first.top_k) == (2, 0.1, 0.5, 0)
        assert first.grammar and [request.sampling.seed for request in cluster.requests[:2]] == [7, 8]
        as_sampled, raw_mode = "processed_logprobs", "raw_logprobs"
        modes = [request.sampling.logprobs_mode for request in cluster.requests]
        assert modes == [as_sampled, as_sampled, raw_mode, as_sampled, raw_mode, raw_mode]

    def test_log_probabilities_of_the_prompt(self) -> None:
        scores = [PromptLogprob(1, [TokenLogprob(token, -0.25)]) for token in PROMPT[1:]]
        step = GeneratedTokens(
            token_ids=[EOS],
            logprobs=[[TokenLogprob(EOS, -0.5)]],
            prompt_logprobs=scores,
            finish_reason="stop",
        )
        with running_server(FakeGenerator(lambda _request: [step])) as url:
            whole, end = (
                post(url, self.path, self.body(return_logprob=True, logprob_start_len=first)).json()["meta_info"]
                for first in (0, 3)
            )
            vllm = {"token_ids": PROMPT, "sampling_params": {"prompt_logprobs": 0}}
            other = post(url, "/inference/v1/generate", vllm).json()["prompt_logprobs"]
        assert whole["input_token_logprobs"] == [[None, PROMPT[0], None]] + [[-0.25, t, None] for t in PROMPT[1:]]
        assert end["input_token_logprobs"] == [[-0.25, token, None] for token in PROMPT[3:]]
        assert other[0] is None and [next(iter(entry.values()))["logprob"] for entry in other[1:]] == [-0.25] * 4

    def test_defaults_and_what_does_not_fit(self) -> None:
        cluster = FakeGenerator(says("ab"))
        with running_server(cluster) as url:
            post(url, self.path, {"text": "hello"})
            post(url, self.path, {"text": "hello", "sampling_params": {"max_new_tokens": 10**6}})
        assert [request.prompt_token_ids for request in cluster.requests] == [PROMPT, PROMPT]
        room = MAX_MODEL_LEN_TOKENS - len(PROMPT)
        assert [request.sampling.max_tokens for request in cluster.requests] == [128, room]

    @pytest.mark.parametrize("prompts", [{"text": ["hello", "you"]}, {"input_ids": [PROMPT, ids("you")]}])
    def test_several_prompts_are_a_list(self, prompts: dict[str, Any]) -> None:
        cluster = FakeGenerator(says("ab"))
        with running_server(cluster) as url:
            answers = post(
                url, self.path, prompts | {"rid": ["a", "b"], "sampling_params": {"max_new_tokens": 1}}
            ).json()
        assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b"]
        assert [answer["meta_info"]["finish_reason"] for answer in answers] == [{"type": "length", "length": 1}] * 2
        assert [request.request_id for request in sorted(cluster.requests, key=lambda r: r.request_id)] == ["a", "b"]

    def test_each_event_has_all_up_to_it(self) -> None:
        with running_server(FakeGenerator(says("abc", finish_reason="length"))) as url:
            *seen, done = events(url, self.path, self.body(return_logprob=True))
        assert done == "[DONE]"
        assert [event["text"] for event in seen] == ["a", "ab", "abc"]
        assert [len(event["meta_info"]["output_token_logprobs"]) for event in seen] == [1, 2, 3]
        assert [bool(event["meta_info"]["finish_reason"]) for event in seen] == [False, False, True]

    def test_an_aborted_request_has_what_came_before(self) -> None:
        token = ids("a")[0]
        script = [
            GeneratedTokens(token_ids=[token], logprobs=[[TokenLogprob(token, -1.0)]]),
            GeneratedTokens(token_ids=[], finish_reason="abort"),
        ]
        with running_server(FakeGenerator(lambda _request: list(script))) as url:
            answer = post(url, self.path, self.body(return_logprob=True)).json()
        assert answer["text"] == "a"
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert answer["meta_info"]["output_token_logprobs"] == [[-1.0, token, None]]

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"text": "both"}, "text"),
            ({"input_ids": None}, "text"),
            ({"input_ids": []}, "input_ids"),
            ({"input_ids": ["x"]}, "input_ids"),
            ({"image_data": ["x"]}, "image_data"),
            ({"return_hidden_states": True}, "return_hidden_states"),
            ({"rid": ["a", "b"]}, "rid"),
            ({"top_logprobs_num": 10**9, "return_logprob": True}, "top_logprobs_num"),
            ({"sampling_params": {"stop_regex": "x"}}, "stop_regex"),
            ({"sampling_params": {"max_new_tokens": -1}}, "max_new_tokens"),
            ({"sampling_params": {"json_schema": "{"}}, "json_schema"),
            ({"sampling_params": {"n": 10**6}}, "n"),
        ],
    )
    def test_what_is_wrong_is_named(self, change: dict[str, Any], param: str) -> None:
        with running_server(FakeGenerator(says("ab"))) as url:
            answer = post(url, self.path, self.body() | change)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
