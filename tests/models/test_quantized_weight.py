"""Weights in few bits: each goes to its nearest level, with the error and the bytes of its format."""

import copy

import pytest
import torch
from by_name import ByName, oracle
from tiny import frozen_linear, normal
from torch import nn

from mft import quantizers
from mft.config import QUANTIZATIONS
from mft.masks.quantize import QuantizedLinear
from mft.models.codes.weight import QuantizedWeight
from mft.quantizers import QUANTIZERS
from mft_kernels import codes as formats
from mft_kernels.backends import cpu

flat = ByName(cpu)

# The levels in appendix E of QLoRA (arXiv 2305.14314).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634]
NF4 += [0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
SHAPES = [(64, 128), (33, 77), (3, 5), (1, 1), (130, 96), (257, 63)]


def absmax_of_each(weight, kind):
    """Return the absmax of each weight, (N, K)."""
    if kind == "int8":
        return weight.abs().amax(1, keepdim=True).expand_as(weight)
    blocks = [block.abs().max().expand(len(block)) for block in weight.flatten().split(64)]
    return torch.cat(blocks).view_as(weight)


def levels(kind):
    return torch.arange(-127, 128) / 127 if kind == "int8" else torch.tensor(NF4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "int8"])  # double quantisation changes the levels themselves
def test_every_weight_goes_to_the_nearest_level(kind, shape, dtype):
    weight = normal(*shape, dtype=dtype)
    dense = QuantizedWeight.quantize(weight, kind).dense()
    assert (dense.shape, dense.dtype, dense.is_contiguous()) == (weight.shape, dtype, True)
    absmax = absmax_of_each(weight, kind).float()
    distances = (weight.float()[..., None] - absmax[..., None] * levels(kind)).abs()
    # The result is rounded to dtype, and the level is chosen in fp32: half an ulp of each.
    slack = absmax * (torch.finfo(dtype).eps + 1e-6)
    assert ((weight.float() - dense.float()).abs() <= distances.amin(-1) + slack).all()


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_memory_for_codes_has_the_shapes_and_dtypes_that_they_have(kind):
    for shape in SHAPES:
        made = QuantizedWeight.quantize(normal(*shape), kind).tensors()
        empty = QuantizedWeight.empty(shape, torch.float32, kind).tensors()
        assert {n: (t.shape, t.dtype) for n, t in empty.items()} == {n: (t.shape, t.dtype) for n, t in made.items()}


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_the_bytes_that_an_estimate_counts_are_those_of_the_tensors(kind):
    held = QuantizedWeight.empty((2048, 4096), torch.bfloat16, kind, "meta").nbytes
    assert QUANTIZERS[kind].bytes(2048, 4096) == pytest.approx(held, rel=3e-4)  # except the map of nf4-dq


@pytest.mark.parametrize("shape", [(257, 63), (400, 64), (70, 5)])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_chunks_and_strides_change_no_code(kind, shape, monkeypatch):
    weight = normal(*shape)
    whole = QuantizedWeight.quantize(weight, kind)
    dense = whole.dense()
    monkeypatch.setattr(quantizers, "_AT_ONCE", 4096)
    monkeypatch.setattr(formats, "_DECODED_AT_ONCE", 100)
    for same in (weight, weight.t().contiguous().t()):
        chunked = QuantizedWeight.quantize(same, kind)
        for name, tensor in whole.tensors().items():
            assert torch.equal(chunked.tensors()[name], tensor), name
        assert torch.equal(chunked.dense(), dense)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_zeros_stay_zeros_and_denormals_finite(kind):
    weight = normal(130, 64)
    weight[:128] = 0
    weight[1, 0] = 1e-42
    dense = QuantizedWeight.quantize(weight, kind).dense()
    assert not dense[0].any()
    assert not dense[2:128].any()
    assert dense[1].abs().max() < 1e-37
    assert dense[128:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_weights_that_are_not_finite_are_refused(kind, value):
    linear = frozen_linear()
    linear.weight[3, 5] = value
    with pytest.raises(ValueError, match="weight must be finite to be quantised, got NaN or infinite values"):
        QuantizedLinear.from_linear(linear, kind)


def test_wrong_weights_and_kinds_are_refused():
    with pytest.raises(ValueError, match=r"weight must be a matrix \(N, K\) that is not empty, got \(3,\)"):
        QuantizedWeight.quantize(torch.ones(3))
    with pytest.raises(ValueError, match="weight must be fp32, fp16 or bf16 to be quantised, got torch.float64"):
        QuantizedWeight.quantize(torch.ones(2, 2).double())
    with pytest.raises(ValueError, match="kind must be one of nf4, nf4-dq, int8, got 'fp4'"):
        QuantizedWeight.quantize(torch.ones(2, 2), "fp4")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_nf4_is_stored_and_decoded_as_bitsandbytes_does_it_to_the_last_bit(kind, shape, monkeypatch):
    functional = quantizers._bitsandbytes()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = (normal(*shape, seed=1) * 10 ** normal(shape[0], 1, seed=2)).to(dtype)
        ours = QuantizedWeight.quantize(weight, kind)
        codes, state = functional.quantize_4bit(
            weight, quant_type="nf4", blocksize=64, compress_statistics=kind == "nf4-dq"
        )
        stored = {"absmax": state.absmax}
        if kind == "nf4-dq":
            stored |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code}
            stored["nested_offset"] = state.offset
        for name, tensor in ({"codes": codes} | stored).items():
            assert torch.equal(ours.tensors()[name], tensor), name
        # Decode it as a single row of even length: bitsandbytes' CPU kernel takes the wrong absmax if rows end within a
        # block.
        state.shape = torch.Size((1, 2 * codes.numel()))
        expected = functional.dequantize_4bit(codes, state).view(-1)[: weight.numel()].view(shape)
        arguments = ours.codes, ours.coded().scales, list(shape), kind, dtype
        assert torch.equal(oracle.dequantize(*arguments), expected)
        assert torch.equal(ours.dense(), expected)
        for capability in cpu.capabilities():
            monkeypatch.setenv("MFT_CPU_CAPABILITY", capability)
            assert torch.equal(flat.dequantize(*arguments), expected), capability


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_casting_a_model_changes_the_dense_dtype_and_no_code(kind):
    quantized = QuantizedWeight.quantize(normal(16, 64), kind)
    dense, before = quantized.dense(), copy.deepcopy(quantized.tensors())
    nn.Sequential(quantized).to(torch.bfloat16)
    for name, tensor in quantized.tensors().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    assert torch.equal(quantized.dense(), dense.bfloat16())
    assert quantized.to("meta").codes.is_meta
    assert quantized.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 64), (5, 7), (4, 130)], ids=str)
@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_dropped_weights_get_the_level_0_and_come_back(kind, shape):
    generator = torch.Generator().manual_seed(0)
    weight = QuantizedWeight.quantize(torch.randn(shape, generator=generator), kind)
    keep = torch.rand(shape, generator=generator) > 0.3
    dense, codes = weight.dense(), weight.codes.clone()
    weight.codes, taken = weight.coded().dropped(keep)
    assert torch.equal(weight.dense(), torch.where(keep, dense, 0))
    assert len(taken) == int((~keep).sum())
    assert torch.equal(weight.coded().put_back(keep, taken), codes)
