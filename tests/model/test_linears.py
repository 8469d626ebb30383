"""Packed linear layers compute what plain ones do, with whatever weights they have at the time."""

import pytest
import torch

from dualpath.model.linears import MOST_OF_AVAILABLE, PackedLinear, pack_linears


def network(bias: bool, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(40, 24, bias), torch.nn.Linear(24, 7, bias)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 40), (2, 40), (1, 9, 40), (600, 40)])
def test_a_packed_layer_gives_the_same(bias: bool, shape: tuple[int, ...]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed, plain = pack_linears(network(bias)), network(bias)
    assert all(type(layer) is PackedLinear for layer in packed)
    with torch.inference_mode():
        assert torch.allclose(packed(given), plain(given), atol=1e-6)
        assert packed[0]._packed is not None
    assert packed.state_dict().keys() == network(bias).state_dict().keys()


def test_weights_that_leave_no_room_stay_plain() -> None:
    weights_bytes = 4 * (40 * 24 + 24 * 7)
    kinds = [
        {type(layer) for layer in pack_linears(network(True), available)}
        for available in (MOST_OF_AVAILABLE * weights_bytes, MOST_OF_AVAILABLE * weights_bytes - 1)
    ]
    assert kinds == [{PackedLinear}, {torch.nn.Linear}]


def test_new_weights_count_from_the_next_call_on() -> None:
    packed, given = pack_linears(network(True)), torch.ones(2, 40)
    with torch.inference_mode():
        packed(given)
    with torch.no_grad():
        for tensor in packed.state_dict().values():
            tensor.copy_(torch.full_like(tensor, 0.5))
    with torch.inference_mode():
        assert torch.allclose(packed(given), torch.full((2, 7), 24 * 0.5 * 20.5 + 0.5))
    packed.load_state_dict(network(True).state_dict(), assign=True)
    with torch.inference_mode():
        assert torch.allclose(packed(given), network(True)(given), atol=1e-6)


@torch.inference_mode()
def test_half_precision_and_inference_tensors_stay_plain() -> None:
    given = torch.ones(2, 40)
    assert torch.equal(pack_linears(network(True))(given), network(True)(given))
    half = torch.bfloat16
    assert torch.equal(pack_linears(network(True, half))(given.to(half)), network(True, half)(given.to(half)))
