"""PEs that stage the whole prompt in their buffer, and the engines that an attempt keeps away from."""

from test_scheduler import DE, PE, Cluster

from dualpath.core.vocabulary import (
    Abort,
    Cancelled,
    Cause,
    Command,
    Decode,
    EngineFacts,
    Fail,
    Leg,
    Load,
    Prefill,
    Prepare,
    RequestFacts,
    Resubmit,
    Role,
    Side,
)

OTHER = 3


def staging(system: str, *buffers: int, de_blocks: int = 100) -> Cluster:
    """PEs 1, 3, 4… with such buffers, and a DE."""
    cluster = Cluster(system, prefill=(), buffer_blocks=de_blocks)
    for engine, blocks in zip((PE, OTHER, 4), buffers, strict=False):
        cluster.does("engine_joined", EngineFacts(engine, Role.PREFILL, engine, 0, blocks, stages=True))
    return cluster


def held(cluster: Cluster, engine: int) -> int:
    return sum(one.buffer_blocks for one in cluster.core.held() if one.engine == engine)


def test_it_holds_pages_for_the_whole_prompt_whoever_reads() -> None:
    for system, loads in (
        ("basic-layerwise", [Load(7, 0, PE, Leg(Side.PE, 0, 4))]),
        ("de-only", [Load(7, 0, DE, Leg(Side.DE, 0, 4))]),
    ):
        cluster = staging(system, 100)
        assert cluster.submit() == [Prepare(7, 0, DE, 5, 5), *loads]
        assert held(cluster, PE) == 5
        cluster.does("prepared", 7, 0)
        assert cluster.does("loaded", 7, 0, loads[0].leg.side) == [Prefill(7, 0, PE, DE)]
        assert cluster.does("prefill_done", 7, 0) == [Decode(7, 0, DE)]
        assert held(cluster, PE) == 0


def test_it_holds_them_when_nothing_hits() -> None:
    cluster = staging("dualpath", 100)
    assert cluster.submit(hit=0) == [Prepare(7, 0, DE, 5, 5)]
    assert held(cluster, PE) == 5
    assert cluster.does("prepared", 7, 0) == [Prefill(7, 0, PE, DE)]


def test_a_prompt_that_is_all_there_waits_for_the_pages() -> None:
    """It is prepared and read before the PE has room; room then is all it needs."""
    cluster = staging("de-only", 8)
    cluster.submit(99, hit=0)
    assert cluster.submit() == [Prepare(7, 0, DE, 5, 5), Load(7, 0, DE, Leg(Side.DE, 0, 4))]
    assert held(cluster, PE) == 5
    assert cluster.does("prepared", 7, 0) == []
    assert cluster.does("loaded", 7, 0, Side.DE) == []
    cluster.does("prepared", 99, 0)
    assert cluster.does("prefill_done", 99, 0) == [Decode(99, 0, DE), Prefill(7, 0, PE, DE)]


def test_a_pe_that_was_told_nothing_is_not_aborted() -> None:
    """In line, or with room and no command yet; once it prefills, its pages stay held until it answers."""
    cluster = staging("de-only", 8)
    cluster.submit(99, hit=0)
    cluster.submit()
    assert cluster.does("cancel", 7) == [Abort(7, 0, DE), Cancelled(7)]
    assert cluster.does("cancel", 99) == [Abort(99, 0, DE), Cancelled(99)]
    assert held(cluster, PE) == 0
    cluster.submit(8, hit=0)
    cluster.does("prepared", 8, 0)
    assert cluster.does("cancel", 8) == [Abort(8, 0, PE), Cancelled(8)]
    assert held(cluster, PE) == 5
    assert cluster.does("released", 8, 0, PE) == [Abort(8, 0, DE)]
    assert held(cluster, PE) == 0


def test_a_prompt_goes_where_it_fits() -> None:
    """The first PE is the least loaded, and too small; a PE that does not stage needs room for what it reads alone."""
    for system in ("de-only", "basic"):
        cluster = staging(system, 4, 5)
        commands = cluster.submit(hit=0)
        cluster.does("prepared", 7, 0)
        assert held(cluster, OTHER) == 5 and held(cluster, PE) == 0, commands
        assert cluster.submit(8, prompt=5 * 64 + 1, hit=0) == [Fail(8, Cause.TOO_LARGE)]
        cluster.join(9, Role.PREFILL, buffer_blocks=1)
        assert cluster.submit(10, prompt=5 * 64 + 1, hit=0)[0] == Prepare(10, 0, DE, 6, 6)
        assert cluster.load(9).seq == 1


def test_a_draining_pe_takes_none_and_may_take_some_again() -> None:
    cluster = staging("de-only", 4, 100)
    cluster.does("engine_draining", OTHER, True)
    assert cluster.submit(hit=0) == []  # it waits: the other can't stage it
    assert cluster.does("engine_draining", OTHER, False)[0] == Prepare(7, 0, DE, 5, 5)
    assert held(cluster, OTHER) == 5


def fails(cluster: Cluster, engine: int, cause: Cause) -> list[Command]:
    commands = cluster.does("attempt_failed", 7, 0, engine, cause)
    cluster.does("released", 7, 0, PE)
    cluster.does("released", 7, 0, DE)
    return commands


def test_an_attempt_keeps_away_from_the_engine_that_could_not_compute_it() -> None:
    cluster = Cluster(prefill=(PE, OTHER)).prefilling()
    assert Resubmit(7, 1, Cause.COMPUTE_FAILED) in fails(cluster, PE, Cause.COMPUTE_FAILED)
    cluster.does("resubmit", RequestFacts(7, 1, 300, 0, 20))
    assert (cluster.load(PE).seq, cluster.load(OTHER).seq) == (0, 1)


def test_it_keeps_away_from_one_that_can_stage_only_where_another_can() -> None:
    cluster = staging("de-only", 100, 4)
    cluster.submit(hit=0)
    cluster.does("prepared", 7, 0)
    fails(cluster, PE, Cause.COMPUTE_FAILED)
    cluster.does("resubmit", RequestFacts(7, 1, 300, 0, 20))
    assert (cluster.load(PE).seq, cluster.load(OTHER).seq) == (1, 0)
