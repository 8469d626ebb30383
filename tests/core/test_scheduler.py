"""The scheduler by example: given what happened, this call gives exactly these commands."""

from collections.abc import Callable

import pytest

from dualpath.core.audit import audit
from dualpath.core.policy import FOREVER_NS, Constants, Limits
from dualpath.core.scheduler import EngineLoad, Scheduler
from dualpath.core.systems import find_system
from dualpath.core.vocabulary import (
    Abort,
    Cancelled,
    Cause,
    Command,
    Decode,
    EngineFacts,
    Fail,
    Finish,
    Leg,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    Resubmit,
    Role,
    Side,
)

PE, DE = 1, 2
MS = 1_000_000
S = 1_000 * MS
LIMITS = Limits(
    max_waiting=3,
    queue_ns=10 * S,
    load_ns=20 * S,
    prefill_ns=30 * S,
    decode_ns=40 * S,
    decode_ns_per_token=S,
    release_ns=5 * S,
    replacement_ns=3 * S,
)


class Cluster:
    """A scheduler with one PE and one DE, every call audited, `does` returning the call's commands."""

    def __init__(
        self,
        system: str = "dualpath",
        *,
        prefill: tuple[int, ...] = (PE,),
        decode: tuple[int, ...] = (DE,),
        buffer_blocks: int = 100,
        hbm_blocks: int = 100,
        beta_tokens: int = 100_000,
        limits: Limits = LIMITS,
    ) -> None:
        constants = Constants(alpha_tokens=10_000, beta_tokens=beta_tokens)
        self.core = Scheduler(find_system(system).policy, constants, limits)
        self.now = 0
        for engine in prefill:
            self.join(engine, Role.PREFILL, buffer_blocks)
        for engine in decode:
            self.join(engine, Role.DECODE, buffer_blocks, hbm_blocks)

    def join(self, engine: int, role: Role, buffer_blocks: int = 100, hbm_blocks: int = 100) -> list[Command]:
        hbm_blocks = hbm_blocks if role is Role.DECODE else 0
        return self.does("engine_joined", EngineFacts(engine, role, engine, 0, buffer_blocks, hbm_blocks))

    def does(self, call: str, *arguments: object, after_ns: int = 10 * MS) -> list[Command]:
        """Make the call, by default more than a fetch interval later, so that it fetches at once if it should."""
        self.now += after_ns
        getattr(self.core, call)(self.now, *arguments)
        audit(self.core.life)
        return self.core.take_commands()

    def submit(self, request: int = 7, prompt: int = 300, hit: int = 256, new: int = 20, **more: int) -> list[Command]:
        return self.does("submit", RequestFacts(request, 0, prompt, hit, new), **more)

    def load(self, engine: int) -> EngineLoad:
        return self.core.load_of(engine)

    # The stages of a PE-path request 7, each from the one before.

    def allocating(self) -> "Cluster":
        """Waits for PE buffer, which request 99 fills."""
        self.submit(99, prompt=70 * 64, hit=69 * 64)
        self.submit(7, prompt=40 * 64 + 1, hit=40 * 64, new=64)
        return self

    def loading(self) -> "Cluster":
        self.submit()
        return self

    def prefilling(self) -> "Cluster":
        self.loading().does("prepared", 7, 0)
        self.does("loaded", 7, 0, Side.PE)
        return self

    def decoding(self) -> "Cluster":
        self.prefilling().does("prefill_done", 7, 0)
        return self


PE_LOAD = Load(7, 0, PE, Leg(Side.PE, 0, 4))
DE_LOAD = Load(7, 0, DE, Leg(Side.DE, 0, 4))


# ── a request's life ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_pe_path_from_submit_to_finish() -> None:
    cluster = Cluster()
    assert cluster.submit() == [Prepare(7, 0, DE, 5, 5), PE_LOAD]
    assert cluster.load(PE) == EngineLoad(1, 300, 256, 4, 96, 0, 0, 0)
    assert cluster.load(DE) == EngineLoad(1, 300, 0, 5, 95, 5, 95, 0)
    assert cluster.does("loaded", 7, 0, Side.PE) == []
    assert cluster.load(PE).read_queue_tokens == 0
    assert cluster.does("prepared", 7, 0) == [Prefill(7, 0, PE, DE)]
    assert cluster.does("prefill_done", 7, 0) == [Decode(7, 0, DE)]
    assert cluster.load(PE) == EngineLoad(0, 0, 0, 0, 100, 0, 0, 0)
    assert cluster.does("buffer_freed", 7, 0, 3) == []
    assert cluster.load(DE).buffer_held_blocks == 2
    assert cluster.does("buffer_freed", 7, 0, 2) == []
    assert cluster.does("finished", 7, 0) == [Finish(7)]
    assert cluster.load(DE) == EngineLoad(0, 0, 0, 0, 100, 0, 100, 0)
    assert cluster.core.held() == ()
    assert cluster.core.next_wake() is None


def test_the_de_path_when_its_read_queue_is_shorter() -> None:
    cluster = Cluster()
    cluster.submit(1)
    assert cluster.submit() == [Prepare(7, 0, DE, 5, 5), DE_LOAD]
    assert cluster.load(PE).read_queue_tokens == cluster.load(DE).read_queue_tokens == 256
    assert cluster.does("prepared", 7, 0) == []
    assert cluster.does("loaded", 7, 0, Side.DE) == [Prefill(7, 0, PE, DE)]


def test_without_a_hit_there_is_nothing_to_load() -> None:
    cluster = Cluster()
    assert cluster.submit(hit=0) == [Prepare(7, 0, DE, 5, 5)]
    assert cluster.does("prepared", 7, 0) == [Prefill(7, 0, PE, DE)]


def test_a_request_that_finishes_without_freeing_its_buffer_first_gives_all_back() -> None:
    cluster = Cluster().decoding()
    assert cluster.does("finished", 7, 0) == [Finish(7)]
    assert cluster.core.held() == ()


# ── systems ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_basic_reads_on_the_pe_side_and_goes_round() -> None:
    cluster = Cluster("basic", prefill=(1, 3), decode=(2, 4))
    assert cluster.submit(10, hit=64) == [Prepare(10, 0, 2, 5, 5), Load(10, 0, 1, Leg(Side.PE, 0, 1))]
    assert cluster.submit(11, hit=64) == [Prepare(11, 0, 4, 5, 5), Load(11, 0, 3, Leg(Side.PE, 0, 1))]
    assert cluster.submit(12, hit=64) == [Prepare(12, 0, 2, 5, 5), Load(12, 0, 1, Leg(Side.PE, 0, 1))]


def test_dualpath_rr_uses_both_sides_in_turn() -> None:
    cluster = Cluster("dualpath-rr")
    sides = [cluster.submit(request, hit=64)[1].leg.side for request in range(6)]  # type: ignore[union-attr]
    assert sorted(side.value for side in sides) == ["de"] * 3 + ["pe"] * 3


def test_dualpath_split_loads_on_both_sides_and_waits_for_both() -> None:
    cluster = Cluster("dualpath-split")
    assert cluster.submit(prompt=1_300, hit=1_280) == [
        Prepare(7, 0, DE, 21, 21),
        Load(7, 0, DE, Leg(Side.DE, 10, 10)),
        Load(7, 0, PE, Leg(Side.PE, 0, 10)),
    ]
    assert cluster.does("prepared", 7, 0) == []
    assert cluster.does("loaded", 7, 0, Side.DE) == []
    assert cluster.load(DE).read_queue_tokens == 0
    assert cluster.load(PE).read_queue_tokens == 640
    assert cluster.does("loaded", 7, 0, Side.PE) == [Prefill(7, 0, PE, DE)]


def test_the_oracle_decides_like_dualpath() -> None:
    oracle, dualpath = Cluster("oracle"), Cluster("dualpath")
    assert find_system("oracle").policy.free_io and not find_system("dualpath").policy.free_io
    assert [oracle.submit(request) for request in range(5)] == [dualpath.submit(request) for request in range(5)]


def test_the_less_loaded_pe_and_the_less_busy_de_are_chosen() -> None:
    cluster = Cluster(prefill=(1, 3), decode=(2, 4))
    cluster.submit(10, prompt=1_000, hit=0)  # on 1 and 2, as all are idle
    assert cluster.submit(11, prompt=500, hit=0) == [Prepare(11, 0, 4, 8, 9)]
    assert (cluster.load(1).tok_tokens, cluster.load(3).tok_tokens) == (1_000, 500)
    cluster.submit(12, prompt=100, hit=0)
    assert cluster.load(3).tok_tokens == 600


def test_a_pe_above_beta_takes_nothing_until_it_has_worked_some_off() -> None:
    cluster = Cluster(beta_tokens=299)
    cluster.submit(1, hit=0)
    assert cluster.submit(2, hit=0) == []
    assert cluster.load(DE).hbm_promised_blocks == 10  # 2 has its DE already
    cluster.does("prepared", 1, 0)
    assert cluster.does("prefill_done", 1, 0) == [Decode(1, 0, DE), Prepare(2, 0, DE, 5, 5)]


def test_a_request_waits_for_device_memory_and_gets_it_when_one_finishes() -> None:
    cluster = Cluster(hbm_blocks=9).decoding()
    assert cluster.submit(8, hit=0) == []
    assert cluster.load(PE).tok_tokens == 300  # 8 has its PE already
    assert cluster.does("finished", 7, 0) == [Finish(7), Prepare(8, 0, DE, 5, 5)]


def test_a_stuck_group_is_looked_at_again_when_its_head_leaves_or_memory_comes_free() -> None:
    cluster = Cluster(hbm_blocks=20).decoding()  # 7 holds five of twenty
    assert cluster.submit(8, prompt=64 * 17, hit=0) == []
    assert cluster.submit(9, prompt=64 * 12, hit=0) == []  # would fit, but 8 is before it
    assert Prepare(9, 0, DE, 12, 13) in cluster.does("cancel", 8)
    assert cluster.submit(10, prompt=64 * 5, hit=0) == []
    assert Prepare(10, 0, DE, 5, 6) in cluster.does("finished", 7, 0)  # 2 + 5 free


# ── cadence ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fetches_keep_their_interval() -> None:
    cluster = Cluster()
    assert cluster.submit(1, hit=0) != []
    assert cluster.submit(2, hit=0, after_ns=1 * MS) == []
    assert cluster.core.next_wake() == cluster.now + 4 * MS
    assert cluster.submit(3, hit=0, after_ns=1 * MS) == []
    assert cluster.does("wake", after_ns=2 * MS) == []
    assert [command.request for command in cluster.does("wake", after_ns=1 * MS)] == [2, 3]
    assert cluster.core.statistics()["fetches"] == 2


def test_a_fetch_that_places_nothing_is_not_repeated_until_something_changes() -> None:
    cluster = Cluster(hbm_blocks=9).decoding()
    cluster.submit(8, hit=0)
    fetches = cluster.core.statistics()["fetches"]
    for _ in range(3):
        assert cluster.does("wake") == []
    assert cluster.core.statistics()["fetches"] == fetches
    assert cluster.core.next_wake() == cluster.now - 30 * MS + 10 * S  # the deadline of 8, nothing sooner


def test_time_must_not_go_back() -> None:
    cluster = Cluster()
    with pytest.raises(ValueError, match="monotonic"):
        cluster.does("wake", after_ns=-1)


# ── buffers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prepare_waits_for_de_buffer_first_come_first_served() -> None:
    cluster = Cluster(buffer_blocks=10, hbm_blocks=1_000).decoding()  # 7 holds five of ten
    assert cluster.submit(8, prompt=7 * 64, hit=0) == []
    assert cluster.submit(9, prompt=64, hit=0) == []  # would fit, but 8 is before it
    assert cluster.load(DE).buffer_line_requests == 2
    assert cluster.does("buffer_freed", 7, 0, 1) == []
    assert cluster.does("buffer_freed", 7, 0, 4) == [Prepare(8, 0, DE, 7, 8), Prepare(9, 0, DE, 1, 2)]


def test_who_leaves_the_head_of_a_line_lets_the_next_one_through() -> None:
    cluster = Cluster(buffer_blocks=10, hbm_blocks=1_000).decoding()
    cluster.submit(8, prompt=7 * 64, hit=0)
    cluster.submit(9, prompt=64, hit=0)
    assert cluster.does("cancel", 8) == [Cancelled(8), Prepare(9, 0, DE, 1, 2)]


def test_a_cancelled_attempt_counts_as_load_no_more() -> None:
    cluster = Cluster(beta_tokens=299)
    cluster.submit(1, hit=0)
    assert cluster.submit(2, hit=0) == []
    assert cluster.does("cancel", 1) == [Abort(1, 0, DE), Cancelled(1), Prepare(2, 0, DE, 5, 5)]


def test_a_pe_leg_waits_for_pe_buffer_after_the_de_is_prepared() -> None:
    cluster = Cluster("basic", buffer_blocks=100, hbm_blocks=1_000)
    cluster.submit(1, prompt=70 * 64, hit=69 * 64)
    assert cluster.submit(2, prompt=30 * 64, hit=29 * 64)[1] == Load(2, 0, PE, Leg(Side.PE, 0, 29))
    cluster.does("prepared", 1, 0)
    cluster.does("loaded", 1, 0, Side.PE)
    cluster.does("prefill_done", 1, 0)
    assert cluster.submit(3, prompt=64, hit=0) == []  # the DE's buffer is full
    assert cluster.does("buffer_freed", 1, 0, 70) == [Prepare(3, 0, DE, 1, 2)]


def test_the_de_reads_its_part_while_the_pe_part_waits_for_buffer() -> None:
    cluster = Cluster("dualpath-split", decode=())
    cluster.join(DE, Role.DECODE, 400, 400)
    cluster.submit(1, prompt=160 * 64, hit=159 * 64)  # 80 blocks of PE buffer
    assert cluster.submit(2, prompt=60 * 64, hit=59 * 64) == [
        Prepare(2, 0, DE, 60, 61),
        Load(2, 0, DE, Leg(Side.DE, 29, 30)),
    ]
    assert cluster.does("loaded", 2, 0, Side.DE) == []
    assert cluster.does("prepared", 2, 0) == []
    cluster.does("prepared", 1, 0)
    cluster.does("loaded", 1, 0, Side.DE)
    cluster.does("loaded", 1, 0, Side.PE)
    assert cluster.does("prefill_done", 1, 0) == [Decode(1, 0, DE), Load(2, 0, PE, Leg(Side.PE, 0, 29))]
    assert cluster.does("loaded", 2, 0, Side.PE) == [Prefill(2, 0, PE, DE)]


# ── admission ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_too_many_waiting_are_refused() -> None:
    cluster = Cluster(hbm_blocks=9).decoding()
    for request in (10, 11, 12):
        assert cluster.submit(request, hit=0) == []
    assert cluster.submit(13, hit=0) == [Fail(13, Cause.OVERLOADED)]
    assert cluster.core.statistics()["failed_overloaded"] == 1


@pytest.mark.parametrize("prompt", [101 * 64, 100 * 64])  # 100 blocks of prompt and 20 tokens are 101 of HBM
def test_what_could_never_fit_is_refused(prompt: int) -> None:
    assert Cluster().submit(prompt=prompt, hit=0) == [Fail(7, Cause.TOO_LARGE)]


def test_a_hit_larger_than_any_pe_buffer_is_refused_only_where_pes_alone_read() -> None:
    for system, fits in (("basic", False), ("dualpath", True)):
        cluster = Cluster(system, prefill=(), hbm_blocks=200)
        cluster.join(PE, Role.PREFILL, 10)
        commands = cluster.submit(prompt=64 * 20, hit=64 * 19)
        assert (commands == [Fail(7, Cause.TOO_LARGE)]) is not fits
        assert not fits or commands == [Prepare(7, 0, DE, 20, 21), Load(7, 0, DE, Leg(Side.DE, 0, 19))]


@pytest.mark.parametrize("engines", [{"prefill": ()}, {"decode": ()}])
def test_without_a_pe_or_a_de_nothing_is_taken_on(engines: dict[str, tuple[int, ...]]) -> None:
    assert Cluster(**engines).submit() == [Fail(7, Cause.NO_ENGINE)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "facts",
    [
        RequestFacts(1, 0, 0, 0, 1),
        RequestFacts(1, 0, 100, 0, 0),
        RequestFacts(1, 0, 100, 65, 1),
        RequestFacts(1, 0, 64, 64, 1),
        RequestFacts(1, 0, 64, -64, 1),
        RequestFacts(1, -1, 100, 64, 1),
        RequestFacts(1, 1, 100, 64, 1),
        RequestFacts(7, 0, 100, 64, 1),
    ],
)
def test_senseless_submissions_are_a_drivers_bug(facts: RequestFacts) -> None:
    cluster = Cluster().loading()
    with pytest.raises(ValueError, match=r"must be|never used"):
        cluster.does("submit", facts)


# ── failure ──────────────────────────────────────────────────────────────────────────────────────────────────────────

STAGES: dict[str, tuple[Callable[[Cluster], Cluster], list[int]]] = {
    "allocating": (lambda cluster: cluster.allocating(), [DE]),
    "loading": (lambda cluster: cluster.loading(), [PE, DE]),
    "prefilling": (lambda cluster: cluster.prefilling(), [PE, DE]),
    "decoding": (lambda cluster: cluster.decoding(), [DE]),
}
"""How to get there, and which engines have been told of the attempt."""


def at(stage: str) -> Cluster:
    if stage == "allocating":
        cluster = Cluster("basic", decode=())
        cluster.join(DE, Role.DECODE, 120, 300)  # its buffer has room for both requests, the PE's has not
    else:
        cluster = Cluster()
    return STAGES[stage][0](cluster)


def about(request: int, commands: list[Command]) -> list[Command]:
    return [command for command in commands if command.request == request]


@pytest.mark.parametrize("stage", STAGES)
def test_cancelling_tells_the_engines_that_know_and_the_driver(stage: str) -> None:
    cluster, engines = at(stage), STAGES[stage][1]
    commands = about(7, cluster.does("cancel", 7))
    assert commands == [*(Abort(7, 0, engine) for engine in engines[:1]), Cancelled(7)]
    assert {holding.engine for holding in cluster.core.held() if holding.draining} == set(engines)
    for engine, behind in zip(engines, [*engines[1:], None], strict=False):
        # The DE is told when the PE has said that it writes no more.
        expected = [] if behind is None else [Abort(7, 0, behind)]
        assert about(7, cluster.does("released", 7, 0, engine)) == expected
    assert [holding for holding in cluster.core.held() if holding.request == 7] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_deadline_aborts_the_attempt_and_asks_for_another(stage: str) -> None:
    cluster, engines = at(stage), STAGES[stage][1]
    commands = about(7, cluster.does("wake", after_ns=100 * S))
    assert commands == [*(Abort(7, 0, engine) for engine in engines[:1]), Resubmit(7, 1, Cause.TIMEOUT)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lost", [PE, DE])
def test_losing_an_engine_fails_the_attempts_that_need_it(stage: str, lost: int) -> None:
    cluster, engines = at(stage), STAGES[stage][1]
    cluster.join(3, Role.PREFILL)
    cluster.join(4, Role.DECODE)
    commands = about(7, cluster.does("engine_lost", lost))
    if stage == "decoding" and lost == PE:
        assert commands == []
        return
    survivors = [engine for engine in engines if engine != lost]
    assert commands == [*(Abort(7, 0, engine, lost) for engine in survivors), Resubmit(7, 1, Cause.ENGINE_LOST)]
    assert {holding.engine for holding in cluster.core.held()} <= {PE, DE} - {lost}


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_gives_up_on_an_attempt(stage: str) -> None:
    cluster, engines = at(stage), STAGES[stage][1]
    commands = about(7, cluster.does("attempt_failed", 7, 0, DE, Cause.TRANSFER_FAILED))
    assert commands == [*(Abort(7, 0, engine) for engine in engines[:1]), Resubmit(7, 1, Cause.TRANSFER_FAILED)]


def test_a_failed_load_is_retried_with_what_is_left() -> None:
    cluster = Cluster().loading()
    assert cluster.does("load_failed", 7, 0, Side.PE) == [
        Abort(7, 0, PE),
        Resubmit(7, 1, Cause.LOAD_FAILED),
    ]
    assert cluster.load(PE).read_queue_tokens == 0
    assert cluster.load(PE).buffer_held_blocks == 4  # draining
    assert cluster.does("resubmit", RequestFacts(7, 1, 300, 128, 20)) == [
        Prepare(7, 1, DE, 5, 5),
        Load(7, 1, PE, Leg(Side.PE, 0, 2)),
    ]


def test_a_decode_engine_behind_a_lost_prefill_engine_is_told_of_the_loss() -> None:
    cluster = Cluster().loading()
    cluster.join(3, Role.PREFILL)
    assert cluster.does("cancel", 7) == [Abort(7, 0, PE), Cancelled(7)]
    assert cluster.does("released", 7, 0, DE) == []  # nobody asked it yet
    assert cluster.core.statistics()["dropped_released"] == 1
    assert cluster.does("engine_lost", PE) == [Abort(7, 0, DE, PE)]
    assert cluster.does("released", 7, 0, DE) == []
    assert cluster.core.held() == ()


def test_a_decode_engine_lost_behind_its_prefill_engine_is_not_told() -> None:
    cluster = Cluster().loading()
    cluster.join(3, Role.DECODE)
    assert cluster.does("cancel", 7) == [Abort(7, 0, PE), Cancelled(7)]
    assert cluster.does("engine_lost", DE) == []
    assert cluster.does("released", 7, 0, PE) == []
    assert cluster.core.held() == ()


@pytest.mark.parametrize("system", ["dualpath", "dualpath-rr", "basic", "de-only"])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_a_draining_engine_ends_what_it_has_and_gets_nothing_new(system: str, role: Role) -> None:
    cluster = Cluster(system, prefill=(1, 3), decode=(2, 4))
    leaver, other = (1, 3) if role is Role.PREFILL else (2, 4)
    cluster.submit(hit=0)
    assert leaver in (cluster.core.life.requests[7].prefill_engine, cluster.core.life.requests[7].decode_engine)
    cluster.does("engine_draining", leaver, True)
    for request in range(20, 25):
        cluster.submit(request, hit=0)
        placed = cluster.core.life.requests[request]
        assert (placed.prefill_engine if role is Role.PREFILL else placed.decode_engine) == other
    assert Decode(7, 0, 2) in [*cluster.does("prepared", 7, 0), *cluster.does("prefill_done", 7, 0)]
    assert cluster.does("finished", 7, 0) == [Finish(7)]
    assert cluster.core.load_of(leaver).seq == 0


@pytest.mark.parametrize("leaver", [PE, DE])
@pytest.mark.parametrize("system", ["dualpath", "dualpath-rr"])
def test_with_the_only_engine_of_a_role_draining_requests_wait(system: str, leaver: int) -> None:
    """They are neither refused nor lost: for the engine to come back, or for another."""
    cluster = Cluster(system)
    cluster.does("engine_draining", leaver, True)
    assert cluster.submit(hit=0) == []
    cluster.does("engine_draining", leaver, False)
    assert cluster.does("wake") == [] and cluster.core.life.requests[7].prefill_engine == PE
    cluster.does("engine_draining", leaver, True)
    assert cluster.submit(8, hit=0) == []
    cluster.join(9, Role.PREFILL if leaver == PE else Role.DECODE)
    placed = cluster.core.life.requests[8]
    assert 9 in (placed.prefill_engine, placed.decode_engine)
    assert cluster.submit(9, prompt=64 * 200, hit=0) == [Fail(9, Cause.TOO_LARGE)]
    cluster.does("engine_draining", 99, True)
    assert cluster.core.statistics()["dropped_engine_draining"] == 1


def test_attempts_run_out_with_the_last_cause() -> None:
    cluster = Cluster()
    cluster.submit(hit=0)
    for attempt, cause in enumerate((Cause.COMPUTE_FAILED, Cause.TRANSFER_FAILED)):
        assert cluster.does("attempt_failed", 7, attempt, DE, cause)[-1] == Resubmit(7, attempt + 1, cause)
        cluster.does("resubmit", RequestFacts(7, attempt + 1, 300, 0, 20))
    assert cluster.does("attempt_failed", 7, 2, DE, Cause.COMPUTE_FAILED) == [
        Abort(7, 2, DE),
        Fail(7, Cause.COMPUTE_FAILED),
    ]


@pytest.mark.parametrize(("lost", "role", "left"), [(PE, Role.PREFILL, DE), (DE, Role.DECODE, PE)])
def test_requests_wait_for_the_replacement_of_the_last_engine_of_a_role(lost: int, role: Role, left: int) -> None:
    """The one under way gets its next attempt there, the one that came meanwhile its first; older ones first."""
    cluster = Cluster().loading()
    assert cluster.does("engine_lost", lost) == [Abort(7, 0, left, lost), Resubmit(7, 1, Cause.ENGINE_LOST)]
    cluster.does("released", 7, 0, left)
    assert cluster.does("resubmit", RequestFacts(7, 1, 300, 0, 20)) == cluster.submit(8, hit=0) == []
    placed = [command for command in cluster.join(4, role) if isinstance(command, Prepare)]
    assert [(prepare.request, prepare.attempt) for prepare in placed] == [(7, 1), (8, 0)]
    assert cluster.core.next_wake() is not None


def test_without_a_replacement_in_time_requests_fail_and_new_ones_are_refused() -> None:
    cluster = Cluster().loading()
    cluster.does("engine_lost", PE)
    cluster.does("resubmit", RequestFacts(7, 1, 300, 256, 20))
    cluster.submit(8, after_ns=0)
    assert cluster.core.next_wake() == cluster.now - 10 * MS + LIMITS.replacement_ns
    assert cluster.does("wake", after_ns=LIMITS.replacement_ns - 11 * MS) == []
    assert cluster.does("wake", after_ns=MS) == [Fail(7, Cause.NO_ENGINE), Fail(8, Cause.NO_ENGINE)]
    assert cluster.submit(9) == [Fail(9, Cause.NO_ENGINE)]
    assert cluster.does("engine_lost", DE) == []
    assert cluster.submit(10) == [Fail(10, Cause.NO_ENGINE)]  # that one is nobody's last hope


def test_an_attempt_that_fails_without_any_hope_of_a_replacement_is_the_last() -> None:
    cluster = Cluster().decoding()
    cluster.does("engine_lost", PE)
    assert cluster.does("attempt_failed", 7, 0, DE, Cause.COMPUTE_FAILED, after_ns=LIMITS.replacement_ns) == [
        Abort(7, 0, DE),
        Fail(7, Cause.NO_ENGINE),
    ]


def test_requests_too_large_for_the_replacement_fail_when_it_joins() -> None:
    cluster = Cluster()
    cluster.does("engine_lost", DE)
    cluster.submit(1, prompt=20 * 64, hit=0)
    cluster.submit(2, hit=0)
    commands = cluster.join(4, Role.DECODE, 10, 50)
    assert commands[0] == Fail(1, Cause.TOO_LARGE)
    assert commands[1:] and all(command.request == 2 for command in commands[1:])


@pytest.mark.parametrize("system", ["dualpath", "dualpath-rr"])
@pytest.mark.parametrize(
    ("prefill", "decode", "first", "then"),
    [
        ((1,), (2, 3), {1, 2}, {1, 3}),
        ((1, 4), (2,), {1, 2}, {4, 2}),
        ((1, 4), (2, 3), {1, 2}, {4, 3}),
        ((1,), (2,), {1, 2}, {1, 2}),
    ],
)
def test_after_a_failed_transfer_other_engines_are_chosen_where_there_are_any(
    system: str, prefill: tuple[int, ...], decode: tuple[int, ...], first: set[int], then: set[int]
) -> None:
    """The link between two engines may be cut although both are well; the emptiest would be chosen again."""
    cluster = Cluster(system, prefill=prefill, decode=decode)
    cluster.submit(7, hit=0)
    assert placed(cluster, 7) == first
    cluster.submit(8, prompt=5_000, hit=0)
    cluster.does("prepared", 7, 0)
    cluster.does("attempt_failed", 7, 0, 1, Cause.TRANSFER_FAILED)
    cluster.does("released", 7, 0, 1)
    cluster.does("released", 7, 0, 2)
    cluster.does("resubmit", RequestFacts(7, 1, 300, 0, 20))
    assert placed(cluster, 7) == then


def placed(cluster: Cluster, request: int) -> set[int | None]:
    live = cluster.core.life.requests[request]
    return {live.prefill_engine, live.decode_engine}


@pytest.mark.parametrize("system", ["dualpath", "dualpath-rr"])
def test_it_waits_for_another_engine_that_is_full(system: str) -> None:
    """The one of the failed transfer is empty, because nothing succeeds there; it must not attract the request."""
    cluster = Cluster(system, decode=(2, 3), hbm_blocks=9)
    cluster.submit(7, hit=0)
    cluster.submit(8, hit=0)
    assert [placed(cluster, number) for number in (7, 8)] == [{PE, 2}, {PE, 3}]
    cluster.does("prepared", 7, 0)
    cluster.does("attempt_failed", 7, 0, PE, Cause.TRANSFER_FAILED)
    cluster.does("released", 7, 0, PE)
    cluster.does("released", 7, 0, 2)
    assert cluster.does("resubmit", RequestFacts(7, 1, 300, 0, 20)) == []
    assert cluster.submit(9, hit=0) == []  # its turn comes after 7's
    cluster.does("engine_lost", 3)
    assert placed(cluster, 7) == {PE, 2}


def test_a_decoding_request_outlives_the_last_pe() -> None:
    cluster = Cluster().decoding()
    assert cluster.does("engine_lost", PE) == []
    assert cluster.does("finished", 7, 0) == [Finish(7)]


def test_waiting_requests_that_only_the_lost_engine_could_hold_fail() -> None:
    cluster = Cluster(hbm_blocks=9)
    cluster.join(4, Role.DECODE, 100, 50)
    cluster.submit(1, prompt=2_000, hit=0)
    cluster.submit(2, prompt=2_000, hit=0)  # waits for 4
    cluster.submit(3, prompt=300, hit=0)
    assert (
        cluster.does("engine_lost", 4)
        == [
            Resubmit(1, 1, Cause.ENGINE_LOST),
            Fail(2, Cause.TOO_LARGE),
        ]
        or cluster.core.statistics()["failed_too_large"] == 1
    )
    assert cluster.does("resubmit", RequestFacts(1, 1, 2_000, 0, 20)) == [Fail(1, Cause.TOO_LARGE)]


def test_half_placed_requests_are_placed_anew_when_their_engine_goes() -> None:
    cluster = Cluster(beta_tokens=10, decode=(2, 4))
    cluster.submit(1, hit=0)  # on PE 1 and DE 2
    cluster.submit(2, hit=0)  # on DE 4, waiting for the PE
    assert cluster.load(4).hbm_promised_blocks == 5
    assert cluster.does("engine_lost", 4) == []
    assert cluster.load(2).hbm_promised_blocks == 10
    cluster.does("prepared", 1, 0)
    assert cluster.does("prefill_done", 1, 0) == [Decode(1, 0, 2), Prepare(2, 0, 2, 5, 5)]


@pytest.mark.parametrize(
    ("call", "arguments", "after_ns", "end"),
    [("cancel", (2,), MS, Cancelled(2)), ("wake", (), 11 * S, Fail(2, Cause.TIMEOUT))],
)
@pytest.mark.parametrize("scarce", [{"beta_tokens": 10}, {"hbm_blocks": 9}])
def test_half_placed_requests_give_their_half_back(
    scarce: dict[str, int], call: str, arguments: tuple[int, ...], after_ns: int, end: Command
) -> None:
    cluster = Cluster(**scarce)  # type: ignore[arg-type]
    cluster.submit(1, hit=0)
    cluster.does("prepared", 1, 0)
    assert cluster.submit(2, hit=0) == []
    assert cluster.does(call, *arguments, after_ns=after_ns) == [end]
    assert cluster.load(PE).tok_tokens == 300
    assert cluster.load(DE).hbm_promised_blocks == 5


def test_a_queued_request_times_out_for_good() -> None:
    cluster = Cluster(hbm_blocks=9).decoding()
    cluster.submit(8, hit=0)
    assert cluster.core.next_wake() == cluster.now + 10 * S
    assert cluster.does("wake", after_ns=10 * S) == [Fail(8, Cause.TIMEOUT)]


def test_a_driver_that_does_not_resubmit_in_time() -> None:
    cluster = Cluster().decoding()
    cluster.does("attempt_failed", 7, 0, DE, Cause.COMPUTE_FAILED)
    assert cluster.does("wake", after_ns=10 * S) == [Fail(7, Cause.TIMEOUT)]
    assert cluster.does("resubmit", RequestFacts(7, 1, 300, 0, 20)) == []


def test_a_decode_may_take_its_time_by_the_token() -> None:
    cluster = Cluster().decoding()
    assert cluster.core.next_wake() == cluster.now + 40 * S + 20 * S


def test_aborted_blocks_stay_held_until_released_however_long_it_takes() -> None:
    cluster = Cluster(buffer_blocks=5).loading()
    cluster.does("cancel", 7)
    assert cluster.submit(8, prompt=300, hit=0) == []  # no buffer for it
    assert cluster.core.next_wake() == cluster.now - 10 * MS + 5 * S
    cluster.does("wake", after_ns=5 * S)
    assert cluster.core.statistics()["overdue_releases"] == 1
    assert cluster.core.statistics()["draining_buffer_blocks"] == 9
    assert cluster.core.statistics()["draining_hbm_blocks"] == 5
    assert cluster.does("released", 7, 0, PE) == [Abort(7, 0, DE)]
    assert cluster.core.statistics()["overdue_releases"] == 0
    assert cluster.does("released", 7, 0, DE) == [Prepare(8, 0, DE, 5, 5)]


@pytest.mark.parametrize("wait_ns", [MS, 6 * S])
def test_blocks_that_drain_on_an_engine_go_with_it(wait_ns: int) -> None:
    cluster = Cluster().loading()
    cluster.does("cancel", 7)
    cluster.does("wake", after_ns=wait_ns)
    cluster.does("engine_lost", DE)
    assert [holding.engine for holding in cluster.core.held()] == [PE]
    cluster.does("engine_lost", PE)
    assert cluster.core.held() == ()
    assert cluster.core.statistics()["overdue_releases"] == 0
    assert cluster.core.next_wake() is None


# ── stale words ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stage", "call", "arguments"),
    [
        ("loading", "prepared", (7, 1)),  # another attempt
        ("loading", "prepared", (8, 0)),  # another request
        ("prefilling", "prepared", (7, 0)),  # again
        ("decoding", "prepared", (7, 0)),
        ("loading", "loaded", (7, 0, Side.DE)),  # the other side
        ("prefilling", "loaded", (7, 0, Side.PE)),
        ("allocating", "loaded", (7, 0, Side.PE)),  # not yet commanded
        ("loading", "load_failed", (7, 0, Side.DE)),
        ("prefilling", "load_failed", (7, 0, Side.PE)),
        ("loading", "prefill_done", (7, 0)),
        ("decoding", "prefill_done", (7, 0)),
        ("prefilling", "buffer_freed", (7, 0, 1)),
        ("decoding", "buffer_freed", (7, 0, 6)),  # more than it holds
        ("decoding", "buffer_freed", (7, 0, 0)),
        ("prefilling", "finished", (7, 0)),
        ("allocating", "attempt_failed", (7, 0, PE, Cause.COMPUTE_FAILED)),  # not told yet
        ("decoding", "attempt_failed", (7, 0, PE, Cause.COMPUTE_FAILED)),  # its part is over
        ("decoding", "attempt_failed", (7, 3, DE, Cause.COMPUTE_FAILED)),
        ("decoding", "released", (7, 0, DE)),  # never aborted
        ("decoding", "released", (7, 0, 99)),
        ("decoding", "engine_lost", (99,)),
        ("decoding", "cancel", (99,)),
        ("decoding", "resubmit", (RequestFacts(7, 1, 300, 0, 20),)),
        ("decoding", "resubmit", (RequestFacts(99, 1, 300, 0, 20),)),
    ],
)
def test_stale_words_are_dropped_and_counted(stage: str, call: str, arguments: tuple[object, ...]) -> None:
    cluster = at(stage)
    held = cluster.core.held()
    before = cluster.core.statistics().get(f"dropped_{call}", 0)
    assert cluster.does(call, *arguments) == []
    assert cluster.core.held() == held
    assert cluster.core.statistics()[f"dropped_{call}"] == before + 1


def test_prepared_twice_while_loading_counts_once() -> None:
    cluster = Cluster().loading()
    cluster.does("prepared", 7, 0)
    cluster.does("prepared", 7, 0)
    assert cluster.core.statistics()["dropped_prepared"] == 1


def test_prepared_before_it_was_asked_for_is_stale() -> None:
    cluster = Cluster(buffer_blocks=6).decoding()
    assert cluster.submit(8, hit=0) == []
    assert cluster.does("prepared", 8, 0) == []
    assert cluster.core.statistics()["dropped_prepared"] == 1


def test_a_resubmission_of_the_wrong_attempt_is_stale() -> None:
    cluster = Cluster().decoding()
    cluster.does("attempt_failed", 7, 0, DE, Cause.COMPUTE_FAILED)
    assert cluster.does("resubmit", RequestFacts(7, 2, 300, 0, 20)) == []
    assert cluster.core.statistics()["requests_retrying"] == 1


# ── what to look at ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_statistics_count_requests_by_state() -> None:
    cluster = Cluster(hbm_blocks=9).decoding()
    cluster.submit(8, hit=0)
    statistics = cluster.core.statistics()
    assert (statistics["requests_decoding"], statistics["requests_queued"]) == (1, 1)
    assert (statistics["submitted"], statistics["placed"], statistics["pe_read_blocks"]) == (2, 1, 4)


def test_engines_are_listed_and_unknown_ones_have_no_load() -> None:
    cluster = Cluster()
    assert [facts.engine for facts in cluster.core.engines()] == [PE, DE]
    with pytest.raises(KeyError):
        cluster.load(99)


def test_who_leaves_a_private_queue_leaves_the_others_in_it() -> None:
    cluster = Cluster(hbm_blocks=20)
    cluster.submit(1, prompt=64 * 19, hit=0)
    for request in (2, 3):
        assert cluster.submit(request, prompt=64 * 15, hit=0) == []
    cluster.does("cancel", 2)
    assert cluster.core.statistics()["requests_queued"] == 1
    cluster.does("cancel", 1)
    assert Prepare(3, 0, DE, 15, 16) in cluster.does("released", 1, 0, DE)


def test_without_limits_there_is_nothing_to_wake_for() -> None:
    limits = Limits(**dict.fromkeys(("queue_ns", "load_ns", "prefill_ns", "decode_ns"), FOREVER_NS))
    cluster = Cluster(limits=limits)
    cluster.submit()
    assert cluster.core.next_wake() is None
    cluster.does("wake", after_ns=2 * FOREVER_NS)
    assert cluster.core.statistics()["requests_loading"] == 1


def test_memory_does_not_grow_with_requests_served() -> None:
    cluster = Cluster(limits=Limits())
    for request in range(300):
        cluster.submit(request)
        cluster.does("prepared", request, 0)
        cluster.does("loaded", request, 0, Side.PE)
        cluster.does("prefill_done", request, 0)
        cluster.does("finished", request, 0)
    life = cluster.core.life
    assert not life.requests and not life.waiting.requests and not life.aborts.in_time
    assert len(life.deadlines._heap) <= 64 + 2
