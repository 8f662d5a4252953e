"""Tests specific to the triton backend's products over codes: parts of the sum, and which layers they serve.

tests/ops/test_quantized.py tests the results, which are the same for every backend.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from by_name import ByName, oracle
from coded_weights import PLAIN_KINDS, coded

from mft_kernels.backends import table as backends
from mft_kernels.backends.triton import ops
from mft_kernels.backends.triton import quantized as kernels
from mft_kernels.backends.triton.launch import record
from mft_kernels.codes import FORMATS, Nf4
from mft_kernels.ops.quantized import QuantizedMatrix

flat = ByName(ops)


def test_a_sum_in_parts_counts_every_element_and_the_bias_once(device, target, monkeypatch):
    plan = kernels.quantized_tiles
    monkeypatch.setattr(kernels, "quantized_tiles", lambda *sizes: replace(plan(*sizes), splits=3))
    for kind in PLAIN_KINDS:
        n, k = 24, 704 if FORMATS[kind].block else 689  # whole blocks, and odd rows
        codes, absmax, *rest = coded(n, k, kind, integers=True).to(device)
        x, bias = (torch.randint(-1, 2, size).to(device, torch.float16) for size in ((3, k), (n,)))
        arguments = x, codes, absmax, None, bias, *rest
        with record() as launches:
            flat.masked_linear_quantized(*arguments)
        assert [one.kernel.__name__ for one in launches] == ["_quantized_product_kernel", "_sum_splits_kernel"]
        y = flat.masked_linear_quantized(*arguments)
        assert torch.equal(y, oracle.masked_linear_quantized(*arguments))


@pytest.mark.parametrize(
    ("takes", "dtype", "asked", "fused"),
    [
        (True, torch.bfloat16, "auto", True),
        (True, torch.float32, "auto", False),  # differs from the weight's dtype
        (False, torch.bfloat16, "auto", False),
        (True, torch.bfloat16, "cuda", False),  # the cuda backend takes dense weights
    ],
)
def test_on_a_gpu_layers_decode_in_the_kernel_where_triton_takes_codes(monkeypatch, takes, dtype, asked, fused):
    class OnGpu(QuantizedMatrix):
        dtype = torch.bfloat16

        def coded(self):
            return Nf4(SimpleNamespace(device=torch.device("cuda")), [], (6, 64))

    about = {"takes": backends.OPERANDS} if takes else {}
    backend = backends.Backend("triton", frozenset({"cuda"}), frozenset({torch.bfloat16, torch.float32}), {}, **about)
    monkeypatch.setitem(backends._TABLE, "triton", backend)
    monkeypatch.setenv("MFT_KERNELS", asked)
    assert OnGpu().is_fused(torch.empty(1, dtype=dtype)) == fused
