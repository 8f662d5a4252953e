"""Each type's zero: gguf decodes it to 0, and the bits of all other weights are unchanged."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from gguf_models import quantized

from mft.patching.block_codes import CODES, code_of

ROWS, WIDTH = 8, 1536


def decoded(data, kind):
    return quants.dequantize(data.reshape(ROWS, -1), Kind[kind]).reshape(-1)


def stored(kind, seed=0):
    """Return a tensor's bytes, and every fifth of its elements."""
    chance = np.random.default_rng(seed)
    values = chance.standard_normal((ROWS, WIDTH)).astype(np.float32)
    return quantized(values, kind).reshape(-1).view(np.uint8).copy(), np.flatnonzero(chance.random(values.size) < 0.2)


@pytest.mark.parametrize("kind", CODES)
def test_dropped_weights_decode_to_0_and_others_keep_their_bits(kind):
    data, elements = stored(kind)
    before, cleared = decoded(data, kind), CODES[kind].clear(data, elements)
    after = decoded(cleared, kind)
    kept = np.ones(before.size, bool)
    kept[elements] = False
    assert np.count_nonzero(before[elements]) > 0.1 * len(elements)
    assert not after[elements].any()
    assert np.array_equal(after[kept].view(np.uint32), before[kept].view(np.uint32))


@pytest.mark.parametrize("kind", CODES)
def test_clearing_twice_changes_nothing_more_and_the_given_bytes_stay(kind):
    data, elements = stored(kind)
    given = data.copy()
    once = CODES[kind].clear(data, elements)
    assert np.array_equal(data, given)
    assert np.array_equal(CODES[kind].clear(once, elements), once)


@pytest.mark.parametrize("kind", CODES)
def test_a_block_is_as_large_as_ggml_says(kind):
    assert gguf.GGML_QUANT_SIZES[Kind[kind]] == (CODES[kind].values, CODES[kind].size)


@pytest.mark.parametrize("kind", [kind for kind, code in CODES.items() if code.scale is not None])
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_no_number_is_refused_where_a_weight_is_dropped(kind, scale):
    data, _ = stored(kind)
    code = CODES[kind]
    start = code.size + code.scale  # of the second block
    data[start : start + 2] = np.array([scale], np.float16).view(np.uint8)
    with pytest.raises(ValueError, match="block 1 that is infinite or NaN"):
        code.clear(data, np.array([0, code.values]))
    code.clear(data, np.array([0, 2 * code.values]))


def test_an_exponent_of_mxfp4_that_is_nan_is_refused():
    data, _ = stored("MXFP4")
    data[0] = 255
    with pytest.raises(ValueError, match="block 0 that is infinite or NaN"):
        CODES["MXFP4"].clear(data, np.array([3]))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_number_that_is_nan_becomes_0(kind):
    data, _ = stored(kind)
    data[:] = 255
    assert decoded(CODES[kind].clear(data, np.array([0])), kind)[0] == 0


@pytest.mark.parametrize(
    "kind", ["Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS", "IQ2_XS", "IQ1_S", "Q8_1"]
)
def test_a_type_without_a_zero_has_no_code(kind):
    assert code_of(Kind[kind]) is None
