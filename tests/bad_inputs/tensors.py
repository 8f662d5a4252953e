"""Inputs of the ops, `MaskedLinear` and `MaskAdamW`. x (2, 5), grad (2, 4), weight and scores (4, 5) and bias (4,) are
ones, threshold is 0.5, packed keeps every weight. `having(tensor, place, value)` is a copy with another value at a
place, `learning(tensor)` a copy that requires grad, `attend(...)` self-attention on two tokens.
"""

import warnings

import torch
from by_name import oracle
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from mft_kernels import (
    MaskAdamW,
    MaskedLinear,
    MaskedMultiheadAttention,
    accumulate_score_grad,
    dequantize,
    fixed_from_float,
    float_from_fixed,
    kept_threshold,
    masked_linear,
    masked_linear_by_ratio,
    masked_linear_many,
    masked_linear_packed,
    masked_linear_quantized,
    pack_mask,
    score_step,
    unpack_mask,
)
from mft_kernels.ops.checks import NonFiniteScores
from mft_kernels.testing import integer_inputs

x, grad, bias = torch.ones(2, 5), torch.ones(2, 4), torch.ones(4)
weight, scores = torch.ones(4, 5), torch.ones(4, 5)
threshold = torch.tensor(0.5)
packed = pack_mask(scores, threshold)


def learning(tensor):
    return tensor.clone().requires_grad_()


def having(tensor, place, value):
    """Return a copy with another value at that place."""
    copy = tensor.clone()
    copy[place] = value
    return copy


def attend(**masks):
    """Run self-attention on two tokens."""
    tokens = torch.ones(2, 1, 8)
    return MaskedMultiheadAttention(8, 2)(tokens, tokens, tokens, **masks)


def equal(one, other):
    """Assert equality of every bit, except the sign of zero and the bits of NaN."""
    assert torch.equal(one.nan_to_num(12345), other.nan_to_num(12345)), (one, other)


class Tagged(torch.Tensor):
    """A subclass without any changes."""


TABLE = r"""
# shapes
x of another number of features
    masked_linear(torch.ones(2, 6), weight, scores, threshold)
    -> ValueError: x | must end in in_features = 5 of weight (4, 5) | (2, 6)
x of no dimension
    masked_linear(torch.tensor(1.0), weight, scores, threshold)
    -> ValueError: x | must end in in_features = 5 of weight (4, 5) | ()
a weight that is a vector
    masked_linear(x, torch.ones(5), scores, threshold)
    -> ValueError: weight | must be (N, K) | shape (5,)
scores of another shape than the weight
    masked_linear(x, weight, torch.ones(4, 4), threshold)
    -> ValueError: scores | must match weight (4, 5) | (4, 4)
a threshold for each column
    masked_linear(x, weight, scores, torch.ones(5))
    -> ValueError: threshold | must be () or one per row (4,) | (5,) | see kept_threshold
a bias of another size
    masked_linear(x, weight, scores, threshold, torch.ones(5))
    -> ValueError: bias | must be (4,) | (5,)
a packed mask of another weight
    masked_linear_packed(x, weight, torch.zeros(4, 3, dtype=torch.int32))
    -> ValueError: packed | must be (4, 1), 1 bit per weight of (4, 5) | (4, 3)
codes of nf4 one a byte
    masked_linear_quantized(x, torch.zeros(20, dtype=torch.uint8), torch.ones(1), packed, shape=(4, 5))
    -> ValueError: codes | must be 10 bytes for nf4 of (4, 5) | (20,)
scores of four dimensions to pack
    pack_mask(torch.ones(2, 2, 4, 5), threshold)
    -> ValueError: scores | must be (N, K), or (E, N, K) for experts | shape (2, 2, 4, 5)
a shape of one size to unpack
    unpack_mask(packed, (20,))
    -> ValueError: shape | must be (N, K), or (E, N, K) for experts | (20,)
a gradient of other tokens
    accumulate_score_grad(torch.zeros(4, 5), torch.ones(3, 4), x, weight, scores=scores)
    -> ValueError: grad_output | must be (2, 4) | (3, 4)
a gradient buffer of another shape
    MaskedLinear(5, 4).hold(packed, torch.zeros(5, 4))
    -> ValueError: grad_buffer | must be contiguous (4, 5) | (5, 4)
a size in place of a shape to unpack
    unpack_mask(packed, 20)
    -> TypeError: shape | must be (N, K), or (E, N, K) for experts, in integers | 20
a size in place of the shape of codes
    dequantize(torch.zeros(10, dtype=torch.uint8), torch.ones(1), shape=20)
    -> TypeError: shape | must be (N, K), in integers | 20
a held mask of another layer
    MaskedLinear(5, 4).hold(torch.zeros(4, 2, dtype=torch.int32))
    -> ValueError: packed | must be (4, 1), 1 bit per weight of (4, 5) | (4, 2)

# dtypes
x of integers
    masked_linear(torch.ones(2, 5, dtype=torch.int64), weight, scores, threshold)
    -> TypeError: x | must be float32, bfloat16, float16 or float64 | torch.int64
x of another dtype than the weight
    masked_linear(x.half(), weight, scores, threshold)
    -> TypeError: x | must have weight's dtype torch.float32 | torch.float16 | convert x or use torch.autocast
an 8 bit weight under autocast
    with torch.autocast("cpu", torch.bfloat16):
        masked_linear(x, weight.to(torch.int8), scores, threshold)
    -> TypeError: weight | must be float32, bfloat16, float16 or float64 | torch.int8
scores of integers
    masked_linear(x, weight, scores.int(), threshold)
    -> TypeError: scores | must be float32, bfloat16, float16 or float64 | torch.int32
a bias of another dtype
    masked_linear(x, weight, scores, threshold, bias.bfloat16())
    -> TypeError: bias | must have x's dtype torch.float32 | torch.bfloat16
the codes of a doubly quantised absmax alone
    codes, absmax = torch.zeros(10, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    masked_linear_quantized(x, codes, absmax, packed, shape=(4, 5))
    -> TypeError: absmax | must be torch.float32 | torch.uint8 | give all 4 scales of nf4-dq
a mask of ones where bits are due
    masked_linear_packed(x, weight, torch.ones(4, 5))
    -> TypeError: packed | must be int32 | torch.float32
a float threshold for fixed point scores
    pack_mask(scores.to(torch.int16), threshold)
    -> TypeError: threshold | must be an int16 code as the scores are | torch.float32
        | see kept_threshold and fixed_from_float
a gradient of another dtype
    accumulate_score_grad(torch.zeros(4, 5), grad.bfloat16(), x, weight, scores=scores)
    -> TypeError: grad_output | must have x's dtype torch.float32 | torch.bfloat16 | convert one of them
a layer with scores of 8 bits
    MaskedLinear(5, 4, scores_dtype=torch.int8)
    -> TypeError: scores_dtype | must be float32, bfloat16, float16, float64 or int16 | torch.int8
half precision scores to optimise
    MaskAdamW([nn.Parameter(scores.half())])
    -> TypeError: params | must be float32, bfloat16 (rounded stochastically) or int16 | torch.float16
a dtype by its name
    dequantize(torch.zeros(10, dtype=torch.uint8), torch.ones(1), shape=(4, 5), dtype="float32")
    -> TypeError: dtype | must be a floating torch.dtype | 'float32'
codes of fixed point that are floats
    float_from_fixed(scores)
    -> TypeError: codes | must be int16 | torch.float32
moments in 8 bits without scales
    codes = torch.zeros(4, 5, dtype=torch.uint8)
    score_step(scores.clone(), weight, None, codes, codes.clone(), step=1, lr=1e-3)
    -> TypeError: exp_avg | must be torch.float32 without scales | torch.uint8

# devices, strides, kinds
x on another device
    masked_linear(x.to("meta"), weight, scores, threshold)
    -> ValueError: x | must be on weight's device cpu | meta
signs on another device
    accumulate_score_grad(torch.zeros(4, 5), grad, x, weight, signs=packed.to("meta"))
    -> ValueError: signs | must be on weight's device cpu | meta
a transposed sum of gradients
    accumulate_score_grad(torch.zeros(5, 4).T, grad, x, None)
    -> ValueError: out | must be contiguous and (N, K) | strides (1, 4)
a step on transposed scores
    score_step(torch.ones(5, 4).T, weight, None, weight.clone(), weight.clone(), step=1, lr=1e-3)
    -> ValueError: scores | must be (N, K) and contiguous | strides (1, 4)
transposed scores to optimise
    MaskAdamW([torch.ones(5, 4).T])
    -> ValueError: params | must be contiguous | strides (1, 4) | use p.contiguous()
x as a list
    masked_linear([[1.0] * 5], weight, scores, threshold)
    -> TypeError: x | must be a tensor | list | use torch.as_tensor(x)
a bias as a list
    masked_linear(x, weight, scores, threshold)  # afterwards there is a short way, which C++ checks
    masked_linear(x, weight, scores, threshold, [0.0] * 4)
    -> TypeError: bias | must be a tensor | list | use torch.as_tensor(bias)
a mode as a number
    masked_linear(x, weight, scores, threshold)
    masked_linear(x, weight, scores, threshold, mode=0)
    -> ValueError: mode | must be one of ('magnitude', 'value') | 0
no scores for a keep ratio
    masked_linear_by_ratio(x, weight, None, keep_ratio=0.9)
    -> TypeError: scores | must be a tensor | NoneType
no masks for many tasks
    masked_linear_many(x, weight, None, torch.tensor([-1, -1]))
    -> TypeError: masks | must be a sequence of tensors | NoneType
a scale as a number
    dequantize(torch.zeros(10, dtype=torch.uint8), 1.0, shape=(4, 5))
    -> TypeError: absmax | must be a tensor, or a list of all scales | float
a gradient buffer as a list
    MaskedLinear(5, 4).hold(packed, [[0.0] * 5] * 4)
    -> TypeError: grad_buffer | must be a tensor | list
a step without a gradient
    score_step(scores.clone(), None, None, weight.clone(), weight.clone(), step=1, lr=1e-3)
    -> TypeError: grad | must be a tensor | NoneType
scores as a list to convert
    fixed_from_float([0.1])
    -> TypeError: scores | must be a tensor | list
a threshold as a number
    masked_linear(x, weight, scores, 0.5)
    -> TypeError: threshold | must be a tensor | float | use torch.as_tensor(threshold)
a sparse weight
    masked_linear(x, weight.to_sparse(), scores, threshold)
    -> TypeError: weight | must be dense (torch.strided) | torch.sparse_coo | use weight.to_dense()
a sparse gradient of scores
    p = nn.Parameter(scores.clone())
    p.grad = scores.to_sparse()
    MaskAdamW([p]).step()
    -> TypeError: grad | must be dense | a sparse tensor
a convolution to mask
    MaskedLinear.from_linear(nn.Conv1d(5, 4, 1))
    -> TypeError: linear | must be an nn.Linear | Conv1d
a linear with a hook to mask by hand
    linear = nn.Linear(5, 4)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    MaskedLinear.from_linear(linear)
    -> ValueError: linear cannot be masked | which a masked layer would lose | has hooks
        | mask it first, and add them afterwards
a linear whose bias is parametrised
    linear = nn.Linear(5, 4)
    nn.utils.parametrize.register_parametrization(linear, "bias", nn.Tanh())
    MaskedLinear.from_linear(linear)
    -> ValueError: linear cannot be masked | its bias must be a parameter or None
        | one that is computed from others (by a parametrisation or pruning) | make that permanent first
a masked layer where the weight is read past it
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = MaskedLinear(8, 8)
    -> ValueError: out_proj of MultiheadAttention
        | must not be a MaskedLinear: nn.MultiheadAttention computes with out_proj.weight itself | MaskedLinear
        | MaskedMultiheadAttention.from_attention(attention) makes one that calls it
a linear subclass with a forward of its own
    held = {"scale": 2.0, "forward": lambda self, x: self.scale * nn.Linear.forward(self, x)}
    Scaled = type("Scaled", (nn.Linear,), held)
    MaskedLinear.from_linear(Scaled(5, 4))
    -> ValueError: linear cannot be masked | a plain nn.Linear | it has its own forward
        | If it computes what nn.Linear does and no more, set Scaled.computes_linear = True
a layer around the attention to mask
    MaskedMultiheadAttention.from_attention(nn.TransformerEncoderLayer(8, 2, 8))
    -> TypeError: attention | must be an nn.MultiheadAttention | TransformerEncoderLayer
an attention with a forward of its own
    forward = nn.MultiheadAttention.forward
    held = {"forward": lambda self, q, k, v: forward(self, q.roll(1, -1), k.roll(1, -1), v)}
    Rotary = type("Rotary", (nn.MultiheadAttention,), held)
    MaskedMultiheadAttention.from_attention(Rotary(8, 2))
    -> ValueError: attention cannot be masked | a plain nn.MultiheadAttention | it has its own forward
a masked projection to pack
    attention = MaskedMultiheadAttention(8, 2)
    attention.in_proj = MaskedLinear(8, 24)
    attention.to_attention()
    -> ValueError: in_proj | must be an nn.Linear | MaskedLinear | merge() it first
an attention mask of another shape
    attend(attn_mask=torch.zeros(3, 2))
    -> ValueError: attn_mask | must be (2, 2) | (3, 2)
a padding mask with the tokens first
    attend(key_padding_mask=torch.zeros(2, 1))
    -> ValueError: key_padding_mask | must be (1, 2) | (2, 1)
a causal hint without a mask
    attend(is_causal=True)
    -> ValueError: attn_mask | must be given with is_causal | None

# values
a keep ratio in percent
    MaskedLinear(5, 4, keep_ratio=90)
    -> ValueError: keep_ratio | must lie in [0, 1] | 90
a keep ratio as text
    kept_threshold(scores, "0.9")
    -> TypeError: keep_ratio | must be a number | str | use float(keep_ratio)
a fixed threshold of nan
    MaskedLinear(5, 4, threshold=float("nan"))
    -> ValueError: threshold | must be a number or None | nan | use keep_ratio=0 for that
nan and inf among the scores
    kept_threshold(torch.tensor([[torch.nan, 1], [torch.inf, 0]]), 0.9)
    -> NonFiniteScores: scores | must be finite | 2 NaN or Inf among (2, 2)
        | lower the learning rate, or look for NaN or Inf in the weight, and in the gradients of the step before
a nan gradient that an optimiser took
    layer = MaskedLinear(5, 4)
    layer.module_name = "model.layers.3.mlp.up_proj"
    layer.scores.grad = having(torch.zeros(4, 5), (1, 2), torch.nan)
    torch.optim.SGD([layer.scores]).step()
    layer(x)
    -> NonFiniteScores: scores of module 'model.layers.3.mlp.up_proj' | must be finite | 1 NaN or Inf among (4, 5)
        | lower the learning rate
nan scores under vmap
    with warnings.catch_warnings(action="ignore"):  # torch says that it loops
        torch.vmap(lambda s: kept_threshold(s, 0.9))(having(torch.ones(3, 4, 5), (1, 2, 3), torch.nan))
    -> NonFiniteScores: scores | must be finite | 1 NaN or Inf among (4, 5) | lower the learning rate
an unknown mode
    masked_linear(x, weight, scores, threshold, mode="top")
    -> ValueError: mode | must be one of ('magnitude', 'value') | 'top'
an unknown initialisation
    MaskedLinear(5, 4, init="zeros")
    -> ValueError: init | must be one of ('normal', 'magnitude', 'constant') | 'zeros'
a sign from nowhere
    accumulate_score_grad(torch.zeros(4, 5), grad, x, weight)
    -> ValueError: mode "magnitude" | needs scores or signs | neither
scores without their weight
    accumulate_score_grad(torch.zeros(4, 5), grad, x, None, scores=scores)
    -> ValueError: scores | must be None if weight is None | a tensor
a learning rate as a tensor
    MaskAdamW([nn.Parameter(scores)], lr=torch.tensor(1e-3))
    -> TypeError: lr | must be a number | Tensor | use float(lr)
a single decay rate
    MaskAdamW([nn.Parameter(scores)], betas=0.9)
    -> TypeError: betas | must be a pair | 0.9
a decay rate of one
    MaskAdamW([nn.Parameter(scores)], betas=(0.9, 1.0))
    -> ValueError: betas[1] | must lie in [0, 1) | 1.0
moments in an unknown format
    MaskAdamW([nn.Parameter(scores)], moments="4bit")
    -> ValueError: moments | must be one of ('8bit', 'fp32') | '4bit'
a step number of zero
    score_step(scores.clone(), weight, None, weight.clone(), weight.clone(), step=0, lr=1e-3)
    -> ValueError: step | must be an integer from 1 | 0
a step of a stranger
    MaskAdamW([nn.Parameter(scores)]).step_one(scores, weight)
    -> ValueError: p | must be one of the optimiser's parameters | another tensor of shape (4, 5)

# autograd
scores changed between forward and backward
    own = learning(scores)
    y = masked_linear(x, weight, own, threshold)
    with torch.no_grad():
        own.add_(1)
    y.sum().backward()
    -> RuntimeError: scores | must stay as they are until the backward pass | [torch.FloatTensor [4, 5]]
        | call backward() before optimizer.step() and the like, or change a clone()
an input changed in place after a masked layer
    layer, own = MaskedLinear(5, 4), x.clone()
    y = layer(own)
    own.relu_()
    y.sum().backward()
    -> RuntimeError: x | must stay as they are until the backward pass | [torch.FloatTensor [2, 5]] | change a clone()
a held mask changed between forward and backward
    layer, own = MaskedLinear(5, 4), packed.clone()
    layer.hold(own, torch.zeros(4, 5))
    y = layer(x)
    own.zero_()
    y.sum().backward()
    -> RuntimeError: packed | must stay as it is until the backward pass | (4, 1) modified by an inplace operation
        | call backward() before packed changes
a second derivative
    own = learning(x)
    y = masked_linear(own, weight, scores, threshold).square().sum()
    (d_x,) = torch.autograd.grad(y, own, create_graph=True)
    d_x.sum().backward()
    -> NotImplementedError: mft::masked_linear_backward | has no second derivative | create_graph=True
        | leave out create_graph=True, or detach() its gradients
a derivative in forward mode
    torch.func.jvp(lambda v: masked_linear(v, weight, scores, threshold), (x,), (x,))
    -> RuntimeError: masked_linear | must be differentiated by backward() or torch.autograd.grad
        | torch.func or forward mode | call backward(), once per sample if each needs its own gradient
vmap over sums in place
    torch.vmap(lambda g: accumulate_score_grad(torch.zeros(4, 5), g, x, None))(torch.ones(3, 2, 4))
    -> RuntimeError: accumulate_score_grad | must not be called under torch.vmap | a batched tensor
        | call it for one matrix after the other

# accepted
ties at the threshold
    tied = torch.tensor([[0.5, -0.5, 0.25, 0.5], [0.5, 0.0, -0.25, 0.25]])
    found = kept_threshold(tied, 0.25)
    assert found == 0.5
    assert unpack_mask(pack_mask(tied, found), (2, 4)).sum() == 4
    -> accepted: all are kept, so that no order of elements decides: 4 of 8 although keep_ratio 0.25 asks for 2
a keep ratio of 1 or 0
    for keep_ratio in (1, 0):
        mask = unpack_mask(pack_mask(scores, kept_threshold(scores, keep_ratio)), (4, 5))
        assert (mask == bool(keep_ratio)).all()
    -> accepted: all is kept, or nothing
nan and inf in dropped weights
    own, spoilt = learning(x), torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan])
    y = masked_linear(own, having(weight, 0, spoilt), having(scores, 0, 0.1), threshold)
    equal(y, torch.tensor([0.0, 5, 5, 5]).expand(2, 4))
    y.sum().backward()
    equal(own.grad, torch.full((2, 5), 3.0))
    -> accepted: an exact +0, forward and backward: weights are selected, not multiplied
nan in a kept weight
    y = masked_linear(x, having(weight, (0, 0), torch.nan), scores, threshold)
    assert y[:, 0].isnan().all()
    assert y[:, 1:].isfinite().all()
    -> accepted: NaN in the outputs that it takes part in, as with nn.Linear
nan and inf in x
    for value in (torch.nan, torch.inf):
        y = masked_linear(having(x, (0, 0), value), weight, scores, threshold)
        equal(y, torch.tensor([[value] * 4, [5.0] * 4]))
    -> accepted: NaN in its own row of the output, as with nn.Linear
nan in the gradient
    own, learned = learning(x), learning(scores)
    masked_linear(own, weight, learned, threshold).backward(having(grad, (0, 1), torch.nan))
    assert own.grad.isnan().any(1).tolist() == [True, False]
    assert learned.grad.isnan().any(1).tolist() == [False, True, False, False]
    -> accepted: NaN in that token's row of d_x and in that output's row of d_scores; after a step, the selection
        refuses it
a nan score beside a given threshold
    y = masked_linear(x, weight, having(scores, (0, 0), torch.nan), threshold)
    equal(y[0], torch.tensor([4.0, 5, 5, 5]))
    -> accepted: it is dropped, and gets no gradient
a threshold of nan
    equal(masked_linear(x, weight, scores, torch.tensor(torch.nan)), torch.zeros(2, 4))
    -> accepted: nothing is kept: what an accelerator answers for scores that are not finite, without waiting for it
no tokens
    learned = learning(scores)
    y = masked_linear(x[:0], weight, learned, threshold)
    assert y.shape == (0, 4)
    y.sum().backward()
    equal(learned.grad, torch.zeros(4, 5))
    -> accepted: an empty result, and gradients of zeros
no input features
    y = masked_linear(torch.ones(2, 0), torch.ones(4, 0), torch.ones(4, 0), threshold, bias)
    equal(y, torch.ones(2, 4))
    -> accepted: the bias alone
no scores at all
    assert kept_threshold(torch.ones(0, 5), 0.9) == torch.inf
    assert pack_mask(torch.ones(0, 5), threshold).shape == (0, 1)
    -> accepted: threshold inf, and an empty mask
a single token without a batch
    equal(masked_linear(x[0], weight, scores, threshold), torch.full((4,), 5.0))
    -> accepted: a vector of outputs, as with nn.Linear
transposed sliced and expanded tensors
    t = integer_inputs(12, 17, 45)
    two = torch.tensor(2.0)
    strided = t.x.T.contiguous().T, t.weight.repeat(2, 1)[::2][:17], t.scores.repeat(1, 2)[:, :45]
    rows = torch.arange(34)[::2][:17] % 17
    equal(masked_linear(*strided, two), masked_linear(t.x, t.weight[rows], t.scores, two))
    equal(
        masked_linear(t.x[:1].expand(12, 45), t.weight, t.scores, two),
        masked_linear(t.x[:1].repeat(12, 1), t.weight, t.scores, two),
    )
    -> accepted: the result of the contiguous copies
tensors that begin at odd addresses
    t = integer_inputs(5, 40, 50, torch.bfloat16, torch.bfloat16)
    two = torch.tensor(2.0)
    shifted = [torch.empty(v.numel() + 1, dtype=v.dtype)[1:].view_as(v).copy_(v) for v in (t.x, t.weight, t.scores)]
    assert all(v.data_ptr() % 4 == 2 for v in shifted)
    equal(masked_linear(*shifted, two), masked_linear(t.x, t.weight, t.scores, two))
    -> accepted: the result of the aligned copies
rows more than two billion elements apart
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # 4 GB of addresses, of which two pages are touched
    t = integer_inputs(2, 2, 33, torch.bfloat16, torch.bfloat16)
    for name in ("x", "weight", "scores"):
        strided = far.as_strided((2, 33), (2**31, 1)).copy_(getattr(t, name))
        arguments = {"x": t.x, "weight": t.weight, "scores": t.scores}
        two = torch.tensor(2.0)
        equal(masked_linear(**arguments | {name: strided}, threshold=two), masked_linear(**arguments, threshold=two))
    equal(kept_threshold(strided, 0.5), kept_threshold(t.scores, 0.5))
    -> accepted: the result of the close copies: offsets beyond 2^31 are 64-bit
more than two billion weights
    with torch.device("meta"):
        large = torch.empty(70_000, 40_000)
        y = masked_linear(torch.empty(3, 40_000), large, large, torch.empty(()))
        assert y.shape == (3, 70_000)
        assert pack_mask(large, torch.empty(())).shape == (70_000, 1250)
    -> accepted: the shapes of results: sizes beyond 2^31 on torch's meta device, where nothing is computed
tensors of float64
    y = masked_linear(x.double(), weight.double(), scores.double(), threshold.double())
    assert y.dtype == torch.float64
    -> accepted: the reference computes in it, unless a backend is asked for by name
a subclass of tensor
    own = x.clone().as_subclass(Tagged)
    y = masked_linear(own, weight, scores, threshold)
    assert type(y) is type(nn.functional.linear(own, weight))
    equal(y.as_subclass(torch.Tensor), masked_linear(x, weight, scores, threshold))
    -> accepted: the same result, in the subclass where torch's own operations would give it
a subclass that wraps tensors
    y = masked_linear(TwoTensor(x, 2 * x), weight, scores, threshold)
    equal(y.a, masked_linear(x, weight, scores, threshold))
    equal(y.b, masked_linear(2 * x, weight, scores, threshold))
    -> accepted: the op reaches the subclass's own __torch_dispatch__, and runs on each tensor inside
vmap over tokens or masks
    many = torch.stack([scores, 0.1 * scores, scores])
    with warnings.catch_warnings(action="ignore"):
        y = torch.vmap(lambda s: masked_linear(x, weight, s, threshold))(many)
        rows = torch.vmap(lambda row: masked_linear(row, weight, scores, threshold))(x)
    equal(y[:, 0, 0], torch.tensor([5.0, 0, 5]))
    equal(rows, masked_linear(x, weight, scores, threshold))
    -> accepted: one call a slice, right and slow: torch warns that it loops
scores changed between two forwards
    layer = MaskedLinear(5, 4, bias=False, keep_ratio=0.5)
    before = layer.mask()
    with torch.no_grad():
        layer.scores.copy_(layer.scores.flip(1))
    equal(layer.mask().float(), before.flip(1).float())
    layer.scores.data.copy_(layer.scores.flip(1))
    equal(layer(torch.eye(5)), torch.where(before, layer.weight, 0).T)
    -> accepted: seen after an in-place operation, an optimizer step or a write by .data; after any other write,
        call outdate()
scores written through data before the backward
    own, learned = learning(x), learning(scores)
    y = masked_linear(own, weight, learned, threshold)
    learned.data.zero_()
    y.sum().backward()
    equal(own.grad, torch.zeros(2, 5))
    -> accepted: not noticed, as with torch's own operations: d_x is taken by the new scores. torch.no_grad() would
        be seen
autocast
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, scores, threshold, bias)
    assert y.dtype == torch.bfloat16
    -> accepted: x, weight and bias are cast, scores never, so that the mask stays what it is
scores made in inference mode
    with torch.inference_mode():
        layer = MaskedLinear(5, 4, keep_ratio=0.5)
        before = layer.mask()
        layer.scores.copy_(layer.scores.flip(1))
        equal(layer.mask().float(), before.flip(1).float())
    -> accepted: the mask is found anew at each call, as such tensors do not say when they change
a score of exactly zero
    learned = learning(having(scores, (0, 0), 0))
    masked_linear(x, weight, learned, torch.tensor(0.0)).sum().backward()
    assert learned.grad[0, 0] == 0
    assert learned.grad.count_nonzero() == 19
    -> accepted: no gradient, as sign(0) is 0: MaskedLinear begins with none
an infinite threshold
    for value, kept in ((torch.inf, 0.0), (-torch.inf, 5.0)):
        y = masked_linear(x, weight, scores, torch.tensor(value))
        equal(y, torch.full((2, 4), kept))
        equal(y, oracle.masked_linear(x, weight, scores, torch.tensor(value), None, "magnitude"))
    -> accepted: what the reference gives for infinite thresholds: nothing is kept, or all
"""
