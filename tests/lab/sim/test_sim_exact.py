"""The closed forms against the exact mode, where every block, layer and step is an event and CNICs share max-min."""

import pytest
from small_cluster import machine_of, simulate, some_agents

pytestmark = pytest.mark.slow


def mean(values: "list[float]") -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("preset", "model"),
    [("ds27b-1p1d", None), ("qwen32b-1p2d", None), ("ds660b-2p4d", None), ("qwen32b-1p2d", "gpt-oss-120b")],
)
@pytest.mark.parametrize("system", ["basic", "basic-layerwise", "dualpath", "dualpath-split", "oracle"])
def test_within_two_percent(preset: str, model: str | None, system: str) -> None:
    machine, agents = machine_of(preset, model=model), some_agents(40, 8)
    fast, exact = (simulate(machine, system, agents, exact=exact).measured for exact in (False, True))
    assert fast.finished == exact.finished == 320
    assert mean(fast.latency_s) == pytest.approx(mean(exact.latency_s), rel=0.02)
    assert mean(fast.ttft_s) == pytest.approx(mean(exact.ttft_s), rel=0.02)
    assert sum(fast.agent_jct_s) == pytest.approx(sum(exact.agent_jct_s), rel=0.02)
