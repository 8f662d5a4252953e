"""Compare the arguments that Triton's launcher and ours pass for the same launches.

main(FOLDER) prints them as JSON, and leaves archives of the launched kernels in the folder, where on_stub has built.
"""

import json
from pathlib import Path

import calls
import on_stub

from building import cubins as build
from mft_kernels.backends.triton import cubins
from mft_kernels.backends.triton.launch import Launch
from mft_kernels.backends.triton.specialise import identity
from mft_kernels.backends.triton.target import A100, B200, H100, Target, assume


def both(stub: on_stub.Stub, launch: Launch, target: Target) -> dict:
    """Return what a launch passes, with our cubin and with Triton's launcher, and the manifest's parameters."""
    cubin = cubins.find(str(target), launch.kernel, launch.args, launch.options)
    assert cubin is not None
    key = identity(launch.kernel, launch.args, launch.options)
    cubin.launch(0, launch.grid, launch.kernel, launch.args)
    ours = stub.launches()
    with assume(target):
        launch.kernel[launch.grid](*launch.args, **launch.options)
    layout = cubins.bundle(str(target))[0].cubins[key]["parameters"]
    return {"ours": ours, "theirs": stub.launches(), "layout": layout}


def mistakes(stub: on_stub.Stub, launch: Launch, target: Target) -> list:
    """Return the result of our launch with two arguments swapped, and with one left out."""
    cubin = cubins.find(str(target), launch.kernel, launch.args, launch.options)
    right, found = cubins.values_of, []
    for wrong in (lambda v: [v[1], v[0], *v[2:]], lambda v: v[:-1]):
        cubins.values_of = lambda kernel, args, wrong=wrong: (wrong(right(kernel, args)[0]), [], {})
        try:
            cubin.launch(0, launch.grid, launch.kernel, launch.args)
            found.append(stub.launches())
        except RuntimeError as error:
            found.append(str(error).splitlines()[0])
    cubins.values_of = right
    return found


def main(folder: Path) -> None:
    """Print the report."""
    stub, report = on_stub.Stub(folder), {}
    for target in (A100, H100, B200):
        launched = {name: on_stub.launches_of(call, target) for name, call in calls.every_call().items()}
        every = {identity(one.kernel, one.args, one.options): one for some in launched.values() for one in some}
        build.write_archive(folder, str(target), {key: build.compiled(one, target) for key, one in every.items()})
        stub.use_triton_s_launcher(target.arch)
        found = {name: [both(stub, one, target) for one in some] for name, some in launched.items()}
        report[str(target)] = {
            "calls": found,
            "cubins": len(every),
            "mistakes": mistakes(stub, launched["mask"][-1], target),
        }
    print(json.dumps(report))
