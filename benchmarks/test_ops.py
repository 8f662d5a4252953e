"""The competitors of `ops` under pytest-benchmark: pytest benchmarks/test_ops.py --benchmark-only

Two shapes and three M. A group holds one comparison, and -k chooses: -k 'forward and 4096x4096-64'. The tool's options
work as usual, such as --benchmark-compare and --benchmark-columns=min,max,median.
"""

import pytest
import torch

from .harness import THREADS
from .layer_competitors import DENSE, EAGER, LORA, OURS, LayerCompetitors, inputs_of
from .matrix_competitors import (
    BYTES,
    COPY,
    FOREACH,
    FUSED,
    OURS_FP32,
    OURS_INT16,
    optimiser_calls,
    packing_calls,
    threshold_calls,
)
from .matrix_competitors import OURS as OURS_ON_MATRIX
from .side_by_side import SideBySide

SHAPES = ((576, 1536), (4096, 4096))
MATRIX_OPS = {
    "threshold": (lambda n, k: threshold_calls(n, k, slow=False), (COPY, OURS_ON_MATRIX)),
    "packing": (packing_calls, (COPY, OURS_ON_MATRIX, EAGER, BYTES)),
    "optimiser": (optimiser_calls, (FUSED, FOREACH, OURS_INT16, OURS_FP32, EAGER)),
}
BACKENDS = SideBySide.here()
BUDGET = {"max_time": 0.3, "min_rounds": 3, "warmup": True, "warmup_iterations": 1}


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def layer(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield LayerCompetitors(*request.param)
    torch.set_num_threads(threads)


@pytest.mark.benchmark(**BUDGET)
@pytest.mark.parametrize("name", BACKENDS.competitors([DENSE, *OURS, EAGER, LORA]))
@pytest.mark.parametrize("op", ["forward", "d_x", "d_scores"])
@pytest.mark.parametrize("tokens", [1, 64, 512])
def test_layer(benchmark, layer, tokens, op, name):
    benchmark.group = f"{op}, {layer.n} x {layer.k}, M = {tokens}"
    call = layer.call(name, op, inputs_of(tokens, layer.n, layer.k))
    with BACKENDS.around(name):
        benchmark(call)


@pytest.mark.benchmark(**BUDGET)
@pytest.mark.parametrize(
    ("op", "name"),
    [(op, name) for op, (_, names) in MATRIX_OPS.items() for name in BACKENDS.competitors(names)],
)
def test_matrix(benchmark, layer, op, name):
    benchmark.group = f"{op}, {layer.n} x {layer.k}"
    make, _ = MATRIX_OPS[op]
    with BACKENDS.around(OURS_ON_MATRIX):
        call = make(layer.n, layer.k)[BACKENDS.as_ours(name)]
    with BACKENDS.around(name):
        benchmark(call)
