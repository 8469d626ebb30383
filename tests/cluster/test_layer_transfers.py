"""One batch's KV on its way, layer by layer: runs cover what a plan says, and bytes arrive where they belong."""

from collections.abc import Iterator
from functools import partial

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath.cluster.agent.layer_transfers import AttemptCancelledError, BatchTransfers, ItemTransfers, token_runs
from dualpath.core.load_plan import chunk_plan
from dualpath.core.vocabulary import BLOCK_TOKENS, Leg, Side, TrafficClass
from dualpath.kv.layout import KVLayout, KVPart
from dualpath.transfer import TRANSPORTS
from dualpath.transfer.pool import BufferPool
from dualpath.transfer.traffic import TrafficManager
from dualpath.transfer.transport import Channel, TransferError

LAYOUT = KVLayout.alike(layers=3, parts=(KVPart("k", 1, 2), KVPart("v", 1, 2)), dtype="float32")


@given(st.integers(0, 5), st.integers(0, 400), st.integers(0, 400))
@settings(derandomize=True)
def test_runs_cover_the_tokens_once_and_in_order(first_block: int, first_token: int, tokens: int) -> None:
    first_token += first_block * BLOCK_TOKENS
    pages = [1000 + block for block in range(20)]
    runs = token_runs(pages, first_block, first_token, tokens)
    covered = [
        ((run.page - 1000 + first_block) * BLOCK_TOKENS + run.first_token + i, run.row + i)
        for run in runs
        for i in range(run.tokens)
    ]
    assert covered == [(first_token + i, first_token + i) for i in range(tokens)]
    assert all(1 <= run.tokens <= BLOCK_TOKENS - run.first_token for run in runs)


KEY = bytes(range(32))


class World:
    """A PE buffer, a DE buffer with its server, and a channel between them."""

    def __init__(self, transport: str) -> None:
        self.transport = TRANSPORTS.get(transport)
        self.traffic = TrafficManager()
        self.pe = BufferPool.create("transfers-pe", LAYOUT.full_block_bytes, 8)
        self.de = BufferPool.create("transfers-de", LAYOUT.full_block_bytes, 8)
        self.server = self.transport.serve(self.de, TrafficManager(), host="127.0.0.1", name="transfers-de", key=KEY)
        self.channel = self.connect()
        rng = np.random.default_rng(1)
        for pool in (self.pe, self.de):
            for page in range(pool.pages):
                pool.view(page)[:] = rng.integers(0, 256, pool.page_bytes, dtype=np.uint8)

    def connect(self) -> Channel:
        address = self.server.address
        return self.transport.connect(address, self.traffic, traffic_class=TrafficClass.LOW, peer_tag="0", key=KEY)

    def batch(self, *items: ItemTransfers) -> BatchTransfers:
        return BatchTransfers(LAYOUT, self.pe, self.traffic, list(items))

    def close(self) -> None:
        self.channel.close()
        self.server.close()
        self.pe.close()
        self.de.close()


@pytest.fixture(params=TRANSPORTS.names())
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(request.param)
    yield made
    made.close()


def layer_rows(pool: BufferPool, pages: list[int], layer: int, first_token: int, tokens: int) -> np.ndarray:
    """What the pages hold of a prompt's tokens in one layer."""
    parts = [pool.view(page)[slice(*LAYOUT.layer_range(layer))].reshape(BLOCK_TOKENS, -1) for page in pages]
    return np.concatenate(parts)[first_token : first_token + tokens].reshape(-1)


def test_a_prompt_read_by_both_sides(world: World) -> None:
    """Two blocks from the PE buffer, one pulled from the DE buffer; afterwards the DE buffer has all 230 tokens."""
    pe_pages, de_pages = [5, 2], [7, 0, 3, 6]
    plan = chunk_plan((Leg(Side.PE, 0, 2), Leg(Side.DE, 2, 1)), 192, 192, 38)
    item = ItemTransfers(plan, pe_pages, 0, de_pages, world.channel, lambda: False)
    io = world.batch(item)
    for layer in range(LAYOUT.layers):
        expected = np.concatenate(
            [layer_rows(world.pe, pe_pages, layer, 0, 128), layer_rows(world.de, de_pages, layer, 128, 64)]
        )
        loaded = np.zeros(192 * LAYOUT.row_bytes[0], dtype=np.uint8)
        assert io.load_layer(layer, [loaded]) == [None]
        assert np.array_equal(loaded, expected)
        rows = np.concatenate([loaded, np.full(38 * LAYOUT.row_bytes[0], 17 + layer, dtype=np.uint8)])
        assert io.ship_layer(layer, [rows]) == [None]
        assert np.array_equal(layer_rows(world.de, de_pages, layer, 0, 230), rows)


def test_a_window_moves_only_what_it_sees(world: World) -> None:
    """A prompt of 192 hit and 38 new tokens: the first new token sees from 93 on in the layer whose window is 100."""
    pe_pages, de_pages = [5, 2], [7, 0, 3, 6]
    plan = chunk_plan((Leg(Side.PE, 0, 2), Leg(Side.DE, 2, 1)), 192, 192, 38)
    item = ItemTransfers(plan, pe_pages, 0, de_pages, world.channel, lambda: False, {None, 100})
    whole = LAYOUT.kind(0)
    layout = KVLayout.of([whole, msgspec.structs.replace(whole, window_tokens=100), whole], "float32")
    io = BatchTransfers(layout, world.pe, world.traffic, [item])
    row_bytes, before = LAYOUT.row_bytes[1], layer_rows(world.de, de_pages, 1, 0, 256)
    loaded = np.full(192 * row_bytes, 255, dtype=np.uint8)
    assert io.load_layer(1, [loaded]) == [None]
    assert np.array_equal(loaded[93 * row_bytes : 128 * row_bytes], layer_rows(world.pe, pe_pages, 1, 93, 35))
    assert np.array_equal(loaded[128 * row_bytes :], layer_rows(world.de, de_pages, 1, 128, 64))
    assert set(loaded[: 93 * row_bytes]) == {255}
    rows = np.concatenate([loaded, np.full(38 * row_bytes, 18, dtype=np.uint8)])
    assert io.ship_layer(1, [rows]) == [None]
    assert np.array_equal(layer_rows(world.de, de_pages, 1, 93, 137), rows[93 * row_bytes :])
    assert np.array_equal(layer_rows(world.de, de_pages, 1, 0, 93), before[: 93 * row_bytes])
    assert io.load_layer(0, [loaded]) == [None] and loaded[0] != 255, "the others see all"


def test_on_the_de_path_only_miss_tokens_travel(world: World) -> None:
    de_pages = [1, 4]
    plan = chunk_plan((Leg(Side.DE, 0, 1),), 64, 64, 10)
    item = ItemTransfers(plan, [], 0, de_pages, world.channel, lambda: False)
    io = world.batch(item)
    before = world.traffic.statistics().cnic
    io.load_layer(0, [np.zeros(64 * LAYOUT.row_bytes[0], dtype=np.uint8)])
    io.ship_layer(0, [np.zeros(74 * LAYOUT.row_bytes[0], dtype=np.uint8)])
    after = world.traffic.statistics().cnic
    assert after.rx.low_bytes - before.rx.low_bytes == 64 * LAYOUT.row_bytes[0]
    assert after.tx.low_bytes - before.tx.low_bytes == 10 * LAYOUT.row_bytes[0]


def test_an_item_that_fails_does_not_disturb_the_others(world: World) -> None:
    """No channel, a channel that broke, a cancelled attempt, pages that don't exist, and one that is well."""
    plan = chunk_plan((), 0, 0, 10)
    broken = world.connect()
    broken.close()
    items = [
        ItemTransfers(plan, [], 0, [0], None, lambda: False),
        ItemTransfers(plan, [], 0, [1], broken, lambda: False),
        ItemTransfers(plan, [], 0, [2], world.channel, lambda: True),
        ItemTransfers(plan, [], 0, [99], world.channel, lambda: False),
        ItemTransfers(plan, [], 0, [4], world.channel, lambda: False),
    ]
    rows = [np.full(10 * LAYOUT.row_bytes[0], i, dtype=np.uint8) for i in range(5)]
    errors = world.batch(*items).ship_layer(1, rows)
    kinds = [type(error) for error in errors]
    assert kinds == [ConnectionError, TransferError, AttemptCancelledError, TransferError, type(None)]
    assert np.array_equal(layer_rows(world.de, [4], 1, 0, 10), rows[4])


class Panic(BaseException):
    """As native code's."""


class Odd:
    """Somebody else's channel. What it calls with has no name, as a partial's."""

    is_open = True

    def __init__(self, panics: bool) -> None:
        self.read = self.write = partial(self._move, panics)

    def _move(self, panics: bool, *_: object) -> None:
        if panics:
            raise Panic("no")


@pytest.mark.parametrize(("panics", "said"), [(False, "the channel's {} returned None"), (True, "Panic")])
def test_what_gives_no_future_is_no_transfer(panics: bool, said: str) -> None:
    """Nothing may be computed on rows that never came."""
    world = World("shm")
    plan = chunk_plan((Leg(Side.DE, 0, 1),), 64, 64, 10)
    batch = world.batch(ItemTransfers(plan, [], 0, [0, 1], Odd(panics), lambda: False))  # type: ignore[arg-type]
    for verb, move, tokens in (("read", batch.load_layer, 64), ("write", batch.ship_layer, 74)):
        (error,) = move(0, [np.zeros(tokens * LAYOUT.row_bytes[0], dtype=np.uint8)])
        assert said.format(verb) in str(error)
    world.close()


def test_a_peer_that_dies_ends_the_transfer(world: World) -> None:
    plan = chunk_plan((Leg(Side.DE, 0, 1),), 64, 64, 10)
    item = ItemTransfers(plan, [], 0, [0, 1], world.channel, lambda: False)
    world.server.close()
    (error,) = world.batch(item).load_layer(0, [np.zeros(64 * LAYOUT.row_bytes[0], dtype=np.uint8)])
    assert isinstance(error, TransferError)
