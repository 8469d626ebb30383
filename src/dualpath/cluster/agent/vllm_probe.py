"""How fast a vLLM server prefills: the scheduler's β needs it before the first request, in an agent's terms.

As an engine of our own does it (`engines/prefill.py`): a typical turn of an agent, most of which is a hit, twice; the
second, warm run counts. The whole way is tried: pages, connector, HTTP. Only nothing is shipped.
"""

import asyncio
import time

from dualpath.cluster import vllm_attachment as v
from dualpath.cluster.agent.host import EngineHost
from dualpath.cluster.agent.vllm_client import VllmAnswerError
from dualpath.cluster.agent.vllm_engine import VllmEngine
from dualpath.core.vocabulary import BLOCK_TOKENS

HIT_TOKENS = 2048
NEW_TOKENS = 64
PROBE_S = 600.0
REQUEST = (1 << 62) - 1
"""No coordinator counts so far."""


async def measure_tokens_per_s(host: EngineHost, engine: VllmEngine) -> float:
    """Returns prompt tokens per second, hits included. Raises ValueError when the server can't prefill."""
    longest = engine.facts.max_model_len_tokens - 1  # the server adds a token
    new_tokens = min(NEW_TOKENS, longest)
    most_blocks = (HIT_TOKENS // BLOCK_TOKENS, (longest - new_tokens) // BLOCK_TOKENS, host.buffer_blocks - 1)
    hit_tokens = min(most_blocks) * BLOCK_TOKENS
    tokens = hit_tokens + new_tokens
    pages = host.pool.allocate(REQUEST, hit_tokens // BLOCK_TOKENS + 1)
    elapsed_ns: int = 1
    try:
        async with asyncio.timeout(PROBE_S):
            for run in range(2):
                owner = (REQUEST, run)
                engine.tell(v.Expect(owner, pages, hit_tokens, tokens))
                engine.tell(v.LayersReady(owner, host.layout.layers))
                started_ns = time.monotonic_ns()
                await engine.server.prefill(owner, [run] * tokens, hit_tokens)
                elapsed_ns = time.monotonic_ns() - started_ns
                await engine.drop(owner)
    except TimeoutError:
        raise ValueError(f"{engine.said.url} did not compute a prompt of {tokens} tokens in {PROBE_S:.0f} s") from None
    except VllmAnswerError as error:
        raise ValueError(f"its server can't prefill: {error}") from error
    finally:
        host.pool.free(REQUEST, pages)
    return float(tokens * 1e9 / elapsed_ns)
