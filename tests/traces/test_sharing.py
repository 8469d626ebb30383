from hypothesis import given
from hypothesis import strategies as st

from dualpath.traces.sharing import next_round, shared_prefix
from dualpath.traces.trajectory import Round


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_shared_prefix_is_what_a_loop_would_count(common, one, other):
    one, other = common + one, common + other
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert shared_prefix(one, other) == expected
    assert shared_prefix("".join(map(str, one)), "".join(map(str, other))) == expected


def test_a_round_keeps_all_of_a_context_or_says_how_much():
    assert next_round(100, 100, 130, 0) == Round(append_tokens=30, generate_tokens=1)
    assert next_round(100, 60, 50, 7, 1.5) == Round(append_tokens=0, generate_tokens=7, gap_s=1.5, keep_tokens=60)
