"""Named systems and the validation of constants and limits."""

import msgspec
import pytest

from dualpath.core.policy import Constants, Limits, Policy
from dualpath.core.systems import find_system


def test_the_ablation_goes_one_step_at_a_time() -> None:
    def changed(before: str, after: str) -> set[str]:
        a, b = (msgspec.structs.asdict(find_system(name).policy) for name in (before, after))
        return {name for name in a if a[name] != b[name]}

    assert changed("basic", "basic-layerwise") == {"layerwise"}
    assert changed("basic-layerwise", "dualpath-rr") == {"read_path"}
    assert changed("dualpath-rr", "dualpath") == {"read_path", "placement"}
    assert changed("dualpath", "dualpath-split") == {"read_path"}
    assert changed("dualpath", "de-only") == {"read_path"}
    assert changed("dualpath", "oracle") == {"free_io"}


def test_constants_from_rates_are_three_and_five_seconds() -> None:
    constants = Constants.from_rates(snic_tokens_per_s=1_000, prefill_tokens_per_s=200)
    assert (constants.alpha_tokens, constants.beta_tokens) == (3_000, 1_000)
    assert constants.z_factor == 1.05


@pytest.mark.parametrize(
    ("name", "value"), [("alpha_tokens", -1), ("beta_tokens", -1), ("fetch_interval_ns", -1), ("z_factor", 0.9)]
)
def test_bad_constants_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Constants(**{"alpha_tokens": 1, "beta_tokens": 1, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", Limits.__struct_fields__)
def test_bad_limits_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: 0})


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="colour"):
        msgspec.json.decode(b'{"colour": "red"}', type=Policy)
