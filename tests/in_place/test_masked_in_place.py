"""A mask in its weight's own memory: what is there and what is put aside, and the weight is restored bit for bit."""

import pytest
import torch

from mft_kernels import pack_mask
from mft_kernels.mask.masked_in_place import MaskedInPlace

SPECIAL = [torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weight_of(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight.view(-1)[: 2 * len(SPECIAL)] = torch.tensor(2 * SPECIAL, dtype=dtype)
    return weight


def mask_of(shape, seed, keep=0.7):
    """Return the mask as (packed, bool)."""
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return pack_mask(scores, torch.tensor(1 - keep)), scores >= 1 - keep


def held_by(weight, packed):
    held = MaskedInPlace(weight)
    held.change(packed)
    return held


def bits(tensor):
    return tensor.view(BITS[tensor.itemsize])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (8, 64), (3, 4, 40)], ids=str)
def test_a_weight_holds_one_mask_after_another_and_comes_back(shape, dtype):
    whole, weight = weight_of(shape, dtype), weight_of(shape, dtype)
    masks = [mask_of(shape, seed) for seed in range(3)]
    held = MaskedInPlace(weight)
    for packed, keep in masks:
        held.change(packed)
        assert torch.equal(bits(weight), bits(torch.where(keep, whole, 0)))
        assert torch.equal(bits(held.aside), bits(whole[~keep]))
        assert torch.equal(bits(held.whole()), bits(whole))
        assert held.packed is packed
    held.lift()
    held.lift()
    assert torch.equal(bits(weight), bits(whole))
    assert (held.packed, held.aside) == (None, None)
    held.change(masks[2][0])  # the same mask, but nothing is 0 any more
    assert torch.equal(bits(weight), bits(torch.where(masks[2][1], whole, 0)))


@pytest.mark.parametrize("weight", [torch.randn(8, 66)[:, ::2], torch.randn(33, 8).T], ids=["gaps", "transposed"])
def test_a_weight_with_gaps_or_transposed_is_written_as_it_lies(weight):
    whole, (packed, keep) = weight.clone(), mask_of((8, 33), 1)
    held = held_by(weight, packed)
    assert torch.equal(weight, torch.where(keep, whole, 0))
    assert torch.equal(held.whole(), whole)
    held.lift()
    assert torch.equal(weight, whole)


@pytest.mark.parametrize("place", ["put_back", "put_aside", "drop"])
@pytest.mark.parametrize("early", [True, False], ids=["before", "after"])
def test_an_exception_anywhere_in_a_change_loses_nothing(place, early, monkeypatch):
    whole, weight = weight_of((6, 40), torch.float32), weight_of((6, 40), torch.float32)
    held = held_by(weight, mask_of((6, 40), 0)[0])
    real = held._run

    def run(function):
        def interrupted(*arguments):
            if not early:
                real(function)(*arguments)
            raise KeyboardInterrupt

        return interrupted if function == place else real(function)

    with monkeypatch.context() as patch:
        patch.setattr(held, "_run", run)
        with pytest.raises(KeyboardInterrupt):
            held.change(mask_of((6, 40), 1)[0])
    assert torch.equal(bits(held.whole()), bits(whole))
    packed, keep = mask_of((6, 40), 2)
    held.change(packed)
    assert torch.equal(bits(weight), bits(torch.where(keep, whole, 0)))
    held.lift()
    assert torch.equal(bits(weight), bits(whole))


def test_a_change_between_forward_and_backward_is_an_error():
    weight = torch.nn.Parameter(weight_of((4, 40), torch.float32).nan_to_num(0, 0, 0))
    held = held_by(weight.detach(), mask_of((4, 40), 0)[0])
    x = torch.randn(2, 40, requires_grad=True)
    y = x @ weight.T
    held.change(mask_of((4, 40), 1)[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
