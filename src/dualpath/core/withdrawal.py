"""The steps that end an attempt early: it fails, an engine is lost, a deadline passes, the client cancels.

Theory of operation. `withdraw` takes a request off every line and engine. An engine that was told of the attempt gets
an Abort, and the blocks there stay held until it answers (`deadlines.Aborts`, read it next). Blocks that no engine was
told of are free at once. Then the request is retried, fails, or is cancelled.
"""

from dualpath.core.deadlines import AttemptAt
from dualpath.core.lifecycle import Lifecycle
from dualpath.core.request import Event, Request, State
from dualpath.core.vocabulary import Cancelled, Cause, EngineId, Fail, Resubmit


def withdraw(life: Lifecycle, request: Request, lost: EngineId | None = None) -> None:
    """Take the request off every engine and line; `lost` is an engine that is gone and gets no Abort."""
    if request.state is State.QUEUED:
        life.waiting.leave(request)
        life.changed = True
    elif request.state is not State.RETRYING:
        _abort(life, request, lost)


def cancel(life: Lifecycle, request: Request) -> None:
    """The client went away: end the request."""
    withdraw(life, request)
    life.counts["cancelled"] += 1
    life.end(request, Event.CANCEL)
    life.outbox.append(Cancelled(request.id))


def fail_attempt(life: Lifecycle, request: Request, cause: Cause, engine: EngineId | None = None) -> None:
    """Take the attempt off its engines, then retry if attempts are left. `engine` is the one that could not go on.

    The next attempt keeps away from it if it could not compute: an engine that fails everything always has room. The
    link between a PE and a DE may be cut although both are well: then it keeps away from them.
    """
    if cause is Cause.COMPUTE_FAILED and engine is not None:
        request.avoids |= {engine}
    elif cause is Cause.TRANSFER_FAILED:
        request.avoids |= {engine for engine in (request.prefill_engine, request.decode_engine) if engine is not None}
    withdraw(life, request)
    retry(life, request, cause)


def retry(life: Lifecycle, request: Request, cause: Cause) -> None:
    """After `withdraw`: ask the driver for the next attempt, or fail the request."""
    if not life.fleet.has_both_roles and not life.awaits_replacement:
        fail(life, request, Cause.NO_ENGINE)
    elif request.attempt + 1 >= life.limits.max_attempts:
        fail(life, request, cause)
    else:
        life.counts[f"retried_{cause.value}"] += 1
        life.move(request, Event.RETRY)
        life.outbox.append(Resubmit(request.id, request.attempt + 1, cause))


def fail(life: Lifecycle, request: Request, cause: Cause) -> None:
    """End the request as failed; it must be on no engine and in no line."""
    life.counts[f"failed_{cause.value}"] += 1
    life.end(request, Event.FAIL)
    life.outbox.append(Fail(request.id, cause))


def expire(life: Lifecycle, request: Request) -> None:
    """The deadline of the request's state has passed: fail the request, or the attempt if it is on engines."""
    if request.state in (State.QUEUED, State.RETRYING):
        withdraw(life, request)
        fail(life, request, Cause.TIMEOUT)
    else:
        fail_attempt(life, request, Cause.TIMEOUT)


def abort_answered(life: Lifecycle, at: AttemptAt) -> None:
    """The engine has freed the attempt's blocks; if a DE's Abort waited behind it, send that now."""
    engine, request, attempt = at
    life.ledger.give_back(engine, (request, attempt))
    decode = life.aborts.answered(at)
    if decode is not None:
        _send_abort(life, (decode, request, attempt), None)
    life.freed(engine)


def lose(life: Lifecycle, engine: EngineId) -> None:
    """Remove a lost engine; retry the requests on it, and fail those that no engine could take any more.

    If it was the last of its role, requests wait for another one, up to `Limits.replacement_ns`.
    """
    life.waiting.start_over()
    victims = [live for live in life.requests.values() if engine in (live.prefill_engine, live.decode_engine)]
    for request in victims:
        withdraw(life, request, lost=engine)
    had_both_roles = life.fleet.has_both_roles
    life.fleet.remove(engine)
    life.ledger.close(engine)
    if had_both_roles and not life.fleet.has_both_roles:
        life.vacant_until_ns = life.now + life.limits.replacement_ns
    for at in life.aborts.lose(engine):
        _send_abort(life, at, engine)
    for request in victims:
        retry(life, request, Cause.ENGINE_LOST)
    refuse_waiting(life)
    life.changed = True


def refuse_waiting(life: Lifecycle) -> None:
    """Fail the requests in line that no engine could take: the engines have changed, or none came in time."""
    for request in list(life.waiting.requests.values()):
        refusal = life.refusal(request)
        if refusal is not None:
            withdraw(life, request)
            fail(life, request, refusal)


def _abort(life: Lifecycle, request: Request, lost: EngineId | None) -> None:
    """Abort the PE first: its answer, or its loss, proves that nobody writes into the DE's blocks any more."""
    prefill, decode = request.prefill_engine, request.decode_engine
    tokens = request.facts.prompt_tokens
    for leg in request.unloaded:
        engine = request.engine_of(leg.side)
        assert engine is not None
        life.fleet.end_read(engine, leg)
    if prefill is not None:
        life.fleet.prefill.end(prefill, tokens)
    assert decode is not None
    life.fleet.decode.end(decode, tokens)
    for engine in (prefill, decode):
        if engine is None:
            continue
        if engine in request.commanded and engine != lost:
            life.ledger.drain(engine, request.key)
            if engine == decode and prefill in request.commanded and prefill != lost:
                assert prefill is not None
                life.aborts.behind[prefill, *request.key] = decode
            else:
                _send_abort(life, (engine, *request.key), lost)
        else:
            life.ledger.give_back(engine, request.key)
        life.freed(engine)
    request.leave_engines()


def _send_abort(life: Lifecycle, at: AttemptAt, lost: EngineId | None) -> None:
    life.outbox.append(life.aborts.send(life.now, at, lost))
