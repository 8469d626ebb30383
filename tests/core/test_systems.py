"""Systems by name."""

import pytest

from dualpath.core.policy import Policy
from dualpath.core.systems import find_system, system_or_unknown
from dualpath.spec.registry import UnknownNameError


def test_what_is_no_system_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"'dualpath.core.policy:Policy' is .*, which is not a dualpath.System"):
        find_system("dualpath.core.policy:Policy")
    with pytest.raises(UnknownNameError, match="unknown system 'fast'"):
        find_system("fast")


def test_results_of_a_system_that_is_not_installed_can_be_read() -> None:
    unknown = system_or_unknown("fast")
    assert (unknown.name, unknown.policy) == ("fast", Policy())
    assert system_or_unknown("basic") is find_system("basic")
