"""What can go wrong with a testbed."""


class TestbedError(Exception):
    """The testbed cannot be built, used or torn down: what was wrong, where, and what to do."""

    __test__ = False  # pytest would take a class of this name for tests
