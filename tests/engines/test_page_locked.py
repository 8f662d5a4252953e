"""Page-locked memory of exact size. CUDA's calls are recorded instead of made: no GPU is needed."""

import gc
import mmap

import pytest
import torch

from mft_kernels import page_locked as module
from mft_kernels.page_locked import empty_locked, page_locked, zeros_locked

MIB = 1 << 20


@pytest.fixture
def locked(monkeypatch):
    """Return {address: bytes} of the memory that is locked now."""
    found = {}
    monkeypatch.setattr(module, "_register", found.__setitem__)
    monkeypatch.setattr(module, "_unregister", found.pop)
    return found


def test_a_tensor_takes_whole_pages_of_its_own_and_no_more(locked):
    tensor = empty_locked((1000, 601), torch.float32)
    assert locked == {tensor.data_ptr(): 1000 * 601 * 4}
    assert tensor.data_ptr() % mmap.PAGESIZE == 0
    assert tensor.shape == (1000, 601)
    assert tensor.is_contiguous()
    other = zeros_locked((MIB,), torch.uint8)
    assert locked.keys() == {tensor.data_ptr(), other.data_ptr()}
    assert not other.any()


def test_pages_stay_locked_as_long_as_a_view_is_alive(locked):
    view = empty_locked((4, MIB), torch.bfloat16)[2:, 5:]
    gc.collect()
    assert len(locked) == 1
    view.fill_(3)
    del view
    gc.collect()
    assert locked == {}


def test_memory_that_cannot_be_locked_is_an_error_and_is_given_back(locked, monkeypatch):
    def fail(address, size):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(module, "_register", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        empty_locked((MIB,), torch.float32)
    gc.collect()
    assert locked == {}


def test_a_copy_has_the_values_and_what_is_locked_is_not_copied(locked, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in locked)
    source = torch.arange(2.0 * MIB).view(2, MIB).t()
    copy = page_locked(source)
    assert torch.equal(copy, source)
    assert copy.is_contiguous()
    assert page_locked(copy) is copy
