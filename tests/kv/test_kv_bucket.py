import pytest

from dualpath.kv import StoreError
from dualpath.kv.stores import bucket as buckets
from dualpath.kv.stores.bucket import Health, ObjectError


def test_what_failures_speak_against() -> None:
    now, answers = 0.0, True
    health = Health(lambda: now, lambda name: answers)
    assert health.failed("read", "a") is ObjectError
    health.check("read", "b", "b")
    health.check("written", "a", "a")
    with pytest.raises(ObjectError):
        health.check("read", "a", "a")
    now = buckets.COOL_S
    health.check("read", "a", "a")
    for name in "abc":
        health.failed("written", name)
    with pytest.raises(StoreError, match="refused other objects"):
        health.check("written", "d", "d")
    health.check("read", "d", "d")
    now, answers = 2 * buckets.COOL_S, False
    assert health.failed("written", "a") is StoreError
    with pytest.raises(StoreError, match="did not answer"):
        health.check("read", "d", "d")
    for number in range(2 * buckets.MAX_REFUSED):
        answers = True
        health.failed("read", str(number))
    assert len(health._refused_until) == buckets.MAX_REFUSED
