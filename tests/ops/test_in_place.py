"""Masks in place: what is put aside, comes back and becomes 0, on every backend that supports it, bit for bit."""

import itertools

import pytest
import torch
from products import INTERPRETING

from mft_kernels import pack_mask, reference
from mft_kernels.backends.table import registered

KEEPS = (1.0, 0.98, 0.5, 0.0)
SHAPES = [(1, 1), (5, 33), (2, 3, 40), (3, 2100), (0, 8), (4, 0)]
CHANGES = list(itertools.product([None, *KEEPS], KEEPS))  # from one keep ratio to another
if INTERPRETING:  # there, one program per row takes a millisecond
    CHANGES = [(None, 0.5), (0.5, 0.98), (0.98, 0.0), (0.0, 1.0)]
else:
    SHAPES.append((300, 257))  # split among threads
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cpu", "triton", "reference"])
def run(request):
    """Return a function that gets a backend's functions by name."""
    backend = registered(request.param)
    if backend.unavailable:
        pytest.skip(backend.unavailable)
    return backend.function


def random_weight(shape, dtype, seed=0):
    """Return a weight of random bits, including NaN with any payload."""
    bits = torch.int32 if dtype.itemsize == 4 else torch.int16
    top = 2 ** (8 * dtype.itemsize - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top, shape, dtype=bits, generator=generator).view(dtype)


def random_mask(shape, keep, seed):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return pack_mask(scores, torch.tensor(1 - keep)) if keep else pack_mask(scores, torch.tensor(2.0))


def same(a, b):
    bits = torch.int32 if a.dtype.itemsize == 4 else torch.int16
    return a.dtype == b.dtype and torch.equal(a.view(bits), b.view(bits))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_function_gives_what_its_words_say(run, shape, dtype):
    for before, now in CHANGES:
        check_a_change(run, shape, dtype, before, now)


def check_a_change(run, shape, dtype, before, now):
    """Change a weight that is whole, or masked with keep ratio ``before``, to another mask and back."""
    whole, packed = random_weight(shape, dtype), random_mask(shape, now, 1)
    keep = reference.unpack_mask(packed, shape)
    weight, held, old = whole.clone(), None, None
    if before is not None:
        old = random_mask(shape, before, 2)
        kept = reference.unpack_mask(old, shape)
        held = whole[~kept], old
        weight[~kept] = 0
    masked = weight.clone()
    aside = run("put_aside")(weight, packed, held)
    assert same(aside, whole[~keep])
    assert same(weight, masked)
    if held is not None:
        run("put_back")(weight, *held, packed)
        assert same(weight, torch.where(kept | keep, whole, 0))
    version = weight._version
    run("drop")(weight, packed, old)
    assert weight._version == version + 1
    assert same(weight, torch.where(keep, whole, 0))
    run("put_back")(weight, aside, packed)
    assert weight._version == version + 2
    assert same(weight, whole)
    run("drop")(weight, packed)
    assert same(weight, torch.where(keep, whole, 0))


def test_bits_behind_a_row_are_no_elements(run):
    """In a mask from elsewhere they may have any value."""
    weight, packed = random_weight((6, 40), torch.bfloat16), random_mask((6, 40), 0.5, 1)
    dirty = packed.clone()
    dirty[:, 1] |= ~0xFF
    expected = run("put_aside")(weight, packed)
    assert same(run("put_aside")(weight, dirty), expected)
    for mask in (packed, dirty):
        run("drop")(weight, mask)
        run("put_back")(weight, expected, mask)
        assert same(weight, random_weight((6, 40), torch.bfloat16))


def test_nothing_around_a_weight_is_written(run):
    around = random_weight((3, 8, 33), torch.bfloat16)
    before, packed = around.clone(), random_mask((8, 33), 0.1, 1)
    run("drop")(around[1], packed)
    run("put_back")(around[1], run("put_aside")(before[1], packed), packed)
    assert same(around, before)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    cpu = registered("cpu")
    if cpu.unavailable:
        pytest.skip(cpu.unavailable)
    weight, packed = random_weight((8, 33), torch.float32), random_mask((8, 33), 0.5, 1)
    whole, aside = weight.clone(), cpu.function("put_aside")(weight, packed)
    for wrong in (aside[1:], aside.to(torch.bfloat16)):
        with pytest.raises(RuntimeError, match="aside must have a value of the weight's dtype for each dropped"):
            cpu.function("put_back")(weight, wrong, packed)
    with pytest.raises(RuntimeError, match="packed must be int32 and contiguous, a word for 32 elements"):
        cpu.function("drop")(weight, packed[:, :1])
    assert same(weight, whole)
