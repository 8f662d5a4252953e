"""No mask is stale after a write that docs/explanation/concepts.md promises to see, or after outdate()."""

import copy
import ctypes
import io
import os
import pickle
import threading

import numpy
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from mft_kernels import MaskedLinear, fixed_from_float, outdate, score_step
from mft_kernels.mask import masking
from mft_kernels.mask.scores import Scores, state

SIZE = 64
UNSAMPLED = (1, 6)  # an element of a 64 x 64 fp32 matrix that is not in the sample


def new_layer(seed: int = 0, **options) -> MaskedLinear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedLinear(SIZE, SIZE, keep_ratio=0.5, init="normal", **options)


def is_current(layer: MaskedLinear) -> bool:
    """Return whether the layer computes with the mask of its scores, which is found without our code."""
    x = torch.eye(SIZE, dtype=layer.weight.dtype)
    keys = layer.scores.detach().float().abs()
    keep = keys >= keys.flatten().kthvalue(SIZE * SIZE // 2 + 1).values
    with torch.no_grad():
        y = layer(x) if layer.bias is None else layer(x) - layer.bias
    return torch.allclose(y.T, torch.where(keep, layer.weight, 0), atol=1e-6)


def other_scores(seed: int = 1) -> torch.Tensor:
    return new_layer(seed).scores.detach().clone()


# ------------------------------------------------------------------------------------------ writes


@torch.no_grad()
def by_step(p):
    score_step(p, torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE), *torch.zeros(2, SIZE, SIZE), step=1, lr=0.5)


def by_other_memory(p):
    p.earlier = p.detach()  # keeps the old memory alive
    torch.Tensor.data.__set__(p, other_scores())  # as C++ code does


def by_a_data_swap(p):
    other = new_layer(1).scores
    p.data, other.data = other.data, p.data


def in_another_thread(p):
    thread = threading.Thread(target=p.data.__setitem__, args=(UNSAMPLED, 10))
    thread.start()
    thread.join()


WRITES = {
    "through data": lambda p: p.data.copy_(other_scores()),
    "through data, in place": lambda p: p.data.sub_(0.05 * torch.sign(p.data)),
    "through data, in part": lambda p: p.data.__setitem__(UNSAMPLED, 10),
    "in place, in part": torch.no_grad()(lambda p: p.__setitem__(UNSAMPLED, 10)),
    "on a list": torch.no_grad()(lambda p: torch._foreach_copy_([p], [other_scores()])),
    "by set_": torch.no_grad()(lambda p: p.set_(other_scores())),
    "through numpy": lambda p: p.detach().numpy().__setitem__(slice(None), other_scores().numpy()),
    "through dlpack": lambda p: torch.from_dlpack(p.detach()).data.copy_(other_scores()),
    "through a view": lambda p: p.view(-1).data.copy_(other_scores().view(-1)),
    "through the transpose": lambda p: p.T.data.copy_(other_scores()),
    "through the storage": lambda p: p.untyped_storage().copy_(other_scores().untyped_storage()),
    "by vector_to_parameters": lambda p: vector_to_parameters(parameters_to_vector([p]).flip(0), [p]),
    "by a pointer to all": lambda p: ctypes.memmove(p.data_ptr(), other_scores().data_ptr(), p.nbytes),
} | {f.__name__: f for f in (by_step, by_other_memory, by_a_data_swap, in_another_thread)}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_seen(write):
    layer = new_layer()
    assert is_current(layer)
    for _ in range(2):
        write(layer.scores)
        assert is_current(layer)


#: What nothing shows: writes of one element or row, through another tensor or a pointer.
HIDDEN = {
    "a view": lambda p: p.view(-1).data.__setitem__(UNSAMPLED[0] * SIZE + UNSAMPLED[1], 10),
    "a row": lambda p: p[1].data.fill_(10),
    "the transpose": lambda p: p.T.data.__setitem__(UNSAMPLED[::-1], 10),
    "an array": lambda p: p.detach().numpy().__setitem__(UNSAMPLED, 10),
    "a dlpack tensor": lambda p: torch.from_dlpack(p.detach()).data.__setitem__(UNSAMPLED, 10),
    "a pointer": lambda p: ctypes.memset(p.data_ptr() + 4 * (UNSAMPLED[0] * SIZE + UNSAMPLED[1]), 0x41, 4),  # 12
}


@pytest.mark.parametrize("told", [outdate, lambda scores: outdate()], ids=["of these scores", "of all"])
@pytest.mark.parametrize("write", HIDDEN.values(), ids=HIDDEN)
def test_a_write_that_nothing_shows_is_seen_after_outdate(write, told):
    layer = new_layer()
    assert is_current(layer)
    write(layer.scores)
    told(layer.scores)
    assert is_current(layer)


@torch.no_grad()
@pytest.mark.parametrize("eighth", range(7))
def test_the_sample_reaches_into_every_eighth_but_the_last(eighth):
    """Between the two forward passes only the pointer changes the scores, so only the sample can see it."""
    layer, x, begin = new_layer(), torch.eye(SIZE), eighth * SIZE // 8
    rows = other_scores()[begin : begin + SIZE // 8]
    before = layer(x)
    ctypes.memmove(layer.scores.data_ptr() + begin * SIZE * 4, rows.data_ptr(), rows.nbytes)
    seen = layer(x)
    outdate(layer.scores)
    assert torch.equal(seen, layer(x))
    assert not torch.equal(seen, before)


def test_a_write_is_seen_by_mask_merge_and_bits_also_where_nothing_shows_it():
    layer = new_layer()
    before = layer.mask()
    layer(torch.randn(2, SIZE))
    address = layer.scores.data_ptr() + 4 * (UNSAMPLED[0] * SIZE + UNSAMPLED[1])
    ctypes.c_float.from_address(address).value = 0 if before[UNSAMPLED] else 10
    assert layer.mask()[UNSAMPLED] != before[UNSAMPLED]
    assert (layer.merge().weight[UNSAMPLED] != 0) != before[UNSAMPLED]


# ------------------------------------------------------------------------------------------ aliases that live on


def alias_vector(p):
    vector = parameters_to_vector([p]).detach().clone()
    vector_to_parameters(vector, [p])
    return vector.view_as(p)


def alias_foreign_memory(p):
    array = numpy.array(other_scores())
    p.data = torch.from_numpy(array)
    return torch.from_numpy(array)


ALIASES = {
    "data": lambda p: p.data,
    "an array": lambda p: torch.from_numpy(p.detach().numpy()),
    "dlpack": lambda p: torch.from_dlpack(p.detach()),
    "another parameter": lambda p: nn.Parameter(p.data).data,
    "other scores": lambda p: type(p)(p).data,  # as accelerate makes one parameter from another
    "a vector": alias_vector,
    "foreign memory": alias_foreign_memory,
    "the storage": lambda p: torch.empty(0).set_(p.untyped_storage(), 0, p.shape, p.stride()),
}


@pytest.mark.parametrize("part", [False, True], ids=["of all", "in part, told by outdate"])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
def test_a_write_through_an_alias_is_seen_for_as_long_as_it_lives(alias, part):
    layer = new_layer()
    other = alias(layer.scores)
    for i in range(4):
        assert is_current(layer)
        if part:
            other[UNSAMPLED[0], UNSAMPLED[1] + 2 * i] = 10
            outdate(layer.scores)
        else:
            other.copy_(other_scores(1 + i))
    assert is_current(layer)


def test_integer_scores_are_watched_too():
    layer = new_layer(scores_dtype=torch.int16)
    layer.scores.data.copy_(fixed_from_float(other_scores()))
    array = layer.scores.numpy()
    for _ in range(3):
        before = layer.mask()
        layer(torch.randn(2, SIZE))
        array[:] = numpy.roll(array, 1)
        with torch.no_grad():
            y = layer(torch.eye(SIZE)) - layer.bias
        assert torch.equal(y.T != 0, layer.mask())
        assert not torch.equal(before, layer.mask())


def test_a_write_by_another_process_that_shares_the_memory_is_seen_after_outdate():
    layer = new_layer()
    layer.share_memory()
    assert is_current(layer)
    child = os.fork()
    if child == 0:
        layer.scores.data[UNSAMPLED] = 10
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert layer.scores[UNSAMPLED] == 10
    outdate(layer.scores)
    assert is_current(layer)


# ------------------------------------------------------------------------------------------ training loops


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_optimisers_are_seen_and_take_scores_as_parameters(options):
    layer = new_layer()
    own = torch.optim.AdamW([layer.scores], lr=0.05, **options)
    plain = nn.Parameter(layer.scores.detach().clone())
    other = torch.optim.AdamW([plain], lr=0.05, **options)
    for _ in range(3):
        layer(torch.randn(4, SIZE)).square().sum().backward()
        plain.grad = layer.scores.grad.clone()
        own.step()
        other.step()
        assert is_current(layer)
    assert torch.equal(plain, layer.scores)


def test_a_backward_pass_uses_the_mask_of_its_forward_pass():
    layer, x = new_layer(), torch.randn(4, SIZE, requires_grad=True)
    expected = torch.ones(4, SIZE) @ layer.merge().weight
    y = layer(x)
    layer.scores.data.copy_(other_scores())
    layer(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_a_compiled_function_that_reads_and_then_writes_leaves_nothing_stale():
    """Code of inductor's writes one element, which is not in the sample."""
    torch._dynamo.reset()
    layer = new_layer()

    @torch.compile(fullgraph=True)
    def evaluate_then_write(x):
        with torch.no_grad():
            y = layer(x)
            layer.scores[UNSAMPLED] = -layer.scores[UNSAMPLED] * 1000
            return y

    for _ in range(3):
        evaluate_then_write(torch.randn(2, SIZE))
        assert is_current(layer)


def test_functional_call_computes_with_the_scores_that_it_is_given():
    layer, x = new_layer(), torch.randn(2, SIZE)
    own = layer(x)
    given = other_scores()
    for _ in range(2):
        given[1] = given[1].flip(0)
        array = given.numpy()
        array[UNSAMPLED] = 10 - array[UNSAMPLED]
        other = new_layer()
        other.scores.data.copy_(given)
        assert torch.equal(torch.func.functional_call(layer, {"scores": given}, x), other(x))
    assert torch.equal(layer(x), own)


# ------------------------------------------------------------------------------------------ what becomes of the module


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def cast(layer, switch):
    """Cast to float64 and back while torch.__future__'s switch is on."""
    set_to = getattr(torch.__future__, f"set_{switch}_module_params_on_conversion")
    set_to(True)
    try:
        return layer.to(torch.float64).float()
    finally:
        set_to(False)


#: Of those that return something else than a module, the same layer has changed.
CHANGES = {
    "assigned": lambda layer: layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True),
    "loaded": lambda layer: layer.load_state_dict(layer.state_dict() | {"scores": other_scores()}),
    "reset": lambda layer: layer.reset_scores("magnitude"),
    "replaced": lambda layer: setattr(layer, "scores", nn.Parameter(layer.scores.detach().clone())),
    "swapped": lambda layer: torch.utils.swap_tensors(layer.scores, new_layer(1).scores),
    "copied": copy.deepcopy,
    "pickled": lambda layer: pickle.loads(pickle.dumps(layer)),
    "saved": saved,
    "cast": lambda layer: layer.to(torch.float64).float(),
    "cast by new parameters": lambda layer: cast(layer, "overwrite"),
    "cast by swapping": lambda layer: cast(layer, "swap"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_scores_stay_watched_whatever_becomes_of_their_module(change):
    layer = new_layer()
    layer(torch.randn(1, SIZE))
    changed = change(layer)
    layer = changed if isinstance(changed, nn.Module) else layer
    assert type(layer.scores) is Scores
    assert isinstance(layer.scores, nn.Parameter)
    assert is_current(layer)
    assert state(layer.scores) is not None
    layer.scores.data[UNSAMPLED] = 10
    assert is_current(layer)


def test_scores_are_pickled_as_a_parameter_without_their_memo():
    layer = new_layer()
    layer(torch.randn(1, SIZE))
    layer.scores.note = "kept"
    again = pickle.loads(pickle.dumps(layer.scores))
    assert type(again) is nn.Parameter
    assert again.__dict__ == {"note": "kept"}
    file = io.BytesIO()
    torch.save(layer.scores, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), layer.scores)


def test_a_captured_cuda_graph_may_write_scores_for_ever_after(monkeypatch):
    layer = new_layer()
    monkeypatch.setattr(masking, "_is_capturing", lambda _: True)
    layer(torch.randn(1, SIZE))
    monkeypatch.undo()
    layer(torch.randn(1, SIZE))
    assert state(layer.scores) is None
