import resource

import pytest

from dualpath.client import open_files
from dualpath.client.open_files import SPARE_FILES, OpenFilesError, allow_open_files

INFINITY = resource.RLIM_INFINITY


@pytest.fixture
def limits(monkeypatch):
    """Sets the limits that are found; `limits.now` is what they are."""

    class Limits:
        now = (1024, 4096)

    monkeypatch.setattr(open_files.resource, "getrlimit", lambda _: Limits.now)
    monkeypatch.setattr(open_files.resource, "setrlimit", lambda _, given: setattr(Limits, "now", given))
    return Limits


def test_the_limit_is_raised_as_far_as_is_needed_and_allowed(limits):
    allow_open_files(500)
    assert limits.now == (1024, 4096)
    allow_open_files(2000)
    assert limits.now == (2000 + SPARE_FILES, 4096)
    with pytest.raises(OpenFilesError, match=r"5000 agents at once need 5128 open files; this process may have 4096"):
        allow_open_files(5000)
    assert limits.now == (2000 + SPARE_FILES, 4096)


def test_no_limit_is_no_limit(limits):
    limits.now = (INFINITY, INFINITY)
    allow_open_files(10**6)
    assert limits.now == (INFINITY, INFINITY)
    limits.now = (1024, INFINITY)
    allow_open_files(10**6)
    assert limits.now == (10**6 + SPARE_FILES, INFINITY)
