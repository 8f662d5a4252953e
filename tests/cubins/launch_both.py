"""python launch_both.py FOLDER: what Triton's launcher and ours pass for the same launches, as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import on_stub
import torch

from building import cubins as build
from mft_kernels.triton import cubins, ops
from mft_kernels.triton.launch import Launch
from mft_kernels.triton.specialise import identity
from mft_kernels.triton.target import A100, B200, H100, Target, assume

BF16 = torch.bfloat16


def packed_forward(m: int, n: int, k: int, has_bias: bool) -> Callable[[], object]:
    """A call on memory of its own, which nobody reads."""
    x, weight = torch.empty(m, k, dtype=BF16), torch.empty(n, k, dtype=BF16)
    packed, bias = torch.empty(n, k // 32, dtype=torch.int32), torch.empty(n, dtype=BF16) if has_bias else None
    return lambda: ops.masked_linear_packed(x, weight, packed, bias)


CALLS = {
    "packed": packed_forward(1, 512, 1024, False),
    "packed, bias": packed_forward(100, 512, 1024, True),
    "packed, a single part": packed_forward(600, 4096, 128, False),
    "packed, words at no multiple of 16": packed_forward(20, 256, 576, True),
}


def both(stub: on_stub.Stub, launch: Launch, target: Target) -> dict:
    """What a launch passes: ours by its cubin, theirs by Triton's launcher."""
    cubin = cubins.find(str(target), launch.kernel, launch.args, launch.options)
    assert cubin is not None
    cubin.launch(0, launch.grid, launch.kernel, launch.args)
    ours = stub.launches()
    with assume(target):
        launch.kernel[launch.grid](*launch.args, **launch.options)
    return {"ours": ours, "theirs": stub.launches()}


def mistakes(stub: on_stub.Stub, launch: Launch, target: Target) -> list[str]:
    """What becomes of our launch with two arguments swapped, and with one left out."""
    cubin = cubins.find(str(target), launch.kernel, launch.args, launch.options)
    right, found = cubins.values_of, []
    for wrong in (lambda v: [v[1], v[0], *v[2:]], lambda v: v[:-1]):
        cubins.values_of = lambda kernel, args, wrong=wrong: wrong(right(kernel, args))
        try:
            cubin.launch(0, launch.grid, launch.kernel, launch.args)
            found.append(stub.launches())
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
    cubins.values_of = right
    return found


def main(folder: Path) -> None:
    """Print it."""
    stub = on_stub.Stub(folder)
    on_stub.load_ops(folder)
    cubins.FOLDER = folder
    cubins.load = lambda part: None
    report = {}
    for target in (A100, H100, B200):
        launched = {name: on_stub.launches_of(call, target) for name, call in CALLS.items()}
        every = {identity(one.kernel, one.args, one.options): one for some in launched.values() for one in some}
        build.write_archive(folder, str(target), {key: build.compiled(one, target) for key, one in every.items()})
        on_stub.use_triton_s_launcher(target.arch)
        found = {name: [both(stub, one, target) for one in some] for name, some in launched.items()}
        report[str(target)] = {
            "calls": found,
            "layouts": {key: entry["parameters"] for key, entry in cubins.bundle(str(target))[0].cubins.items()},
            "mistakes": mistakes(stub, launched["packed"][-1], target),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
