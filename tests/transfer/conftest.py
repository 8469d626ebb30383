"""Fixtures of the transfer tests."""

import pytest
from channel_pair import Pair


@pytest.fixture(params=["shm", "tcp"])
def pair(request, tmp_path):
    pair = Pair(request.param, tmp_path)
    yield pair
    pair.close()
