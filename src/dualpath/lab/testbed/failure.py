"""The testbed's error."""


class TestbedError(Exception):
    """The testbed can't be built, used or torn down. The message says what was wrong, where, and what to do."""

    __test__ = False  # pytest would take a class of this name for tests
