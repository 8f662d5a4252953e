"""The CUDA kernels in the GPU suite: an op that is wrong in one element is found, and a missing library is reported."""

from types import SimpleNamespace

import pytest
import torch

from mft_kernels.backends import built, table
from mft_kernels.backends.table import Backend, registered
from mft_kernels.operands import Keep
from mft_kernels.testing import integer_inputs

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from gpu_records import CEILINGS, on_host

from benchmarks.gpu import cases, correctness, equality, layouts, once_a_step, products, timing
from benchmarks.gpu.cases import CUDA, FUSED, Case
from benchmarks.gpu.results import FAILED, NOT_MEASURED

BACKEND = "cuda_on_host"
IN_PLACE = ("accumulate_score_grad", "accumulate_score_grad_grouped")
OPS = (
    "masked_linear", "masked_linear_backward", "masked_linear_packed", "masked_linear_packed_backward",
    "accumulate_score_grad", "kept_threshold", "pack_mask", "pack_signs",
)  # fmt: skip
#: Those that csrc/cuda does not serve.
OTHER_OPS = (
    "masked_linear_many", "masked_linear_many_backward", "masked_linear_quantized", "masked_linear_quantized_d_x",
    "masked_linear_grouped", "masked_linear_grouped_backward", "masked_linear_grouped_packed",
    "masked_linear_grouped_packed_backward", "accumulate_score_grad_grouped", "kept_thresholds",
)  # fmt: skip


@pytest.fixture
def changes(monkeypatch):
    """Return a dict of changes to the results of BACKEND's ops, by op name.

    Without a change the results are right: those of the reference in fp32, rounded once.
    """
    found = {}

    def replaced(name):
        right = getattr(torch.ops.mft, name)

        def op(*arguments):
            *arguments, backend = arguments
            if backend != BACKEND:
                return right(*arguments, backend)
            made = exact(right, name, arguments)
            return found[name](made, *arguments) if name in found else made

        return op

    def step(update):
        made = registered("reference").function("step")(update)
        return found["score_step"](made, update.scores) if "score_step" in found else made

    for name in (*OPS, *OTHER_OPS):
        monkeypatch.setattr(torch.ops.mft, name, replaced(name))

    def in_tile(a, weight, scores, threshold, packed, bias, magnitude, transposed, tokens, parts):
        keep = Keep(packed) if scores is None else Keep(scores, threshold, "magnitude" if magnitude else "value")
        made = registered("reference").function("product")(
            a.float(), weight.float(), keep, equality.widened(bias), transposed=transposed
        )
        made, way = made.to(a.dtype), (tokens, parts, keep.mode, transposed)
        return found["product"](made, way) if "product" in found else made

    library = SimpleNamespace(contents=lambda: "sm_90 product_sm90", product=in_tile)
    monkeypatch.setattr(built, "cuda_ops", library)
    monkeypatch.setitem(table._TABLE, BACKEND, Backend(BACKEND, frozenset({"cpu"}), frozenset(), {"step": step}))
    monkeypatch.setattr(table, "_chosen", {})
    return found


def exact(right, name, arguments):
    """Return the result of a correct kernel for these arguments."""
    wide = [equality.widened(value) for value in arguments]
    if name in IN_PLACE:
        wide[0] = wide[0].clone()
        right(*wide, "reference")
        return arguments[0].copy_(wide[0])
    made, like = right(*wide, "reference"), right(*arguments, "reference")
    if isinstance(made, torch.Tensor):
        return made.to(like.dtype)
    return tuple(one.to(other.dtype) for one, other in zip(made, like))


@pytest.fixture
def here():
    return on_host(without={})


def complaints_of(detail, device):
    fields = correctness.check(Case("correctness", detail=detail), device, 60)
    assert (fields["status"] == FAILED) == bool(fields["complaints"])
    return fields


@pytest.fixture
def other():
    """Return a device on which Triton's name stands for BACKEND."""
    device = on_host(without={})
    device.backends = device.backends | {FUSED: BACKEND}
    return device


@pytest.mark.parametrize(("detail", "least"), zip(cases.CUDA_CHECKS, (40, 2, 3, 150)))
def test_right_kernels_pass_every_check(detail, least, changes, here):
    fields = complaints_of(detail, here)
    assert fields["complaints"] == []
    assert fields["passed"] >= least


@pytest.mark.parametrize("wrong", [None, "put_aside", "put_back", "drop"])
def test_a_mask_in_place_that_changes_wrongly_is_found(wrong, monkeypatch):
    t, threshold = integer_inputs(4, 33, 72, torch.bfloat16, torch.float32), torch.tensor(2.0)
    reference = registered("reference").functions

    def mistaken(weight, *rest):
        found = reference[wrong](weight, *rest)
        (weight if found is None else found).view(-1)[-1] += 1
        return found

    functions = reference | ({} if wrong is None else {wrong: mistaken})
    other = Backend(BACKEND, frozenset({"cpu"}), frozenset(), functions)
    monkeypatch.setitem(table._TABLE, BACKEND, other)
    name, check = equality.flips_check("M = 4", t, threshold, BACKEND)
    assert name.startswith("mask in place")
    if wrong is None:
        return check()
    with pytest.raises(AssertionError, match="elements differ"):
        check()


def flip_last(result, *arguments):
    first, *rest = result if isinstance(result, tuple) else (result,)
    first = first.clone()
    if first.numel():
        first.view(-1)[-1] += 1
    return (first, *rest) if rest else first


def add_late(result, out, *arguments):
    if out.numel():
        out.view(-1)[-1] += 1


@pytest.mark.parametrize("op", [OPS[0], *(pytest.param(op, marks=pytest.mark.slow) for op in OPS[1:])])
def test_one_wrong_element_of_any_op_is_found(op, changes, here):
    changes[op] = add_late if op in IN_PLACE else flip_last
    found = complaints_of("cuda layouts", here)["complaints"]
    assert any(c.startswith(op) for c in found)
    assert any("1 of" in c for c in found)
    assert any(c.startswith(f"{op}, ") for c in complaints_of("cuda exact", here)["complaints"])


def test_other_ops_that_are_right_pass(changes, other):
    fields = complaints_of("other ops", other)
    assert fields["complaints"] == []
    assert fields["passed"] >= 30


@pytest.mark.slow
@pytest.mark.parametrize("op", OTHER_OPS)
def test_one_wrong_element_of_another_op_is_found(op, changes, other):
    changes[op] = add_late if op in IN_PLACE else flip_last
    assert any(c.startswith(f"{op}, ") and "1 of" in c for c in complaints_of("other ops", other)["complaints"])


def test_every_tile_and_sum_of_hopper_s_product_is_asked_for_and_a_wrong_one_is_found(changes, here):
    every = {
        (tokens, parts, mode, transposed)
        for tokens in (64, 128, 256) for parts in (1, 2, 3)
        for mode in ("packed", "magnitude", "value") for transposed in (False, True)
    }  # fmt: skip
    seen, wrong = [], (128, 2, "value", True)
    changes["product"] = lambda made, way: seen.append(way) or (flip_last(made) if way == wrong else made)
    assert complaints_of("cuda layouts", here)["complaints"] == [
        "product_sm90, bfloat16, value, d_x, tiles of 128, parts 2: "
        "AssertionError: output 0: 1 of 128000 elements differ"
    ]
    assert {*seen} == every
    seen.clear()
    for name, run in layouts.few(torch.device("cpu"), BACKEND):
        if name.startswith("product_sm90"):
            run() if "value, d_x, tiles of 128, parts 2" not in name else None
    assert {*seen} == {way for way in every if way[1] < 3} - {wrong}  # these run under compute-sanitizer
    built.cuda_ops.contents = lambda: "sm_80"  # a library without product_sm90
    assert not [name for name, _ in layouts.few(torch.device("cpu"), BACKEND) if name.startswith("product_sm90")]


def test_a_wrong_step_is_found(changes, other):
    def forgets(result, scores, *arguments):
        scores.zero_()
        return result

    changes["score_step"] = forgets
    found = complaints_of("other ops", other)["complaints"]
    assert {c.split(", fused")[0] for c in found} == {f"score_step, {scheme}" for scheme in once_a_step.SCHEMES}
    assert all("% of the new scores differ" in c for c in found)


def test_an_element_that_nobody_writes_is_found(changes, here):
    def unwritten(result, *arguments):
        memory = torch.empty_like(result)
        if result.numel():
            memory.view(-1)[:-1] = result.reshape(-1)[:-1]
        return memory

    changes["masked_linear"] = unwritten
    assert complaints_of("cuda layouts", here)["failed"] > 10


def test_a_graph_that_does_not_read_its_inputs_again_is_found(changes, here):
    layouts.in_a_graph((8, 24, 40), here)

    def once(run):
        results = run()
        return lambda: results

    here.graph = once
    with pytest.raises(AssertionError, match="elements differ"):
        layouts.in_a_graph((8, 24, 40), here)


def test_without_the_library_only_cuda_is_left_out_and_says_why():
    device, why = on_host(), "its library is not built"
    for detail in (*cases.CUDA_CHECKS, *cases.SANITIZERS):
        fields = correctness.check(Case("correctness", detail=detail), device, 60)
        assert fields == {"status": NOT_MEASURED, "reason": f"without cuda: {why}"}
    bench = timing.Bench(device, CEILINGS)
    fields = once_a_step.time_threshold(Case("threshold", 24, 40, detail="bfloat16"), bench)
    assert {"kept_threshold", "pack_mask", "sort"} <= fields["samples"].keys()
    assert not [name for name in fields["samples"] if CUDA in name]
    assert (fields["failures"], fields["left_out"]) == ({}, {CUDA: why})


def test_a_wrong_kernel_is_not_timed_and_an_accumulating_one_starts_from_zero(changes, here, monkeypatch):
    monkeypatch.setattr(products, "competitors", lambda case: (cases.DENSE, cases.EAGER, CUDA))
    bench = timing.Bench(here, CEILINGS)
    case = Case("accumulate", 24, 40, 3)
    for _ in range(2):
        fields = products.time_product(case, bench)
        assert fields["failures"] == {}
        assert CUDA in fields["samples"]
    changes["accumulate_score_grad"] = lambda result, out, *a: out.mul_(2)
    fields = products.time_product(case, bench)
    assert "wrong: 1 from the eager form" in fields["failures"][CUDA]
    assert CUDA not in fields["samples"]
