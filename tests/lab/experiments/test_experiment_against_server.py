"""An experiment's client and its reading of /metrics against the project's own server, over a scripted cluster."""

import asyncio
import contextlib

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dualpath.client.replay import replay
from dualpath.client.rollout import ReplayOptions
from dualpath.cluster.generator import GeneratedTokens, ModelFacts, RequestError
from dualpath.lab.experiments.nic_bytes import NicBytes, nic_meter
from dualpath.server import bind, create_app, serve
from dualpath.traces.trajectory import Round, Trajectory


class ScriptedCluster:
    """Generates 7, 8, 9, …; two tokens to a step after the first; says that 64 prompt tokens were loaded."""

    def __init__(self):
        self.requests = []
        self.errors = []
        self.model = ModelFacts(
            name="tiny", path="/models/tiny", max_model_len_tokens=4096, vocab_size=259, eos_token_ids=(256,)
        )

    async def generate(self, request):
        self.requests.append(request)
        if self.errors:
            raise self.errors.pop()
        tokens = [7 + i for i in range(request.sampling.max_tokens)]
        loaded = 64 if len(request.prompt_token_ids) > 64 else 0
        for step in (tokens[:1], *(tokens[i : i + 2] for i in range(1, len(tokens), 2))):
            await asyncio.sleep(0.01)
            reason = "length" if step[-1] == tokens[-1] else None
            yield GeneratedTokens(token_ids=step, finish_reason=reason, cached_tokens=loaded)

    def health(self):
        return {"status": "ok", "engines": []}

    def gauges(self):
        labels = 'engine="3",role="decode",nic="snic",direction="rx",traffic_class="low",node="n"'
        return {f"dualpath_nic_bytes_total{{{labels}}}": 123456789.0, "dualpath_requests_live": 0.0}


@contextlib.asynccontextmanager
async def serving(cluster):
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    app = create_app(cluster, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>"))
    bound = asyncio.get_running_loop().create_future()
    running = asyncio.create_task(serve(app, bind("127.0.0.1", 0), on_bound=bound.set_result))
    try:
        yield f"http://127.0.0.1:{await asyncio.wait_for(bound, 20)}/v1"
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
def cluster():
    return ScriptedCluster()


def test_a_replay_gets_from_our_server_what_it_needs(cluster):
    one = Trajectory(
        id="a", rounds=(Round(append_tokens=60, generate_tokens=6), Round(append_tokens=10, generate_tokens=3))
    )

    async def main():
        async with serving(cluster) as url:
            return await replay(url, [one], ReplayOptions())

    result = asyncio.run(main())
    assert result.failures == ()
    assert [(turn.prompt_tokens, turn.loaded_tokens, turn.generated_tokens) for turn in result.turns] == [
        (60, 0, 6),
        (76, 64, 3),
    ]
    first, second = cluster.requests
    assert second.prompt_token_ids[:66] == [*first.prompt_token_ids, 7, 8, 9, 10, 11, 12]
    sampling = first.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos, sampling.temperature) == (6, 6, True, 0)


def test_a_cluster_that_is_full_for_a_moment_is_tried_again(cluster):
    cluster.errors = [RequestError(429, "overloaded", "too many requests wait", retry_after_s=0.01)]
    one = Trajectory(id="a", rounds=(Round(append_tokens=60, generate_tokens=2),))

    async def main():
        async with serving(cluster) as url:
            return await replay(url, [one], ReplayOptions(retry_delay_s=0.01))

    result = asyncio.run(main())
    assert (len(result.turns), result.retries, result.failures) == (1, 1, ())


def test_nic_bytes_are_read_from_our_metrics(cluster):
    async def main():
        async with serving(cluster) as url, nic_meter(url) as meter:
            return await meter.read()

    nothing = NicBytes('dualpath_nic_bytes_total{engine="3",role="decode",nic="snic",direction="rx"} 0\n')
    assert asyncio.run(main()).snic_received_since(nothing) == {"DE0": 123456789}
