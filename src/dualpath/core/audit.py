"""Checks every invariant of core: what the live requests imply must equal what core has recorded.

The scheduler updates each quantity step by step. The audit computes each again from the requests and the engines'
facts, and compares. Tests audit after every step. O(requests + engines).
"""

from collections import Counter

from dualpath.core.engines import DecodeGroup
from dualpath.core.ledger import Account, Key
from dualpath.core.lifecycle import Lifecycle
from dualpath.core.request import NEVER_NS, Request, State, hbm_blocks, hit_blocks, pe_buffer_blocks, prompt_blocks
from dualpath.core.vocabulary import BLOCK_TOKENS, EngineId, RequestId, Role, Side
from dualpath.core.waiting import Line


def audit(life: Lifecycle) -> None:
    """Raises AssertionError that names the first broken invariant."""
    _require(life.ledger.accounts.keys() == life.fleet.facts.keys(), "accounts and engines differ")
    _audit_requests(life)
    _audit_waiting(life)
    _audit_columns(life)
    _audit_groups(life)
    _audit_accounts(life)
    _audit_releases(life)


def _require(holds: bool, message: str, *details: object) -> None:
    if not holds:
        raise AssertionError(message.format(*details))


def _audit_requests(life: Lifecycle) -> None:
    """Each live request has one owner and a deadline, and engines exactly when its state says so."""
    posted = life.deadlines.posted()
    for request_id, request in life.requests.items():
        _require(request_id == request.id, "request {} is filed as {}", request.id, request_id)
        _require(not request.state.is_terminal, "request {} is over and still known", request_id)
        has_deadline, limited = request.deadline_ns != NEVER_NS, life.stay_ns[request.state] != NEVER_NS
        _require(has_deadline == limited, "request {} has no deadline, or should have none", request_id)
        watched = posted.get(request_id, NEVER_NS) <= request.deadline_ns
        _require(watched, "nobody watches the deadline of request {}", request_id)
        queued = request_id in life.waiting.requests
        _require(queued == (request.state is State.QUEUED), "{} waits: {}", request, queued)
        for engine in (request.prefill_engine, request.decode_engine):
            _require(engine is None or engine in life.fleet.facts, "{} is on engine {}, gone", request, engine)
        if request.state is State.QUEUED:
            _require(not request.commanded and not request.legs, "{} has more than a place in line", request)
            continue
        wants_prefill = request.state in (State.ALLOCATING, State.LOADING, State.PREFILLING)
        wants_decode = request.state is not State.RETRYING
        has_prefill, has_decode = request.prefill_engine is not None, request.decode_engine is not None
        _require((has_prefill, has_decode) == (wants_prefill, wants_decode), "{} is on the wrong engines", request)
        if wants_decode:
            covered = sum(leg.blocks for leg in request.legs)
            _require(covered == hit_blocks(request.facts), "{}: legs do not cover the hit", request)
        if request.state in (State.PREFILLING, State.DECODING):
            _require(request.prepared and not request.unloaded, "{} runs before its KV is there", request)


def _audit_waiting(life: Lifecycle) -> None:
    """A queued request is in the line of each engine that it still lacks, and in no other line."""
    waiting = life.waiting
    queued = waiting.requests.values()
    for_prefill = [request.id for request in queued if request.prefill_engine is None]
    _require(_ids(waiting.for_prefill) == for_prefill, "the line for PEs is {}", waiting.for_prefill)
    for_decode = [request.id for request in queued if request.decode_engine is None and request.group is None]
    _require(_ids(waiting.for_decode) == for_decode, "the line for DEs is {}", waiting.for_decode)
    private: dict[int, list[int]] = {}
    for request in queued:
        if request.decode_engine is None and request.group is not None:
            private.setdefault(request.group, []).append(request.id)
    lines = {group: _ids(line) for group, line in waiting.private.items()}
    _require(lines == private, "private queues are {} and should be {}", lines, private)


def _ids(line: Line) -> list[RequestId]:
    return [request.id for request in line]


def _audit_columns(life: Lifecycle) -> None:
    """The columns seq, tok and read queue equal the sums over the live attempts."""
    seq: Counter[EngineId] = Counter()
    tok: Counter[EngineId] = Counter()
    read: Counter[int] = Counter()
    for request in life.requests.values():
        for engine in (request.prefill_engine, request.decode_engine):
            if engine is not None:
                seq[engine] += 1
                tok[engine] += request.facts.prompt_tokens
        for leg in request.unloaded:
            reader = request.engine_of(leg.side)
            assert reader is not None
            read[life.fleet.facts[reader].node] += leg.blocks * BLOCK_TOKENS
    pe_queues = life.fleet.prefill.read_queue
    for engine, facts in life.fleet.facts.items():
        columns = life.fleet.prefill if facts.role is Role.PREFILL else life.fleet.decode
        slot = columns.slots[engine]
        seen = int(columns.seq[slot]), int(columns.tok[slot]), life.fleet.read_queue_tokens(engine)
        implied = seq[engine], tok[engine], read[facts.node]
        _require(seen == implied, "engine {}: seq, tok, read_q are {}, requests imply {}", engine, seen, implied)
        if facts.role is Role.PREFILL:
            _require(pe_queues[slot] == read[facts.node], "engine {}: read_q column is {}", engine, pe_queues[slot])
        else:
            free, column = life.ledger.accounts[engine].hbm_free_blocks, int(life.fleet.decode.hbm_free[slot])
            _require(free == column, "engine {}: {} free HBM blocks, column says {}", engine, free, column)


def _audit_groups(life: Lifecycle) -> None:
    """A group's totals equal its engines' sums; its load adds the private queue; a head marked stuck does not fit."""
    decode = life.fleet.decode
    for position, group_id in enumerate(decode.group_ids):
        group = decode.groups[group_id]
        queued = sum(request.facts.prompt_tokens for request in life.waiting.private.get(group_id, ()))
        seen = group.tok_total, group.hbm_free_total, int(decode.group_load[position])
        tok = int(group.tok.sum())
        implied = tok, int(group.hbm_free.sum()), tok + queued
        _require(seen == implied, "group {}: tok, free HBM, load are {}, not {}", group_id, seen, implied)
        line = life.waiting.private.get(group_id)
        stuck = line is not None and _is_stuck(life, group, line[0])
        _require(not group.short_of_blocks or stuck, "group {}: the head would fit, and nobody looks", group_id)


def _is_stuck(life: Lifecycle, group: DecodeGroup, head: Request) -> bool:
    avoided = life.fleet.avoidable(Role.DECODE, head.avoids, head.prompt_blocks, head.hbm_blocks)
    fits = (group.hbm_free >= head.hbm_blocks) & (group.buffer_capacity >= head.prompt_blocks)
    fits &= [facts.engine not in avoided for facts in group.facts]
    return head.hbm_blocks == group.short_of_blocks and not fits.any()


def _audit_accounts(life: Lifecycle) -> None:
    """An account lists exactly what live and draining attempts hold, within capacity, and its head does not fit."""
    seen: dict[EngineId, list[Key]] = {engine: [] for engine in life.ledger.accounts}
    for request in life.requests.values():
        for engine in (request.prefill_engine, request.decode_engine):
            if engine is not None:
                _audit_holding(life, request, engine)
                seen[engine].append(request.key)
    for engine, account in life.ledger.accounts.items():
        buffer = sum(held.buffer_blocks for held in account.held.values())
        hbm = sum(held.hbm_blocks for held in account.held.values())
        free = account.buffer_free_blocks, account.hbm_free_blocks
        capacity = account.facts.buffer_blocks, account.facts.hbm_blocks
        _require((buffer + free[0], hbm + free[1]) == capacity, "engine {}: {} held, {} free", engine, buffer, free)
        _require(min(free) >= 0, "engine {} is overdrawn: {} free", engine, free)
        known = set(seen[engine])
        for key, held in account.held.items():
            _require(held.draining != (key in known), "engine {}: {} has {} and no owner", engine, key, held)
        _require(known >= account.line.keys(), "engine {}: the dead stand in line {}", engine, account.line)
        _audit_line(account)


def _audit_line(account: Account) -> None:
    if account.line:
        head_blocks = next(iter(account.line.values()))
        _require(head_blocks > account.buffer_free_blocks, "engine {}: the head would fit", account.facts.engine)


def _audit_holding(life: Lifecycle, request: Request, engine: EngineId) -> None:
    """One live attempt on one of its engines holds, or waits for, exactly what its state requires."""
    account = life.ledger.accounts[engine]
    held = account.held.get(request.key)
    buffer, hbm = (held.buffer_blocks, held.hbm_blocks) if held is not None else (0, 0)
    in_line = account.line.get(request.key)
    told = engine in request.commanded
    if engine == request.decode_engine:
        _require(hbm == hbm_blocks(request.facts), "{}: {} HBM blocks promised", request, hbm)
        full = prompt_blocks(request.facts)
        whole = request.state in (State.ALLOCATING, State.LOADING, State.PREFILLING) and told
        if request.state is State.DECODING:
            _require(0 <= buffer <= full, "{}: {} blocks of DE buffer", request, buffer)
        else:
            _require(buffer == (full if whole else 0), "{}: {} blocks of DE buffer", request, buffer)
        waits = request.state is State.ALLOCATING and not told
    else:
        full = pe_buffer_blocks(account.facts.stages, request.legs, request.prompt_blocks)
        granted = request.state in (State.LOADING, State.PREFILLING)
        _require(buffer == (full if granted else 0), "{}: {} blocks of PE buffer", request, buffer)
        reads = any(leg.side is Side.PE for leg in request.legs)
        _require(told == (granted and (reads or request.state is State.PREFILLING)), "{}: told {}", request, told)
        waits = request.state is State.ALLOCATING and request.decode_engine in request.commanded
    _require(in_line == (full if waits else None), "{}: in line for {} of engine {}", request, in_line, engine)


def _audit_releases(life: Lifecycle) -> None:
    """Draining holdings and unanswered Aborts match one to one: in time, overdue, or behind the PE's."""
    draining = {(held.engine, held.request, held.attempt) for held in life.ledger.holdings() if held.draining}
    in_time, overdue, held_back = life.aborts.in_time, life.aborts.overdue, life.aborts.behind
    both = in_time.keys() & overdue.keys()
    _require(not both, "releases both in time and overdue: {}", both)
    times = list(in_time.values())
    _require(times == sorted(times), "releases are not in order of their deadlines: {}", times)
    behind = {(decode, *at[1:]) for at, decode in held_back.items()}
    for at in held_back:
        _require(life.aborts.awaited(at), "the DE waits behind {}, which has no Abort", at)
    awaited = in_time.keys() | overdue.keys()
    _require(draining == awaited | behind, "draining {}, awaited {}", draining, awaited)
