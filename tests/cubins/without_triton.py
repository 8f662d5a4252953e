"""Launches of the ops without Triton, from the archives of launch_both.py.

main(FOLDER) prints JSON: each call's launches and the address of its result, how many cubins were loaded, the launches
of calls that only resemble a remembered one, which calls are planned in Python, and a refusal. Import this module where
``import triton`` fails.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import calls
import on_stub
import torch
from by_name import ByName

from mft_kernels.backends import built
from mft_kernels.backends.triton import bits, choice, cubins, language, ops, planned, select
from mft_kernels.backends.triton.target import A100, B200, H100

flat = ByName(ops)

assert not language.INSTALLED


def address(tensor: torch.Tensor) -> str:
    """Return the address as a parameter's bytes."""
    return tensor.data_ptr().to_bytes(8, "little").hex()


def pitched(stub: on_stub.Stub) -> list[str]:
    """Return what rows with a pitch launch, after rows without one, and with nothing remembered."""
    m, n, k = 600, 4096, 128
    x, weight = torch.empty(m, 2 * k, dtype=calls.BF16), torch.empty(n, k, dtype=calls.BF16)
    packed, launches = torch.empty(n, k // 32, dtype=torch.int32), []
    with on_stub.taken_for(H100):
        flat.masked_linear_packed(torch.empty(m, k, dtype=calls.BF16), weight, packed, None)
        for _ in range(2):
            stub.launches()
            y = flat.masked_linear_packed(x[:, :k], weight, packed, None)
            launches.append(json.dumps(stub.launches()).replace(address(y), "y"))
            planned.forget()
    return launches


def shared(stub: on_stub.Stub) -> bool:
    """Return whether x's own address is launched, after a call whose x had the weight's address."""
    n, k = 512, 1024
    weight, packed = torch.empty(n, k, dtype=calls.BF16), torch.empty(n, k // 32, dtype=torch.int32)
    with on_stub.taken_for(H100):
        flat.masked_linear_packed(weight[:1], weight, packed, None)
        stub.launches()
        x = torch.empty(1, k, dtype=calls.BF16)
        flat.masked_linear_packed(x, weight, packed, None)
    return address(x) in json.dumps(stub.launches())


def in_python(call: Callable[[], object]) -> bool:
    """Return whether a call is planned in Python: then it looks for cubins, whether it finds them or not."""
    looked_for = mock.patch.object(cubins, "find", wraps=cubins.find)
    with looked_for as find, contextlib.suppress(cubins.NoCubin):
        call()
    return find.called


def moved(stub: on_stub.Stub, call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[bool, int]:
    """Compare the parameters of two calls; return (whether all results moved, how many other parameters differ)."""
    with on_stub.taken_for(H100):
        (first, before), (second, after) = ((call(), stub.launches()) for _ in range(2))
    parameters = ([p for launch in launches for p in launch["parameters"]] for launches in (before, after))
    differ = {(p[:16], q[:16]) for p, q in zip(*parameters, strict=True) if p != q}  # the address, or that of a map
    results = {(address(a), address(b)) for a, b in zip(first, second, strict=True) if a.numel() > 0}
    return results <= differ, len(differ - results)


def rows(m: int, k: int, dtype: torch.dtype, pitch: int = 0, offset: int = 0) -> torch.Tensor:
    """Return (M, K) with a pitch of K + pitch, whose first row is ``offset`` elements behind a multiple of 16 bytes."""
    return torch.empty(offset + m * (k + pitch), dtype=dtype)[offset:].view(m, k + pitch)[:, :k]


def gradients(
    m: int = 32, dtype: torch.dtype = calls.BF16, of_scores: torch.dtype | None = None, wanted: str = "xs", **like: int
) -> Callable[[], object]:
    """Return a call for gradients of a product with packed mask, as "auto" chooses; ``like``: see rows."""
    n, k = 512, 1024
    x, grad, weight = rows(m, k, dtype, **like), rows(m, n, dtype), torch.empty(n, k, dtype=dtype)
    packed, signs = (torch.empty(n, k // 32, dtype=torch.int32) for _ in range(2))
    scores = None if of_scores is None else torch.empty(n, k, dtype=of_scores)
    given = (grad, x, weight, packed, scores, signs, "magnitude", ["x" in wanted, "w" in wanted, "s" in wanted, False])
    return lambda: flat.masked_linear_packed_backward(*given, choose=choice.automatic)


def sums(m: int = 32, into: torch.dtype = calls.BF16, **like: int) -> Callable[[], object]:
    """Return a call like calls.sums."""
    out, grad, x = torch.empty(512, 1024, dtype=into), rows(m, 512, calls.BF16), rows(m, 1024, calls.BF16, **like)
    return lambda: flat.accumulate_product(out, grad, x)


def fp32_gradients(leading: tuple[int, ...] = (16,), turned: bool = False) -> Callable[[], object]:
    """Return a call for gradients in mode "value"; ``turned``: no view of the gradient is a matrix."""
    grad, x = torch.empty(*leading, 512), torch.empty(*leading, 512)
    given = (grad.transpose(0, 1) if turned else grad, x, torch.empty(512, 512), torch.empty(512, 512), torch.empty(()))
    return lambda: flat.masked_linear_backward(*given, "value", [True, False, True, False])


def others() -> dict[str, Callable[[], object]]:
    """Return calls other than products with one mask, and one that packs its mask first."""
    names = (
        "rows of many masks",
        "nested nf4, d_x",
        "int8",
        "threshold",
        "mask",
        "signs",
        "step",
        "scores, packed first",
    )
    every = calls.every_call()
    return {name: every[name] for name in names}


def with_other_numbers(stub: on_stub.Stub) -> list[str]:
    """Return what a selection with another share, and the next step, launch: with the first plan, and without."""
    scores, launches = torch.empty(64, 512, dtype=calls.BF16), []
    stepped = calls.step(64, 512)
    with on_stub.taken_for(H100):
        for _ in range(2):
            select.kept_threshold(scores, 0.9, "magnitude")
            stepped()
            launched = []
            for call in (lambda: select.kept_threshold(scores, 0.5, "magnitude"), lambda: stepped(step=2, lr=1e-2)):
                stub.launches()
                call()
                launched.append([[p for p in one["parameters"] if len(p) == 8] for one in stub.launches()])
            launches.append(json.dumps(launched))
            planned.kind = lambda *_, **__: None
    return launches


def zeros_again() -> list[int]:
    """Return the counts of zeros among scores, where the counter's memory held something else before."""
    scores, found = torch.empty(64, 512), []
    with on_stub.taken_for(H100):
        for _ in range(8):
            used = [torch.full((), 7, dtype=torch.int64) for _ in range(4)]
            del used
            found.append(int(bits.pack_signs(scores)[1]))
    return found


def bounded() -> tuple[int, bool, bool]:
    """Return (the most plans remembered, whether a plan in constant use is kept, whether an unused one is)."""
    given, most, first = [torch.empty(1)] * 3, 0, 10**6
    for kind in range(first, first + 20000):
        built.cuda_ops.remember_plan([*given, None, None, None], kind, [], 0, [], 0, [])
        in_use = built.cuda_ops.planned_sums(*given, None, None, first)
        most = max(most, built.cuda_ops.count_plans())
    return most, in_use, built.cuda_ops.planned_sums(*given, None, None, first + 1)


def planned_anew() -> dict[str, list[bool]]:
    """Return which calls of a sequence are planned in Python."""
    each = {"m": 33}, {"pitch": 8}, {"offset": 1}
    of_gradients = (
        {"dtype": torch.float16},
        {"of_scores": calls.BF16},
        {"wanted": "x"},
        {"wanted": "s"},
        {"wanted": "xws"},
    )
    with on_stub.taken_for(H100):
        found = {
            "gradients": [in_python(gradients()) for _ in range(3)],
            "sums": [in_python(sums()) for _ in range(3)],
            "fp32 gradients": [in_python(fp32_gradients()) for _ in range(3)],
            "other gradients": [in_python(gradients(**other)) for other in (*each, *of_gradients)],
            "others": [in_python(call) for call in others().values() for _ in range(2)],
            "other others": [
                in_python(call)
                for call in (
                    calls.rows_of_many_masks(8, 512, 1024, 4),
                    calls.over_codes(40, 512, 512, "nested", True, has_bias=False),  # its arguments are those of d_x
                    calls.over_codes(40, 512, 512, "nf4", False),
                    calls.over_codes(40, 512, 1024, "nested", False),
                    lambda: select.kept_threshold(torch.empty(64, 512, dtype=calls.BF16), 0.9, "value"),
                )
            ],
            "other sums": [in_python(sums(**other)) for other in (*each, {"into": torch.float32})],
        }
        torch.set_float32_matmul_precision("high")  # TF32
        found["other gradients"].append(in_python(fp32_gradients()))
        torch.set_float32_matmul_precision("highest")
        for name, value in (("MFT_TRITON", "jit"), ("MFT_AUTOTUNE", "1")):
            with mock.patch.dict(os.environ, {name: value}):
                found["other gradients"].append(in_python(gradients()))
        found["gradients"].append(in_python(gradients()))  # they have not been forgotten
        copied, (m, n) = fp32_gradients((4, 4), turned=True), (128, 512)
        given = torch.empty(m, n), torch.empty(n, n), torch.empty(n, n), torch.empty(()), None, "value"
        through_scratch = lambda: flat.masked_linear(*given, choose=choice.automatic)  # noqa: E731
        found["what torch had a hand in"] = [in_python(call) for call in (copied, through_scratch) for _ in range(2)]
    return found


def short_way() -> list[bool]:
    """Return whether it serves a remembered forward: unchanged, and with each setting that does not use cubins."""
    with on_stub.taken_for(H100):
        x, weight = torch.empty(1, 1024, dtype=calls.BF16), torch.empty(512, 1024, dtype=calls.BF16)
        packed, served = torch.empty(512, 32, dtype=torch.int32), []
        flat.masked_linear_packed(x, weight, packed, None, choose=choice.automatic)
        for setting in ({}, {"MFT_TRITON": "jit"}, {"MFT_AUTOTUNE": "1"}):
            with mock.patch.dict(os.environ, setting):
                served.append(built.cuda_ops.try_masked_linear_packed(x, weight, packed, None) is not None)
    return served


def main(folder: Path) -> None:
    """Print the report."""
    stub, report = on_stub.Stub(folder), {}
    for target in (A100, H100, B200):
        found = {}
        for name, call in calls.every_call().items():
            with on_stub.taken_for(target):
                call()
                first = stub.launches()
                out = call()  # from what is remembered
            found[name] = {"launches": first, "again": stub.launches(), "out": out.data_ptr()}
        report[str(target)] = found
    report["modules"] = stub.modules_loaded()
    report["pitched"], report["shared"] = pitched(stub), shared(stub)
    stub.launches()
    report["moved"] = moved(stub, gradients())
    report["in Python"], report["short way"] = planned_anew(), short_way()
    report["zeros"], report["bounded"] = zeros_again(), bounded()
    try:
        with on_stub.taken_for(H100):
            calls.packed_forward(3, 17, 96)()
    except cubins.NoCubin as error:
        report["refusal"] = str(error)
    report["other numbers"] = with_other_numbers(stub)
    print(json.dumps(report))
