"""Threads are called the same by Python and by the system."""

import sys
import threading
from pathlib import Path

import pytest

from dualpath.thread_names import named_threads


def test_a_pools_threads_have_its_name():
    with named_threads(1, "a-name-of-many-letters") as pool:
        name, thread = pool.submit(lambda: (threading.current_thread().name, threading.get_native_id())).result()
        assert name.startswith("a-name-of-many-letters")
        if not sys.platform.startswith("linux"):
            pytest.skip("only Linux shows threads' names in /proc")
        assert Path(f"/proc/self/task/{thread}/comm").read_text() == "a-name-of-many-\n"


def test_a_pool_that_a_named_thread_starts_has_its_own_name():
    def name_of_inner() -> str:
        with named_threads(1, "inner") as inner:
            return inner.submit(lambda: Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text()).result()

    if not sys.platform.startswith("linux"):
        pytest.skip("only Linux shows threads' names in /proc")
    with named_threads(1, "outer") as outer:
        assert outer.submit(name_of_inner).result() == "inner\n"
