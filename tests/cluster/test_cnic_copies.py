"""An engine's copies through its CNIC's loop: bytes, what the lanes count, and what follows when the loop fails."""

import asyncio
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.cluster import messages as m
from dualpath.cluster.config import ClusterConfig
from dualpath.cluster.engines.cnic_copies import CnicCopies, device_copies
from dualpath.cluster.local import Cluster
from dualpath.core.vocabulary import Role
from dualpath.model import DeviceCopiesError, LoadedModel, MemcpyCopies, PagedDecode
from dualpath.model.device_copies import Piece
from dualpath.spec.sampling import SamplingParams
from dualpath.transfer.transports.nixl.agent import LIBRARIES, Agent

from .conftest import cluster_config, fresh_gauges, in_cluster
from .engine_bench import Bench, bench
from .test_token_equality import TURNS, Reference, appended, converse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(map(find_spec, LIBRARIES)), reason="NIXL (dualpath[nixl]) is not installed"),
]
Checkpoint = Callable[[str], Path]
CPU = torch.device("cpu")


def test_the_setting_chooses() -> None:
    assert isinstance(device_copies(ClusterConfig(model="m", store="s"), CPU), MemcpyCopies)
    assert isinstance(device_copies(ClusterConfig(model="m", store="s", device_copies="cnic"), CPU), CnicCopies)


def test_scattered_and_contiguous_pieces_arrive() -> None:
    """Of device memory ``[rows, 2, heads, dim]`` with heads apart, and ``[rows, elements]`` as it comes."""
    heads, dim, rows = 3, 8, 40
    apart = torch.zeros((2, heads, rows, dim)).permute(2, 0, 1, 3)
    plain = torch.zeros((rows, 2 * heads * dim))
    host = torch.zeros((4, rows, 2 * heads * dim))
    copies = CnicCopies(CPU)
    let_go = copies.hold(apart, plain, host)

    @settings(max_examples=60, deadline=None)
    @given(
        spans=st.lists(st.tuples(st.booleans(), st.integers(0, rows), st.integers(0, rows)), max_size=4),
        to_device=st.booleans(),
        seed=st.integers(0, 2**31),
    )
    def check(spans: list[tuple[bool, int, int]], to_device: bool, seed: int) -> None:
        torch.manual_seed(seed)
        for one in (apart, plain, host):
            one.copy_(torch.rand(one.shape))
        pieces: list[Piece] = []
        free = [0, 0]
        for i, (scattered, gap, count) in enumerate(spans):
            memory = apart if scattered else plain
            first = min(rows, free[scattered] + gap)
            device = memory[first : first + count]
            free[scattered] = first + len(device)
            pieces.append((device, host[i, : len(device)].view(device.shape)))
        before = [[one.clone() for one in piece] for piece in pieces]
        (copies.to_device if to_device else copies.to_host)(pieces)
        for (device, near), (old_device, old_near) in zip(pieces, before, strict=True):
            assert torch.equal(device, old_near if to_device else old_device)
            assert torch.equal(near, old_near if to_device else old_device)

    check()
    let_go()
    with pytest.raises(DeviceCopiesError):
        copies.to_device([(plain[:3], host[0, :3])])


@pytest.mark.parametrize("architecture", ["qwen3", "deepseek_v3"])
def test_an_engine_sleeps_wakes_and_copies_again(checkpoint: Checkpoint, architecture: str) -> None:
    model = LoadedModel.load(str(checkpoint(architecture)), device="cpu", dtype="float32", threads=1)
    copies = CnicCopies(CPU)
    decode = PagedDecode(model, 4, copies)
    pages = torch.zeros((2, model.layout.full_block_bytes), dtype=torch.uint8)
    copies.hold(pages)
    for seed in range(2):
        decode.admit(seed, 70, 1, SamplingParams(max_tokens=5))
        torch.manual_seed(seed)
        pages[0] = torch.randint(0, 256, pages[0].shape, dtype=torch.uint8)
        decode.fill_block(seed, 0, pages[0].numpy(), 64)
        decode.copy_block(seed, 0, pages[1].numpy())
        assert torch.equal(pages[0], pages[1])
        decode.release(seed)
        decode.release_memory()
        decode.restore_memory()


def test_an_error_names_the_setting_and_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "self")
    with pytest.raises(DeviceCopiesError, match=r"^--device-copies cnic: NIXL .*; --device-copies memcpy copies"):
        CnicCopies(CPU).hold(torch.zeros(10))


# ── on an agent ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings_", "charged"),
    [
        ({"device_copies": "memcpy"}, False),
        ({"device_copies": "cnic"}, True),
        ({"device_copies": "cnic", "cnic_bytes_per_s": 10**9}, True),
        ({"device_copies": "memcpy", "cnic_bytes_per_s": 10**9}, True),  # the paper's node is emulated
    ],
)
def test_lanes_count_the_copies_that_pass_the_cnic(
    checkpoint: Checkpoint, tmp_path: Path, settings_: dict[str, object], charged: bool
) -> None:
    prompt = appended(0, 130)

    async def work(engine: Bench) -> None:
        engine.prepare(0, prompt)
        engine.start(0, prompt, max_tokens=140, ignore_eos=True)
        await engine.hears(m.Finished)
        layout = engine.host.layout
        copied_bytes = 130 * sum(layout.row_bytes) + 2 * layout.full_block_bytes  # blocks 2 and 3 were generated
        for lane in msgspec.structs.astuple(engine.host.traffic.statistics().cnic):
            assert (lane.low_bytes, lane.high_bytes) == (copied_bytes * charged, 0)

    async def run() -> None:
        async with bench(checkpoint("qwen3"), tmp_path, Role.DECODE, **settings_) as engine:
            await work(engine)

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the engine's thread exits
def test_an_engine_whose_loop_fails_leaves_and_its_agent_gets_no_answer(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an answer the agent would give the pages to others, while a NIC may still write into them."""
    prompt = appended(0, 130)

    async def run() -> None:
        async with bench(checkpoint("qwen3"), tmp_path, Role.DECODE, device_copies="cnic") as engine:
            monkeypatch.setattr(Agent, "is_done", lambda *_: False)
            engine.compute._copies._loop._deadline_s = 0.05  # type: ignore[union-attr]
            engine.prepare(0, prompt)
            engine.start(0, prompt, max_tokens=140)
            async with asyncio.timeout(20):
                await engine.host.ended
            assert engine.said(m.AttemptFailed) == [] and engine.said(m.BufferFreed) == []

    asyncio.run(run())


# ── in a cluster ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cluster_copies_through_the_cnic_generates_the_reference_and_counts_each_byte(
    checkpoint: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    """Between the two runs the decode engine's lanes differ by its copies: prompts in, generated blocks out."""
    counted: dict[str, dict[str, float]] = {}

    def converse_with(kind: str) -> None:
        config = cluster_config(checkpoint("qwen3"), tmp_path / kind, system="basic-layerwise", device_copies=kind)

        async def work(cluster: Cluster) -> None:
            await converse(cluster, "qwen3", reference, True)
            await fresh_gauges(cluster)
            counted[kind] = {lane: cnic_low_bytes(cluster, lane) for lane in ("rx", "tx")}
            counted["block"] = {"bytes": cluster.coordinator.layout.full_block_bytes}

        in_cluster(config, work)

    for kind in ("memcpy", "cnic"):
        converse_with(kind)
    block_bytes = counted["block"]["bytes"]
    prompt_tokens, blocks_out, length = 0, 0, 0
    for append, generated in TURNS:
        length += append
        prompt_tokens += length
        blocks_out += (length + generated - 1) // 64 - length // 64
        length += generated
    copied_bytes = prompt_tokens / 64 * block_bytes + blocks_out * block_bytes
    assert blocks_out > 0
    for lane in ("rx", "tx"):
        assert counted["cnic"][lane] - counted["memcpy"][lane] == copied_bytes


def cnic_low_bytes(cluster: Cluster, direction: str) -> float:
    wanted = (f'nic="cnic",direction="{direction}",traffic_class="low"', 'role="decode"')
    figures = cluster.coordinator.gauges()
    return sum(
        value
        for name, value in figures.items()
        if name.startswith("dualpath_nic_bytes_total") and all(part in name for part in wanted)
    )
