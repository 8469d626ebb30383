"""The orders, and a simulator whose lines are served by them. Nothing of core's is changed."""

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dualpath.core.batching import PrefillQueue
from dualpath.core.ledger import Key, Ledger
from dualpath.core.request import Request
from dualpath.core.vocabulary import EngineId, NodeId, RequestId, Side
from dualpath.core.waiting import WaitingRoom
from dualpath.lab.sim.simulator import Simulator
from dualpath.lab.sim.storage import Storage
from dualpath.lab.sim.turns import LiveTurn

LINES = ("place", "buffer", "read", "prefill")
"""For a PE and a DE; for buffer; for a storage NIC; for prefill."""


class Asked(NamedTuple):
    """A turn as an order sees it, when it is handed in."""

    prompt_tokens: int
    turns: int
    """Turns that its agent has been served, and what these read and generated, in tokens."""
    read_tokens: int
    generated_tokens: int
    age_ns: int
    """Since the agent's first turn."""
    turns_left: int
    """What the agent has left, this turn included, only its client can know."""
    left_ns: int
    """If it had the cluster to itself."""
    misjudged: float
    """How far off an estimate of that is: a factor, the same for all turns of an agent, log-normal."""


ORDERS: dict[str, Callable[[Asked], float]] = {
    "arrival": lambda _: 0,
    "fewest-turns": lambda asked: asked.turns,
    "most-turns": lambda asked: -asked.turns,
    "least-read": lambda asked: asked.read_tokens,
    "least-generated": lambda asked: asked.generated_tokens,
    "short-context": lambda asked: asked.prompt_tokens,
    "long-context": lambda asked: -asked.prompt_tokens,
    "slowest-pace": lambda asked: -asked.age_ns / max(1, asked.turns),
    "longest-left": lambda asked: -asked.left_ns,
    "estimated-left": lambda asked: -asked.left_ns * asked.misjudged,
    "most-turns-left": lambda asked: -asked.turns_left,
    "shortest-left": lambda asked: asked.left_ns,
}
IN_TURN = "arrival/fewest-turns/short-context"
"""Reads by each of these in turn, the other lines by arrival."""
Rank = Callable[[RequestId], tuple[float, int]]


class OrderedStorage(Storage):
    """Storage NICs that take the best leg by each rank in turn."""

    def __init__(self, plain: Storage, ranks: list[Rank]) -> None:
        vars(self).update(vars(plain))
        self._ranks = ranks
        self._lines: list[list[tuple[int, LiveTurn, Side]]] = [[] for _ in self._free_ns]
        self._taken = [0] * len(self._free_ns)
        self._busy = [False] * len(self._free_ns)

    def read(self, node: NodeId, n_bytes: int, turn: LiveTurn, side: Side) -> None:
        self._lines[node].append((n_bytes, turn, side))
        if not self._busy[node]:
            self._take(node)

    def _take(self, node: NodeId) -> None:
        line = self._lines[node]
        self._busy[node] = bool(line)
        if not line:
            return
        rank = self._ranks[self._taken[node] % len(self._ranks)]
        self._taken[node] += 1
        best = min(range(len(line)), key=lambda place: rank(line[place][1].request))
        super().read(node, *line.pop(best))
        self._events.at(int(self._free_ns[node]), self._take, node)


def put_in_order(simulator: Simulator, ranks: list[Rank], lines: tuple[str, ...]) -> None:
    """Makes these lines of a simulator that has not begun serve by rank: reads by each in turn, others by the first."""
    life, rank = simulator.scheduler.life, ranks[0]
    if "place" in lines:
        _order_placement(life.waiting, rank)
    if "buffer" in lines:
        _order_buffers(life.ledger, rank)
    if "read" in lines:
        simulator.storage = OrderedStorage(simulator.storage, ranks)
    for engine in simulator.prefill.engines.values():
        if "prefill" in lines:
            _order_prefill(engine.queue, rank)


def _order_placement(room: WaitingRoom, rank: Rank) -> None:
    join = room.join

    def join_in_order(request: Request) -> None:
        join(request)
        order = sorted(room.requests, key=rank)
        if order[-1] != request.id:
            # Half-made choices go too: two lines in different orders would wait for each other.
            room.requests = {one: room.requests[one] for one in order}
            room.start_over()

    room.join = join_in_order  # type: ignore[method-assign]


def _order_buffers(ledger: Ledger, rank: Rank) -> None:
    line_up = ledger.line_up

    def line_up_in_order(engine: EngineId, key: Key, blocks: int) -> bool:
        granted = line_up(engine, key, blocks)
        if not granted:
            account = ledger.accounts[engine]
            account.line = OrderedDict(sorted(account.line.items(), key=lambda item: rank(item[0][0])))
        return granted

    ledger.line_up = line_up_in_order  # type: ignore[method-assign]


def _order_prefill(queue: PrefillQueue, rank: Rank) -> None:
    push = queue.push

    def push_in_order(request: RequestId, attempt: int, past_tokens: int, new_tokens: int) -> None:
        push(request, attempt, past_tokens, new_tokens)
        queue._lines = dict(sorted(queue._lines.items(), key=lambda item: rank(item[0][0])))

    queue.push = push_in_order  # type: ignore[method-assign]


class Books:
    """What the agents have been served, and how each turn looked when it was handed in."""

    def __init__(self, simulator: Simulator, left_ns: list[list[int]], sigma: float, seed: int) -> None:
        self._simulator, self._left_ns = simulator, left_ns
        self._misjudged = np.exp(np.random.default_rng([seed, 2]).normal(0, sigma, len(left_ns))).tolist()
        self._asked: dict[RequestId, Asked] = {}
        self._read, self._generated = [0] * len(left_ns), [0] * len(left_ns)
        self.ended_s: dict[int, float] = {}
        simulator.on_turn = self._note

    def rank(self, order: str) -> Rank:
        """A request's rank in the order: the same as long as it lives."""
        value = ORDERS[order]
        return lambda request: (value(self._look(request)), request)

    def _look(self, request: RequestId) -> Asked:
        if request not in self._asked:
            turn = self._simulator.lives[request]
            agent = turn.agent
            number, taken, age_ns = agent.number, agent.taken, turn.submitted_ns - agent.start_ns
            served = (turn.prompt_tokens, taken, self._read[number], self._generated[number], age_ns)
            left = (agent.turns - taken, self._left_ns[number][taken], self._misjudged[number])
            self._asked[request] = Asked(*served, *left)
        return self._asked[request]

    def _note(self, turn: LiveTurn) -> None:
        number = turn.agent.number
        self._read[number] += turn.hit_tokens
        self._generated[number] += turn.generate_tokens
        self.ended_s[number] = (self._simulator.events.now - turn.agent.start_ns) / 1e9
