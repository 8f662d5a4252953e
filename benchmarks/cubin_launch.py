"""python -m benchmarks.cubin_launch [--quick]: what a forward by cubins costs the host, on a driver that does nothing.

bench_launch.py's layers and words, bf16 on CPU tensors taken for an H100's, by mft_kernels/cubins (make cubins). What
CUDA itself costs is in none of the figures: the driver, finding device and stream, memory of the device.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from mft_kernels import backends
from mft_kernels.triton import cubins, ops
from mft_kernels.triton.choice import automatic
from mft_kernels.triton.target import H100

from . import bench_launch
from .harness import ROOT
from .tables import launch_tables

_OPS = {"masked_linear_packed": ops.masked_linear_packed}


def main(quick: bool) -> None:
    """Print the table."""
    archives = cubins.FOLDER
    if not (archives / f"{H100}.zip").exists():
        sys.exit(f"there must be cubins for {H100} in {archives}; make cubins")
    sys.path[:0] = [str(ROOT / "tests/cubins")]  # the driver lies with the tests
    import on_stub

    with tempfile.TemporaryDirectory() as folder:
        on_stub.build(Path(folder))
        stub = on_stub.Stub(Path(folder), archives)
        stub.set_recording(False)
        served = backends.Backend(
            name="triton",
            device_types=frozenset({"cpu"}),
            dtypes=frozenset(),
            ops=_OPS,
            automatic={name: lambda *given, op=op: op(*given, choose=automatic) for name, op in _OPS.items()},
            short={"masked_linear_packed": torch.ops.mft_cuda.try_masked_linear_packed.default},
        )
        backends._TABLE["triton"] = served
        backends._chosen.clear()
        backends.short_ways.clear()
        with on_stub.taken_for(H100):
            print(_table(bench_launch.QUICK if quick else bench_launch.STORED))
        if not stub.modules_loaded():
            sys.exit("no cubin was launched, so these are another kernel's times")


def _table(budget: bench_launch.Budget) -> str:
    torch.set_num_threads(1)
    layers = bench_launch.layers(torch.bfloat16)
    rows = []
    for situation in (bench_launch.NO_GRAD, bench_launch.INFERENCE, bench_launch.GRAD):
        samples = bench_launch.time_calls(layers, torch.bfloat16, situation, budget)
        rows += bench_launch.rows_of("bf16", situation, samples)
    return "\n\n".join(launch_tables({"calls": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cubin_launch", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    main(parser.parse_args().quick)
