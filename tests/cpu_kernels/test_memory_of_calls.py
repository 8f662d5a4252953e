"""Calls of an op leave nothing in the C++ heap, however many there are; large gradients share memory in turn."""

import ctypes
import platform

import pytest
import torch

from mft_kernels import MaskedLinear, kept_threshold, masked_linear, masked_linear_many, pack_mask

CALLS = 2000
_FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS]


def bytes_in_use():
    """Return the bytes in use in malloc's heap, for the whole process."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _Mallinfo
    return ask().uordblks


def step(x, weight, scores, threshold):
    y = masked_linear(x, weight, scores, threshold)
    torch.autograd.grad(y.sum(), (x, scores))


def forward(x, weight, scores, threshold):
    with torch.no_grad():
        masked_linear(x, weight, scores, threshold)


def many(x, weight, scores, threshold):
    with torch.no_grad():
        masks = [pack_mask(scores, threshold)]
        masked_linear_many(x[:, None], weight, masks, torch.zeros(len(x), dtype=torch.int64))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
@pytest.mark.parametrize("call", [forward, step, many])
@pytest.mark.parametrize("asked", [None, "cpu"])
def test_calls_leave_nothing_in_the_heap(call, asked, monkeypatch):
    if asked is not None:
        monkeypatch.setenv("MFT_KERNELS", asked)
    weight = torch.randn(8, 8)
    scores, x = torch.randn(8, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    threshold = kept_threshold(scores.detach(), 0.9)
    for _ in range(200):
        call(x, weight, scores, threshold)
    before = bytes_in_use()
    for _ in range(CALLS):
        call(x, weight, scores, threshold)
    assert (bytes_in_use() - before) / CALLS < 4  # a leaked string takes 48


def test_a_large_gradient_takes_the_memory_of_the_one_before():
    layer = MaskedLinear.from_linear(torch.nn.Linear(2048, 4096, bias=False))
    x = torch.ones(1, 2048)

    def gradient():
        layer(x).backward(torch.ones(1, 4096))
        found, layer.scores.grad = layer.scores.grad, None
        return found

    gradient()  # the first call finds its kernel, in a way without recycled memory
    first = gradient()
    expected, address = first.clone(), first.data_ptr()
    assert address % 4096 == 0  # malloc would have put its own data before it
    del first
    second, third = gradient(), gradient()
    assert second.data_ptr() == address
    assert third.data_ptr() != address
    assert torch.equal(second, expected)
    assert torch.equal(third, expected)
