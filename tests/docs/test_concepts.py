"""When a mask is selected again: after the writes that docs/explanation/concepts.md promises to see, and outdate()."""

import ctypes

import numpy
import pytest
import torch

from mft_kernels import MaskedLinear, outdate

N, K, ROW = 96, 256, 5  # a row that is not in the sample of the contents


def step(scores):
    scores.grad = torch.ones_like(scores)
    torch.optim.SGD([scores], lr=0.1).step()


#: The writes of the page's list. The last one writes the whole matrix by a pointer.
SEEN = {
    "in place": torch.no_grad()(lambda scores: scores[ROW].zero_()),
    "in place on a view": lambda scores: torch.select(torch.detach(scores), 0, ROW).zero_(),
    "load_state_dict": lambda scores: torch.nn.ParameterList([scores]).load_state_dict({"0": scores.detach().flip(0)}),
    "an optimizer's step": step,
    "assigned data": lambda scores: setattr(scores, "data", scores.detach().flip(0).clone()),
    "through data": lambda scores: scores.data[ROW].zero_(),
    "pointer": lambda scores: ctypes.memmove(
        torch.Tensor.data_ptr(scores), scores.detach().flip(0).clone().data_ptr(), 4 * N * K
    ),
}
#: Some of the many writes that keep an old mask: through aliases that functions make, which are gone by the next
# forward.
OTHERS = {
    "select": lambda scores: torch.select(scores, 0, ROW).data.zero_(),
    "narrow": lambda scores: torch.narrow(scores, 0, ROW, 1).data.zero_(),
    "reshape": lambda scores: torch.reshape(scores, (-1,)).data[ROW * K : ROW * K + K].zero_(),
    "unbind": lambda scores: torch.unbind(scores)[ROW].data.zero_(),
    "transpose": lambda scores: torch.transpose(scores, 0, 1).data[:, ROW].zero_(),
    "Tensor.detach": lambda scores: torch.Tensor.detach(scores).data[ROW].zero_(),
    "aten.view": lambda scores: torch.ops.aten.view(scores, [-1]).data[ROW * K : ROW * K + K].zero_(),
    "as_subclass": lambda scores: scores.as_subclass(torch.Tensor).data[ROW].zero_(),
    "numpy": lambda scores: numpy.asarray(torch.detach(scores))[ROW].fill(0),
    "dlpack": lambda scores: torch.from_dlpack(torch.detach(scores))[ROW].zero_(),
    "set_": lambda scores: torch.no_grad()(torch.empty(0).set_)(scores).data[ROW].zero_(),
    "pointer": lambda scores: ctypes.memset(torch.Tensor.data_ptr(scores) + 4 * ROW * K, 0, 4 * K),
}


@pytest.fixture
def layer():
    """Return a layer that remembers its mask."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = MaskedLinear(K, N, bias=False, init="normal", keep_ratio=0.5)
    is_current(layer)
    return layer


@torch.no_grad()
def is_current(layer):
    """Return whether a forward computes with the mask that the scores give now."""
    y = layer(torch.eye(K))
    return torch.equal(y.T != 0, layer.mask())


@pytest.mark.parametrize("write", SEEN.values(), ids=SEEN)
def test_a_write_of_the_page_s_list_is_seen(layer, write):
    before = layer.mask()
    write(layer.scores)
    assert is_current(layer)
    assert not torch.equal(layer.mask(), before)


@pytest.mark.parametrize("write", OTHERS.values(), ids=OTHERS)
def test_after_any_other_write_outdate_has_the_mask_selected_again(layer, write):
    before = layer.mask()
    write(layer.scores)
    outdate(layer.scores)
    assert is_current(layer)
    assert not torch.equal(layer.mask(), before)
