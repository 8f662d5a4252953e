"""From tensors to the kernels: backends/cuda and csrc/cuda/bindings.cpp, with their ops registered for CPU tensors.

The library of ops is compiled here from the same bindings, with emulated kernels instead of the GPU's. Other tests
check what the kernels compute; here every argument must arrive where it belongs.
"""

import functools
from pathlib import Path

import bindings_on_host
import pytest
import torch
from by_name import ByName, oracle
from products import (
    MODES,
    Operands,
    assert_equals_reference,
    assert_same,
    column_major,
    every_second_column,
    inside_a_larger_one,
    integers,
    misaligned,
    pitched,
)

from mft_kernels import reference
from mft_kernels.backends import built, cuda
from mft_kernels.testing import integer_inputs

flat = ByName(cuda)

DTYPES = (torch.bfloat16, torch.float16)
MATRICES = ("x", "weight", "scores", "grad_output")


def compiled(folder: Path, name: str, *kernels: str):
    """Return torch.ops.NAME: the bindings over these kernels."""
    library = folder / f"lib{name}.so"
    bindings_on_host.build(library, name, *kernels)
    built.load_ops(library, name)
    return getattr(torch.ops, name)


@pytest.fixture(autouse=True, scope="session")
def ops(tmp_path_factory):
    """Return the ops over the emulator's kernels."""
    folder = tmp_path_factory.mktemp("bindings")
    return compiled(folder, "mft_cuda_on_host", *bindings_on_host.emulated_kernels())


@pytest.fixture(autouse=True)
def ops_on_host(ops, monkeypatch):
    monkeypatch.setattr(built, "cuda_ops", ops)


@pytest.fixture(params=["80", "90"])
def capability(request, monkeypatch):
    """Choose the kernels: Hopper's take only some arguments; the general kernels take the others."""
    monkeypatch.setenv("MFT_CUDA_CAPABILITY", request.param)


def inputs(dtype=torch.bfloat16, scores_dtype=torch.bfloat16, *, m=5, n=12, k=40):
    return integer_inputs(m, n, k, dtype, scores_dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scores_dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_argument_arrives_where_it_belongs(dtype, scores_dtype, mode, capability):
    """Forward, gradients and sums, from scores and from bits, with one threshold and with one per row."""
    t = inputs(dtype, scores_dtype)
    for threshold in (torch.tensor(1.0), torch.arange(12) % 3):
        assert_equals_reference(flat, Operands.of(t, threshold.to(scores_dtype), mode))


LAYOUTS = {
    "columns first": (column_major, MATRICES),
    "every second column": (every_second_column, MATRICES),
    "inside a larger one": (inside_a_larger_one, MATRICES),
    "an odd address": (misaligned, MATRICES),
    "strided bias and words": (pitched, ("bias", "packed", "signs")),
    "an expanded gradient": (lambda v: torch.ones((), dtype=v.dtype).expand(v.shape), ("grad_output",)),
    "three dimensions": (lambda v: v.view(2, 3, -1), ("x", "grad_output")),
    "one token": (lambda v: v[0], ("x", "grad_output")),
    "no token": (lambda v: v[:0], ("x", "grad_output")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_layouts(layout, capability):
    change, names = LAYOUTS[layout]
    o = integers(6, 12, 39, dtype=torch.bfloat16, scores_dtype=torch.bfloat16)
    assert_equals_reference(flat, o.change(change, *names))


@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_matrices_without_elements(n, k):
    assert_equals_reference(flat, integers(3, n, k, dtype=torch.bfloat16, scores_dtype=torch.bfloat16))


@pytest.mark.parametrize("tokens", [5, 70])
def test_products_of_a_long_depth_get_a_workspace(tokens, capability):
    t = inputs(m=tokens, n=16, k=1096)  # on 4 multiprocessors in 4 parts; d_x in one
    forward = (t.x, t.weight, t.scores, torch.tensor(1.0).bfloat16(), t.bias, "magnitude")
    assert_same(flat.masked_linear(*forward), oracle.masked_linear(*forward), small=False)


def test_score_gradients_of_many_tokens_get_a_workspace(capability):
    t = inputs(m=1100)  # on 4 multiprocessors in 4 parts
    got, expected = torch.full((12, 40), 3.0), torch.full((12, 40), 3.0)
    given = (t.grad_output[:, :8], t.x, t.weight[:8], t.scores[:8], None, "magnitude")
    flat.accumulate_score_grad(got[:8], *given)
    oracle.accumulate_score_grad(expected[:8], *given)
    assert_same(got, expected)


def test_products_without_a_weight_that_do_not_fit_are_refused():
    t = inputs()
    for message, out, grad, x in (
        ("x must be bfloat16 or float16", t.scores, t.grad_output.float(), t.x.float()),
        ("grad_output must have weight's dtype", t.scores, t.grad_output.half(), t.x),
        ("grad_output must be .5, 12., got .4, 12.", t.scores, t.grad_output[:4], t.x),
        ("d_scores must be .12, 40., got .11, 40.", t.scores[:11], t.grad_output, t.x),
    ):
        with pytest.raises(RuntimeError, match=message):
            flat.accumulate_product(out, grad, x)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize("mode", MODES)
def test_thresholds_masks_and_signs(dtype, mode):
    scores = inputs(scores_dtype=dtype).scores
    for ratio in (0.0, 0.5, 0.9, 1.0):
        threshold = reference.kept_threshold(scores, ratio, mode)
        assert_same(flat.kept_threshold(scores, ratio, mode), threshold)
        assert_same(flat.pack_mask(scores, threshold, mode), reference.pack_mask(scores, threshold, mode))
        distinct = torch.arange(240).view(12, 20).to(dtype)
        assert_same(flat.kept_threshold(distinct, ratio, mode), reference.kept_threshold(distinct, ratio, mode))
    rows = (torch.arange(12) % 3).to(dtype)
    assert_same(flat.pack_mask(scores, rows, mode), reference.pack_mask(scores, rows, mode))
    for got, expected in zip(flat.pack_signs(scores), reference.pack_signs(scores)):
        assert_same(got, expected)


def test_what_does_not_fit_is_refused(ops):
    t = inputs()
    one = torch.tensor(1.0).bfloat16()

    def product(x=t.x, weight=t.weight, scores=t.scores, threshold=one, packed=None, bias=None, transposed=False):
        return ops.product(x, weight, scores, threshold, packed, bias, True, transposed)

    for message, arguments in {
        "x must be .5, 40., got .5, 39.": {"x": t.x[:, :39]},
        "x must have weight's dtype": {"x": t.x.half()},
        "x must be 2-d with unit column stride": {"x": t.x.T.contiguous().T},
        "x must have rows that do not overlap": {"x": t.x[:1].expand(5, 40)},
        "weight must be bfloat16 or float16": {"weight": t.weight.float()},
        "scores must be .12, 40., got .11, 40.": {"scores": t.scores[:11]},
        "scores must be float32, bfloat16 or float16": {"scores": t.scores.double()},
        "threshold must have scores' dtype": {"threshold": torch.tensor(1.0)},
        "threshold must be .. or .12,.": {"threshold": one.expand(11)},
        "give scores and threshold, or packed": {"scores": None},
        "packed must be int32, contiguous and .12, 2.": {"packed": torch.zeros(12, 3, dtype=torch.int32)},
        "bias must be .N,.": {"bias": t.bias[:11]},
        "bias must be for the forward": {"x": t.grad_output, "bias": t.bias, "transposed": True},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            product(**arguments)
    assert product().shape == (5, 12)


@pytest.mark.slow
def test_hopper_s_product_takes_the_tile_and_parts_that_it_is_given(ops, monkeypatch):
    """Every tile, in one part and in several, from packed masks and in both modes, forward and d_x (`make gpu`)."""
    layouts = pytest.importorskip("benchmarks.gpu.layouts", reason="it measures Triton kernels", exc_type=ImportError)
    monkeypatch.setenv("MFT_CUDA_CAPABILITY", "90")
    checks = dict(layouts.tile_checks([torch.bfloat16], torch.device("cpu")))
    assert len(checks) == 3 * 2 * 3 * 3
    for run in checks.values():
        run()
    t, one = inputs(n=16), torch.tensor(1.0).bfloat16()
    product = functools.partial(ops.product, t.x, t.weight, t.scores, one, None, t.bias, True, False)
    assert_same(product(64, 1), product())
    for tile, message in {
        (96, 1): "tokens must be 64, 128 or 256, and each of parts must have steps to sum, got 96 and 1",
        (64, 0): "got 64 and 0",
        (64, 2): "got 64 and 2",  # for a sum of one pair of steps
    }.items():
        with pytest.raises(RuntimeError, match=message):
            product(*tile)
    with pytest.raises(RuntimeError, match="Hopper's product: scores must be of weight's type"):
        ops.product(t.x, t.weight, t.scores.float(), one.float(), None, None, True, False, 64, 1)
    monkeypatch.setenv("MFT_CUDA_CAPABILITY", "80")
    with pytest.raises(RuntimeError, match=r"Hopper's product: the device must be of 9\.0"):
        product(64, 1)


KERNELS = """
#include "api.h"
namespace mft::cuda {
std::string product_sm80(const Product& p, const Device& d) {
  return (p.workspace ? "general in parts, " : "general, ") + std::to_string(d.capability);
}
std::string product_sm90(const Product& p, const Device&) {
  return p.workspace ? "Hopper's in parts" : "Hopper's";
}
// By the number of features: 256 general in parts, 257 Hopper's in parts.
Plan plan_sm80(const Product& p, const Device&) { return {1, 64, 1, p.in.rows == 2 && p.out.rows == 2 ? 64 : 0}; }
Plan plan_sm80(const ScoreGrad&, const Device&) { return {}; }
Plan plan_sm90(const Product& p, const Device&) {
  return {p.out.columns == 256 ? 2.0 : 1.0, 64, 1, p.out.columns == 257 ? 64 : 0};
}
std::string refusal_sm90(const Product& p) {
  const bool other_scores = !p.keep.words && p.keep.scores.type != p.weight.type;
  return p.weight.stride % 8 ? "odd rows" : other_scores ? "scores of another type" : "";
}
std::string score_grad_sm80(const ScoreGrad&, const Device&) { return "general"; }
std::string kept_threshold(const Select&, const Device&) { return ""; }
std::string pack_mask(const PackMask&, const Device&) { return ""; }
std::string pack_signs(const PackSigns&, const Device&) { return ""; }
int64_t select_workspace(Type) { return 0; }
}
"""


def test_hopper_gets_its_own_kernels_where_they_can_take_the_arguments(tmp_path, monkeypatch):
    (tmp_path / "kernels.cpp").write_text(KERNELS)
    monkeypatch.setattr(built, "cuda_ops", compiled(tmp_path, "mft_cuda_named", str(tmp_path / "kernels.cpp")))
    for capability, k, runs in (
        ("80", 40, "general, 80"),
        ("89", 40, "general, 89"),
        ("90", 40, "Hopper's"),
        ("90", 39, "general, 90"),
        ("100", 40, "general, 100"),
    ):
        monkeypatch.setenv("MFT_CUDA_CAPABILITY", capability)
        t, one = inputs(k=k), torch.tensor(1.0).bfloat16()
        with pytest.raises(RuntimeError, match=f"the cuda backend: {runs}"):
            flat.masked_linear(t.x, t.weight, t.scores, one, None, "magnitude")
        with pytest.raises(RuntimeError, match="the cuda backend: general"):  # this build has no other kernel
            flat.accumulate_score_grad(t.scores, t.grad_output, t.x, t.weight, None, None, "value")
    monkeypatch.setenv("MFT_CUDA_CAPABILITY", "90")
    # Hopper's kernel does not take fp32 scores.
    for dtype, runs in ((torch.bfloat16, "Hopper's"), (torch.float32, "general, 90")):
        t = inputs(scores_dtype=dtype, m=256)
        with pytest.raises(RuntimeError, match=f"the cuda backend: {runs}"):
            flat.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0).to(dtype), None, "magnitude")
    # The kernel whose plan takes fewer cycles runs, in parts if the plan asks for a workspace.
    for n, k, runs in (
        (255, 40, "Hopper's"), (256, 40, "general in parts, 90"), (257, 40, "Hopper's in parts"),
        (257, 39, "general in parts, 90"),
    ):  # fmt: skip
        t = inputs(m=2, n=n, k=k)
        with pytest.raises(RuntimeError, match=f"the cuda backend: {runs}"):
            flat.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0).bfloat16(), None, "magnitude")
    assert built.cuda_ops.contents() == "none product_sm90"
