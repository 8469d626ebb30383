"""What the connector reads of vLLM, made by hand. `test_interface` holds the names to the real ones."""

from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from dualpath.kv.layout import KVLayout, KVPart
from dualpath.transfer.pool import BufferPool
from dualpath.vllm.copies import Copies, WorkerPart

LAYOUT = KVLayout.alike(3, (KVPart("k", 2, 4), KVPart("v", 2, 4)), "float32")


@dataclass
class FakeRequest:
    request_id: str
    all_token_ids: list[int]
    kv_transfer_params: dict[str, Any] | None = None
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    mm_features: list[Any] = field(default_factory=list)
    lora_request: Any = None
    prompt_embeds: Any = None
    reason: str = "length"

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.all_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def get_finished_reason(self) -> str:
        return self.reason


@dataclass
class FakeBlocks:
    ids: list[int]

    def get_block_ids(self) -> tuple[list[int], ...]:
        return (self.ids,)


@dataclass
class FakeNew:
    req_id: str
    block_ids: tuple[list[int], ...]


@dataclass
class FakeCached:
    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)


@dataclass
class FakeOutput:
    """A step: tokens, and new or more blocks, by request."""

    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    scheduled_new_reqs: list[FakeNew] = field(default_factory=list)
    scheduled_cached_reqs: FakeCached = field(default_factory=FakeCached)


@dataclass
class FakeConnectorOutput:
    finished_recving: set[str] | None = None


def new(request: FakeRequest, tokens: int, blocks: list[int]) -> FakeOutput:
    return FakeOutput({request.request_id: tokens}, [FakeNew(request.request_id, (blocks,))])


def more(request: FakeRequest, tokens: int, blocks: list[int] | None = None, *, resumed: bool = False) -> FakeOutput:
    given = None if blocks is None else (blocks,)
    name = request.request_id
    return FakeOutput({name: tokens}, [], FakeCached([name], {name} if resumed else set(), [given]))


class Inline(Executor):
    """Runs work when `run` is called: a test chooses the order of threads."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        self.waiting.append(lambda: work(*arguments, **named))
        return Future()

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Device:
    """`blocks` device blocks of `block_size` tokens on the CPU, and a buffer."""

    def __init__(self, folder: Path, blocks: int = 16, block_size: int = 64, rank: int = 0, ranks: int = 1) -> None:
        share = LAYOUT.layer_block_bytes[0] // ranks
        part = WorkerPart(LAYOUT, block_size, share * block_size // 64, rank * share)
        self.layers = [torch.zeros(blocks, part.device_block_bytes, dtype=torch.uint8) for _ in range(LAYOUT.layers)]
        self.copies = Copies(part, self.layers)
        self.pool = BufferPool.create("fake", LAYOUT.full_block_bytes, 16, directory=folder)

    def paint(self, block: int, colour: int) -> None:
        for layer, rows in enumerate(self.layers):
            rows[block] = colour + layer

    def is_painted(self, block: int, colour: int) -> bool:
        return all(bool((rows[block] == colour + layer).all()) for layer, rows in enumerate(self.layers))

    def paint_page(self, page: int, colour: int) -> None:
        view = self.pool.view(page).reshape(LAYOUT.layers, -1)
        for layer in range(LAYOUT.layers):
            view[layer] = colour + layer

    def page_is(self, page: int, colour: int) -> bool:
        view = self.pool.view(page).reshape(LAYOUT.layers, -1)
        return all(bool((view[layer] == colour + layer).all()) for layer in range(LAYOUT.layers))


class Said(list[msgspec.Struct]):
    """What was said to the agent."""

    def take(self) -> list[msgspec.Struct]:
        taken = list(self)
        self.clear()
        return taken
