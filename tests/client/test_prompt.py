import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpath.client.prompt import Prompt

TOKENS = st.lists(st.integers(0, 200_000), max_size=30)
STEPS = st.lists(st.tuples(st.sampled_from(["extend", "keep"]), TOKENS, st.integers(0, 40)), max_size=12)


@given(STEPS)
def test_a_prompt_holds_what_a_list_would(steps):
    prompt, expected = Prompt(), []
    for step, tokens, kept in steps:
        if step == "extend":
            prompt.extend(tokens)
            expected += tokens
        else:
            prompt.keep(kept)
            expected = expected[:kept]
        assert prompt.tokens == len(expected)
        assert prompt.token_ids() == expected


@pytest.mark.parametrize("tokens", [[], [7], [0, 100_000, 3]])
def test_its_body_is_a_json_object_with_the_prompt_and_the_other_fields(tokens):
    body = Prompt(tokens).body({"model": "m", "stream": True}.items())
    assert json.loads(body) == {"prompt": tokens, "model": "m", "stream": True}
