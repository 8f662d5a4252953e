"""python -m benchmarks.cubin_launch [--quick]: measure what a call by cubins costs the host, with a driver stub.

The layers and terms are those of bench_launch.py. Added are each gradient by its own op, rows with many masks, codes,
selection and an optimiser step by their ops. Tensors are bf16 on the CPU, treated as an H100's, and run by
mft_kernels/cubins (make cubins). The figures exclude the costs of CUDA itself: the driver, finding device and stream,
and device memory. The answer is stored as question `cubin_launch`, with its CPU; --quick stores into build/benchmarks.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from mft_kernels import accumulate_score_grad, masked_linear_many, masked_linear_quantized, pack_mask, score_step
from mft_kernels.backends import built
from mft_kernels.backends import table as backends
from mft_kernels.backends.triton import cubins
from mft_kernels.backends.triton import functions as triton_functions
from mft_kernels.backends.triton.target import H100
from mft_kernels.ops.linear import GRADIENTS_OF_PACKED
from mft_kernels.ops.quantized import masked_linear_quantized_d_x
from mft_kernels.reference.step import BLOCK
from mft_kernels.timing import time_interleaved

from . import bench_launch
from .harness import ROOT, report, write_results_to
from .tables import launch_tables

SITUATIONS = (bench_launch.NO_GRAD, bench_launch.INFERENCE, bench_launch.GRAD, bench_launch.STEP)
GRADIENTS, OTHERS = "gradients alone", "other ops"
STORED = bench_launch.Budget(rounds=63)  # as many as three processes of `launch` take together


def main(budget: bench_launch.Budget = STORED) -> None:
    """Print and store the answer."""
    torch.set_num_threads(1)
    findings, rows = [], []
    with _by_cubins():
        layers = bench_launch.layers(torch.bfloat16)
        for situation in SITUATIONS:
            samples = bench_launch.time_calls(layers, torch.bfloat16, situation, budget)
            own = bench_launch.rows_of("bf16", situation, samples)
            rows += own
            # Without the ratios: otherwise benchmarks.compare would need cubins on every machine.
            findings += [f for row in own for f in bench_launch.findings_of(row, samples) if f.unit == "us"]
        for situation, calls in ((GRADIENTS, gradients(torch.bfloat16)), (OTHERS, others(torch.bfloat16))):
            with torch.no_grad():
                samples = time_interleaved(calls, budget.rounds, budget.calls)
            own = bench_launch.rows_of("bf16", situation, samples)
            rows += own
            findings += [f for row in own for f in bench_launch.findings_of(row, samples)]
    title = f"What a call by cubins for {H100} costs, a layer of {bench_launch.SIDE} x {bench_launch.SIDE}, M = 1"
    report("cubin_launch", title, findings, printed=False, calls=rows)
    print("\n\n".join(launch_tables({"calls": rows})))


def gradients(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return what a layer's backward pass calls: d_x alone, both gradients, and the sums into a held mask's buffer."""
    side = bench_launch.SIDE
    x, grad, weight = (torch.randn(*shape, dtype=dtype) for shape in ((1, side), (1, side), (side, side)))
    packed, signs = (torch.full((side, side // 32), -1, dtype=torch.int32) for _ in range(2))
    buffer = torch.zeros(side, side, dtype=dtype)

    def of_packed(*wanted: bool) -> Callable[[], object]:
        given = (grad, x, weight, packed, None, signs, "magnitude", list(wanted), "auto")
        return lambda: GRADIENTS_OF_PACKED(*given)

    return {
        "d_x": of_packed(True, False, False, False),
        "d_x and d_scores": of_packed(True, False, True, False),
        "accumulate_score_grad, no weight": lambda: accumulate_score_grad(buffer, grad, x, None),
    }


def others(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the other ops: 8 rows of 3 masks, NF4 and its d_x, selection, and an optimiser step of a held mask."""
    side = bench_launch.SIDE
    x, grad, weight = (torch.zeros(*shape, dtype=dtype) for shape in ((8, side), (8, side), (side, side)))
    masks = [torch.full((side, side // 32), -1, dtype=torch.int32) for _ in range(3)]
    tasks = torch.arange(8) % 3
    codes, absmax = torch.zeros(side * side // 2, dtype=torch.uint8), [torch.ones(side * side // 64)]
    scores, threshold = torch.zeros(side, side, dtype=torch.int16), torch.zeros((), dtype=torch.int16)
    moments = [torch.zeros(side, side, dtype=torch.uint8) for _ in range(2)]
    stepped = scores, grad.new_zeros(side, side), weight, *moments, torch.ones(2, side * side // BLOCK)
    floats = scores.view(torch.float16)
    select_by = backends.choose("select", floats.device, (floats.dtype,))
    return {
        "masked_linear_many": lambda: masked_linear_many(x, weight, masks, tasks),
        "NF4": lambda: masked_linear_quantized(x, codes, absmax, masks[0], shape=(side, side)),
        "NF4, d_x": lambda: masked_linear_quantized_d_x(grad, codes, absmax, masks[0], shape=(side, side)),
        # Bypasses the op, which on a CPU checks if its values are finite; here nothing has written them.
        "kept_threshold": lambda: select_by(floats, 0.9, "magnitude"),
        "pack_mask": lambda: pack_mask(scores, threshold),
        "score_step": lambda: score_step(*stepped, step=7, lr=1e-3, keep_ratio=0.9, threshold=threshold),
    }


@contextlib.contextmanager
def _by_cubins() -> Iterator[None]:
    """Treat CPU tensors as an H100's within the context, on a driver that records nothing."""
    archives = cubins.FOLDER
    if not (archives / f"{H100}.zip").exists():
        sys.exit(f"there must be cubins for {H100} in {archives}; make cubins")
    sys.path[:0] = [str(ROOT / "tests/cubins")]  # the driver stub is in the tests
    import on_stub

    with tempfile.TemporaryDirectory() as folder:
        on_stub.build(Path(folder))
        stub = on_stub.Stub(Path(folder), archives)
        stub.set_recording(False)
        by_name, automatic = triton_functions()
        served = backends.Backend(
            name="triton",
            device_types=frozenset({"cpu"}),
            dtypes=frozenset(),
            functions=by_name,
            takes=backends.OPERANDS,
            automatic=automatic,
            short={"masked_linear_packed": built.cuda_ops.try_masked_linear_packed.default},
        )
        with mock.patch.dict(backends._TABLE, triton=served), on_stub.taken_for(H100):
            _forget_choices()
            yield
        _forget_choices()
        if not stub.modules_loaded():
            sys.exit("no cubin was launched, so these are another kernel's times")


def _forget_choices() -> None:
    backends._chosen.clear()
    backends.short_ways.clear()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cubin_launch", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, into build/benchmarks")
    if parser.parse_args().quick:
        write_results_to(ROOT / "build" / "benchmarks")
        main(bench_launch.QUICK)
    else:
        main()
