"""What the ops, `MaskedLinear` and `MaskAdamW` are given. x (2, 5), grad (2, 4), weight and scores (4, 5) and bias (4,)
are ones, threshold is 0.5, packed keeps every weight.
"""

import warnings

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from mft_kernels import (
    MaskAdamW,
    MaskedLinear,
    MaskedMultiheadAttention,
    accumulate_score_grad,
    kept_threshold,
    masked_linear,
    masked_linear_packed,
    masked_linear_quantized,
    pack_mask,
    reference,
    score_step,
    unpack_mask,
)
from mft_kernels.ops.checks import NonFiniteScores
from mft_kernels.testing import integer_inputs

from .registry import accepted, refused

x, grad, bias = torch.ones(2, 5), torch.ones(2, 4), torch.ones(4)
weight, scores = torch.ones(4, 5), torch.ones(4, 5)
threshold = torch.tensor(0.5)
packed = pack_mask(scores, threshold)
FLOATS = "must be float32, bfloat16, float16 or float64"


# ---------------------------------------------------------------------------------------------- shapes


@refused(ValueError, where="x", got="(2, 6)", rule="must end in in_features = 5 of weight (4, 5)")
def x_of_another_number_of_features():
    masked_linear(torch.ones(2, 6), weight, scores, threshold)


@refused(ValueError, where="x", got="shape ()", rule="must end in in_features = 5 of weight (4, 5)")
def x_without_dimensions():
    masked_linear(torch.tensor(1.0), weight, scores, threshold)


@refused(ValueError, where="weight", got="shape (5,)", rule="must be (N, K)")
def a_weight_that_is_a_vector():
    masked_linear(x, torch.ones(5), scores, threshold)


@refused(ValueError, where="scores", got="(4, 4)", rule="must match weight (4, 5)")
def scores_of_another_shape_than_the_weight():
    masked_linear(x, weight, torch.ones(4, 4), threshold)


@refused(ValueError, where="threshold", got="(5,)", rule="must be () or one a row (4,)", remedy="see kept_threshold")
def a_threshold_for_each_column():
    masked_linear(x, weight, scores, torch.ones(5))


@refused(ValueError, where="bias", got="(5,)", rule="must be (4,)")
def a_bias_of_another_size():
    masked_linear(x, weight, scores, threshold, torch.ones(5))


@refused(ValueError, where="packed", got="(4, 3)", rule="must be (4, 1), 1 bit a weight of (4, 5)")
def a_packed_mask_of_another_weight():
    masked_linear_packed(x, weight, torch.zeros(4, 3, dtype=torch.int32))


@refused(ValueError, where="codes", got="(20,)", rule="must be 10 bytes for nf4 of (4, 5)")
def codes_of_nf4_one_a_byte():
    masked_linear_quantized(x, torch.zeros(20, dtype=torch.uint8), torch.ones(1), packed, shape=(4, 5))


@refused(ValueError, where="scores", got="shape (2, 2, 4, 5)", rule="must be (N, K), or of experts (E, N, K)")
def scores_of_four_dimensions_to_pack():
    pack_mask(torch.ones(2, 2, 4, 5), threshold)


@refused(ValueError, where="shape", got="(20,)", rule="must be (N, K), or of experts (E, N, K)")
def a_shape_of_one_size_to_unpack():
    unpack_mask(packed, (20,))


@refused(ValueError, where="grad_output", got="(3, 4)", rule="must be (2, 4)")
def a_gradient_of_other_tokens():
    accumulate_score_grad(torch.zeros(4, 5), torch.ones(3, 4), x, weight, scores=scores)


@refused(ValueError, where="grad_buffer", got="(5, 4)", rule="must be contiguous (4, 5)")
def a_gradient_buffer_of_another_shape():
    MaskedLinear(5, 4).hold(packed, torch.zeros(5, 4))


@refused(ValueError, where="packed", got="(4, 2)", rule="must be (4, 1), 1 bit a weight of (4, 5)")
def a_held_mask_of_another_layer():
    MaskedLinear(5, 4).hold(torch.zeros(4, 2, dtype=torch.int32))


# ---------------------------------------------------------------------------------------------- dtypes


@refused(TypeError, where="x", got="torch.int64", rule=FLOATS)
def x_of_integers():
    masked_linear(torch.ones(2, 5, dtype=torch.int64), weight, scores, threshold)


@refused(
    TypeError,
    where="x",
    got="torch.float16",
    rule="must have weight's dtype torch.float32",
    remedy="convert x or use torch.autocast",
)
def x_of_another_dtype_than_the_weight():
    masked_linear(x.half(), weight, scores, threshold)


@refused(TypeError, where="weight", got="torch.int8", rule=FLOATS)
def an_8_bit_weight_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        masked_linear(x, weight.to(torch.int8), scores, threshold)


@refused(TypeError, where="scores", got="torch.int32", rule=FLOATS)
def scores_of_integers():
    masked_linear(x, weight, scores.int(), threshold)


@refused(TypeError, where="bias", got="torch.bfloat16", rule="must have weight's dtype torch.float32")
def a_bias_of_another_dtype():
    masked_linear(x, weight, scores, threshold, bias.bfloat16())


@refused(
    TypeError,
    where="absmax",
    got="torch.uint8",
    rule="must be torch.float32",
    remedy="give all four tensors of double quantisation",
)
def the_codes_of_a_doubly_quantised_absmax_alone():
    codes, absmax = torch.zeros(10, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    masked_linear_quantized(x, codes, absmax, packed, shape=(4, 5))


@refused(TypeError, where="packed", got="torch.float32", rule="must be int32")
def a_mask_of_ones_where_bits_are_due():
    masked_linear_packed(x, weight, torch.ones(4, 5))


@refused(
    TypeError,
    where="threshold",
    got="torch.float32",
    rule="must be an int16 code as the scores are",
    remedy="see kept_threshold and fixed_from_float",
)
def a_float_threshold_for_fixed_point_scores():
    pack_mask(scores.to(torch.int16), threshold)


@refused(
    TypeError,
    where="grad_output",
    got="torch.bfloat16",
    rule="must have x's dtype torch.float32",
    remedy="convert one of them",
)
def a_gradient_of_another_dtype():
    accumulate_score_grad(torch.zeros(4, 5), grad.bfloat16(), x, weight, scores=scores)


@refused(TypeError, where="scores_dtype", got="torch.int8", rule="must be float32, bfloat16, float16, float64 or int16")
def a_layer_with_scores_of_8_bits():
    MaskedLinear(5, 4, scores_dtype=torch.int8)


@refused(
    TypeError, where="params", got="torch.float16", rule="must be float32, bfloat16 (rounded stochastically) or int16"
)
def half_precision_scores_to_optimise():
    MaskAdamW([nn.Parameter(scores.half())])


@refused(TypeError, where="exp_avg", got="torch.uint8", rule="must be torch.float32 without scales")
def moments_in_8_bits_without_scales():
    codes = torch.zeros(4, 5, dtype=torch.uint8)
    score_step(scores.clone(), weight, None, codes, codes.clone(), step=1, lr=1e-3)


# ---------------------------------------------------------------------------------------------- devices, strides, kinds


@refused(ValueError, where="x", got="meta", rule="must be on weight's device cpu")
def x_on_another_device():
    masked_linear(x.to("meta"), weight, scores, threshold)


@refused(ValueError, where="scores", got="meta", rule="must be on weight's device cpu")
def scores_on_another_device():
    masked_linear(x, weight, scores.to("meta"), threshold)


@refused(ValueError, where="signs", got="meta", rule="must be on weight's device cpu")
def signs_on_another_device():
    accumulate_score_grad(torch.zeros(4, 5), grad, x, weight, signs=packed.to("meta"))


@refused(ValueError, where="out", got="strides (1, 4)", rule="must be contiguous and (N, K)")
def a_transposed_sum_of_gradients():
    accumulate_score_grad(torch.zeros(5, 4).T, grad, x, None)


@refused(ValueError, where="scores", got="strides (1, 4)", rule="must be (N, K) and contiguous")
def a_step_on_transposed_scores():
    score_step(torch.ones(5, 4).T, weight, None, weight.clone(), weight.clone(), step=1, lr=1e-3)


@refused(ValueError, where="params", got="strides (1, 4)", rule="must be contiguous", remedy="use p.contiguous()")
def transposed_scores_to_optimise():
    MaskAdamW([torch.ones(5, 4).T])


@refused(TypeError, where="x", got="list", rule="must be a tensor", remedy="use torch.as_tensor(x)")
def x_as_a_list():
    masked_linear([[1.0] * 5], weight, scores, threshold)


@refused(TypeError, where="threshold", got="float", rule="must be a tensor", remedy="use torch.as_tensor(threshold)")
def a_threshold_as_a_number():
    masked_linear(x, weight, scores, 0.5)


@refused(TypeError, where="scores", got="NoneType", rule="must be a tensor")
def no_scores():
    masked_linear(x, weight, None, threshold)


@refused(
    TypeError,
    where="weight",
    got="torch.sparse_coo",
    rule="must be dense (torch.strided)",
    remedy="use weight.to_dense()",
)
def a_sparse_weight():
    masked_linear(x, weight.to_sparse(), scores, threshold)


@refused(TypeError, where="grad", got="a sparse tensor", rule="must be dense")
def a_sparse_gradient_of_scores():
    p = nn.Parameter(scores.clone())
    p.grad = scores.to_sparse()
    MaskAdamW([p]).step()


@refused(TypeError, where="linear", got="Conv1d", rule="must be an nn.Linear")
def a_convolution_to_mask():
    MaskedLinear.from_linear(nn.Conv1d(5, 4, 1))


@refused(
    ValueError,
    where="linear cannot be masked",
    got="has hooks",
    rule="which a masked layer would lose",
    remedy="mask it first, and add them afterwards",
)
def a_linear_with_a_hook_to_mask_by_hand():
    linear = nn.Linear(5, 4)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    MaskedLinear.from_linear(linear)


@refused(
    ValueError,
    where="out_proj of MultiheadAttention",
    got="MaskedLinear",
    rule="must not be a MaskedLinear: nn.MultiheadAttention computes with out_proj.weight itself",
    remedy="MaskedMultiheadAttention.from_attention(attention) makes one that calls it",
)
def a_masked_layer_where_the_weight_is_read_past_it():
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = MaskedLinear(8, 8)


@refused(
    ValueError,
    where="linear cannot be masked",
    got="its forward computes with scale, which is 1.0 now. A masked layer would leave that out",
    rule="a plain nn.Linear",
)
def a_linear_subclass_that_does_more():
    held = {"scale": 1.0, "forward": lambda self, x: self.scale * nn.Linear.forward(self, x)}
    Scaled = type("Scaled", (nn.Linear,), held)
    MaskedLinear.from_linear(Scaled(5, 4))


@refused(TypeError, where="attention", got="TransformerEncoderLayer", rule="must be an nn.MultiheadAttention")
def a_layer_around_the_attention_to_mask():
    MaskedMultiheadAttention.from_attention(nn.TransformerEncoderLayer(8, 2, 8))


@refused(
    ValueError,
    where="attention cannot be masked",
    got="its forward is its own",
    rule="a plain nn.MultiheadAttention",
)
def an_attention_with_a_forward_of_its_own():
    forward = nn.MultiheadAttention.forward
    held = {"forward": lambda self, q, k, v: forward(self, q.roll(1, -1), k.roll(1, -1), v)}
    Rotary = type("Rotary", (nn.MultiheadAttention,), held)
    MaskedMultiheadAttention.from_attention(Rotary(8, 2))


@refused(ValueError, where="in_proj", got="MaskedLinear", rule="must be an nn.Linear", remedy="merge() it first")
def a_masked_projection_to_pack():
    attention = MaskedMultiheadAttention(8, 2)
    attention.in_proj = MaskedLinear(8, 24)
    attention.to_attention()


@refused(ValueError, where="attn_mask", got="(3, 2)", rule="must be (2, 2)")
def an_attention_mask_of_another_shape():
    tokens = torch.ones(2, 1, 8)
    MaskedMultiheadAttention(8, 2)(tokens, tokens, tokens, attn_mask=torch.zeros(3, 2))


@refused(ValueError, where="key_padding_mask", got="(2, 1)", rule="must be (1, 2)")
def a_padding_mask_with_the_tokens_first():
    tokens = torch.ones(2, 1, 8)
    MaskedMultiheadAttention(8, 2)(tokens, tokens, tokens, key_padding_mask=torch.zeros(2, 1))


@refused(ValueError, where="attn_mask", got="None", rule="must be given with is_causal")
def a_causal_hint_without_a_mask():
    tokens = torch.ones(2, 1, 8)
    MaskedMultiheadAttention(8, 2)(tokens, tokens, tokens, is_causal=True)


# ---------------------------------------------------------------------------------------------- values


@refused(ValueError, where="keep_ratio", got="90", rule="must lie in [0, 1]")
def a_keep_ratio_in_percent():
    MaskedLinear(5, 4, keep_ratio=90)


@refused(ValueError, where="keep_ratio", got="nan", rule="must lie in [0, 1]")
def a_keep_ratio_of_nan():
    kept_threshold(scores, float("nan"))


@refused(TypeError, where="keep_ratio", got="str", rule="must be a number", remedy="use float(keep_ratio)")
def a_keep_ratio_as_text():
    kept_threshold(scores, "0.9")


@refused(ValueError, where="threshold", got="nan", rule="must be a number or None", remedy="keep_ratio=0 says that")
def a_fixed_threshold_of_nan():
    MaskedLinear(5, 4, threshold=float("nan"))


@refused(
    NonFiniteScores,
    where="scores",
    got="2 NaN or Inf among (2, 2)",
    rule="must be finite",
    remedy="lower the learning rate, or look for NaN or Inf in the weight, and in the gradients of the step before",
)
def nan_and_inf_among_the_scores():
    kept_threshold(torch.tensor([[torch.nan, 1], [torch.inf, 0]]), 0.9)


@refused(
    NonFiniteScores,
    where="scores of module 'model.layers.3.mlp.up_proj'",
    got="1 NaN or Inf among (4, 5)",
    rule="must be finite",
    remedy="lower the learning rate",
)
def a_nan_gradient_that_an_optimiser_took():
    layer = MaskedLinear(5, 4)
    layer.module_name = "model.layers.3.mlp.up_proj"
    optimizer = torch.optim.SGD([layer.scores])
    layer.scores.grad = torch.zeros(4, 5).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan))
    optimizer.step()
    layer(x)


@refused(
    NonFiniteScores,
    where="scores",
    got="1 NaN or Inf among (4, 5)",
    rule="must be finite",
    remedy="lower the learning rate",
)
def nan_scores_under_vmap():
    stack = torch.ones(3, 4, 5)
    stack[1, 2, 3] = torch.nan
    with warnings.catch_warnings(action="ignore"):  # torch says that it loops
        torch.vmap(lambda s: kept_threshold(s, 0.9))(stack)


@refused(ValueError, where="mode", got="'top'", rule="must be one of ('magnitude', 'value')")
def an_unknown_mode():
    masked_linear(x, weight, scores, threshold, mode="top")


@refused(ValueError, where="init", got="'zeros'", rule="must be one of ('normal', 'magnitude', 'constant')")
def an_unknown_initialisation():
    MaskedLinear(5, 4, init="zeros")


@refused(ValueError, where='mode "magnitude"', got="neither", rule="needs scores or signs")
def a_sign_from_nowhere():
    accumulate_score_grad(torch.zeros(4, 5), grad, x, weight)


@refused(ValueError, where="scores", got="a tensor", rule="must be None where weight is")
def scores_without_their_weight():
    accumulate_score_grad(torch.zeros(4, 5), grad, x, None, scores=scores)


@refused(TypeError, where="lr", got="Tensor", rule="must be a number", remedy="use float(lr)")
def a_learning_rate_as_a_tensor():
    MaskAdamW([nn.Parameter(scores)], lr=torch.tensor(1e-3))


@refused(ValueError, where="betas[1]", got="1.0", rule="must lie in [0, 1)")
def a_decay_rate_of_one():
    MaskAdamW([nn.Parameter(scores)], betas=(0.9, 1.0))


@refused(ValueError, where="moments", got="'4bit'", rule="must be one of ('8bit', 'fp32')")
def moments_in_an_unknown_format():
    MaskAdamW([nn.Parameter(scores)], moments="4bit")


@refused(ValueError, where="step", got="0", rule="must be an integer from 1")
def a_step_number_of_zero():
    score_step(scores.clone(), weight, None, weight.clone(), weight.clone(), step=0, lr=1e-3)


@refused(ValueError, where="p", got="another tensor of shape (4, 5)", rule="must be one of the optimiser's parameters")
def a_step_of_a_stranger():
    MaskAdamW([nn.Parameter(scores)]).step_one(scores, weight)


# ---------------------------------------------------------------------------------------------- autograd


@refused(
    RuntimeError,
    where="scores",
    got="[torch.FloatTensor [4, 5]]",
    rule="must stay as they are until the backward pass",
    remedy="call backward() before optimizer.step() and the like, or change a clone()",
)
def scores_changed_between_forward_and_backward():
    own = scores.clone().requires_grad_()
    y = masked_linear(x, weight, own, threshold)
    with torch.no_grad():
        own.add_(1)
    y.sum().backward()


@refused(
    RuntimeError,
    where="x",
    got="[torch.FloatTensor [2, 5]]",
    rule="must stay as they are until the backward pass",
    remedy="change a clone()",
)
def an_input_changed_in_place_after_a_masked_layer():
    layer, own = MaskedLinear(5, 4), x.clone()
    y = layer(own)
    own.relu_()
    y.sum().backward()


@refused(
    RuntimeError,
    where="packed",
    got="(4, 1) modified by an inplace operation",
    rule="must stay as it is until the backward pass",
    remedy="call backward() before packed changes",
)
def a_held_mask_changed_between_forward_and_backward():
    layer, own = MaskedLinear(5, 4), packed.clone()
    layer.hold(own, torch.zeros(4, 5))
    y = layer(x)
    own.zero_()
    y.sum().backward()


@refused(
    NotImplementedError,
    where="mft::masked_linear_backward",
    got="create_graph=True",
    rule="has no second derivative",
    remedy="leave out create_graph=True, or detach() its gradients",
)
def a_second_derivative():
    own = x.clone().requires_grad_()
    y = masked_linear(own, weight, scores, threshold).square().sum()
    (d_x,) = torch.autograd.grad(y, own, create_graph=True)
    d_x.sum().backward()


ONE_BY_ONE = "call backward(), for one sample after the other where each needs its own gradient"
BACKWARD = "must be differentiated by backward() or torch.autograd.grad"


@refused(RuntimeError, where="masked_linear", got="torch.func or forward mode", rule=BACKWARD, remedy=ONE_BY_ONE)
def a_derivative_in_forward_mode():
    torch.func.jvp(lambda v: masked_linear(v, weight, scores, threshold), (x,), (x,))


@refused(RuntimeError, where="masked_linear", got="torch.func or forward mode", rule=BACKWARD, remedy=ONE_BY_ONE)
def a_dual_tensor():
    with torch.autograd.forward_ad.dual_level():
        masked_linear(torch.autograd.forward_ad.make_dual(x, x), weight, scores, threshold)


@refused(
    RuntimeError,
    where="masked_linear_by_ratio",
    got="torch.func or forward mode",
    rule=BACKWARD,
    remedy=ONE_BY_ONE,
)
def gradients_of_each_sample_by_vmap():
    layer = MaskedLinear(5, 4)
    per_sample = torch.func.grad(lambda s, row: torch.func.functional_call(layer, {"scores": s}, row).sum())
    torch.func.vmap(per_sample, in_dims=(None, 0))(layer.scores.detach(), x)


@refused(
    RuntimeError,
    where="accumulate_score_grad",
    got="a batched tensor",
    rule="must not be called under torch.vmap",
    remedy="call it for one matrix after the other",
)
def vmap_over_sums_in_place():
    torch.vmap(lambda g: accumulate_score_grad(torch.zeros(4, 5), g, x, None))(torch.ones(3, 2, 4))


# ---------------------------------------------------------------------------------------------- accepted


def equal(one, other):
    """Equal in every bit but the sign of zero and the bits of NaN."""
    assert torch.equal(one.nan_to_num(12345), other.nan_to_num(12345)), (one, other)


@accepted("all are kept, so that no order of elements decides: 4 of 8 although keep_ratio 0.25 asks for 2")
def ties_at_the_threshold():
    tied = torch.tensor([[0.5, -0.5, 0.25, 0.5], [0.5, 0.0, -0.25, 0.25]])
    found = kept_threshold(tied, 0.25)
    assert found == 0.5
    assert unpack_mask(pack_mask(tied, found), (2, 4)).sum() == 4


@accepted("all is kept, or nothing")
def a_keep_ratio_of_1_or_0():
    for keep_ratio in (1, 0):
        mask = unpack_mask(pack_mask(scores, kept_threshold(scores, keep_ratio)), (4, 5))
        assert (mask == bool(keep_ratio)).all()


@accepted("an exact +0, forward and backward: weights are selected, not multiplied")
def nan_and_inf_in_dropped_weights():
    spoilt, low = weight.clone(), scores.clone()
    spoilt[0, :] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan, torch.nan])
    low[0, :] = 0.1
    own = x.clone().requires_grad_()
    y = masked_linear(own, spoilt, low, threshold)
    equal(y, torch.tensor([0.0, 5, 5, 5]).expand(2, 4))
    y.sum().backward()
    equal(own.grad, torch.full((2, 5), 3.0))


@accepted("NaN in the outputs that it takes part in, as with nn.Linear")
def nan_in_a_kept_weight():
    spoilt = weight.clone()
    spoilt[0, 0] = torch.nan
    y = masked_linear(x, spoilt, scores, threshold)
    assert y[:, 0].isnan().all()
    assert y[:, 1:].isfinite().all()


@accepted("NaN in its own row of the output, as with nn.Linear")
def nan_and_inf_in_x():
    own = x.clone()
    own[0, 0] = torch.nan
    equal(masked_linear(own, weight, scores, threshold), torch.tensor([[torch.nan] * 4, [5.0] * 4]))
    own[0, 0] = torch.inf
    equal(masked_linear(own, weight, scores, threshold), torch.tensor([[torch.inf] * 4, [5.0] * 4]))


@accepted("NaN in that token's row of d_x and in that output's row of d_scores; after a step, the selection refuses it")
def nan_in_the_gradient():
    own, spoilt = x.clone().requires_grad_(), grad.clone()
    spoilt[0, 1] = torch.nan
    learned = scores.clone().requires_grad_()
    masked_linear(own, weight, learned, threshold).backward(spoilt)
    assert own.grad.isnan().any(1).tolist() == [True, False]
    assert learned.grad.isnan().any(1).tolist() == [False, True, False, False]


@accepted("it is dropped, and gets no gradient")
def a_nan_score_beside_a_given_threshold():
    spoilt = scores.clone()
    spoilt[0, 0] = torch.nan
    equal(masked_linear(x, weight, spoilt, threshold)[0], torch.tensor([4.0, 5, 5, 5]))


@accepted("nothing is kept: what an accelerator answers for scores that are not finite, without waiting for it")
def a_threshold_of_nan():
    equal(masked_linear(x, weight, scores, torch.tensor(torch.nan)), torch.zeros(2, 4))


@accepted("an empty result, and gradients of zeros")
def no_tokens():
    learned = scores.clone().requires_grad_()
    y = masked_linear(x[:0], weight, learned, threshold)
    assert y.shape == (0, 4)
    y.sum().backward()
    equal(learned.grad, torch.zeros(4, 5))


@accepted("the bias alone")
def no_input_features():
    y = masked_linear(torch.ones(2, 0), torch.ones(4, 0), torch.ones(4, 0), threshold, bias)
    equal(y, torch.ones(2, 4))


@accepted("threshold inf, and an empty mask")
def no_scores_at_all():
    assert kept_threshold(torch.ones(0, 5), 0.9) == torch.inf
    assert pack_mask(torch.ones(0, 5), threshold).shape == (0, 1)


@accepted("a vector of outputs, as with nn.Linear")
def a_single_token_without_a_batch():
    equal(masked_linear(x[0], weight, scores, threshold), torch.full((4,), 5.0))


@accepted("the result of the contiguous copies")
def transposed_sliced_and_expanded_tensors():
    t = integer_inputs(12, 17, 45)
    two = torch.tensor(2.0)
    strided = t.x.T.contiguous().T, t.weight.repeat(2, 1)[::2][:17], t.scores.repeat(1, 2)[:, :45]
    rows = torch.arange(34)[::2][:17] % 17
    equal(masked_linear(*strided, two), masked_linear(t.x, t.weight[rows], t.scores, two))
    equal(
        masked_linear(t.x[:1].expand(12, 45), t.weight, t.scores, two),
        masked_linear(t.x[:1].repeat(12, 1), t.weight, t.scores, two),
    )


@accepted("the result of the aligned copies")
def tensors_that_begin_at_odd_addresses():
    t = integer_inputs(5, 40, 50, torch.bfloat16, torch.bfloat16)
    two = torch.tensor(2.0)
    shifted = [torch.empty(v.numel() + 1, dtype=v.dtype)[1:].view_as(v).copy_(v) for v in (t.x, t.weight, t.scores)]
    assert all(v.data_ptr() % 4 == 2 for v in shifted)
    equal(masked_linear(*shifted, two), masked_linear(t.x, t.weight, t.scores, two))


@accepted("the result of the close copies: offsets beyond 2^31 are 64-bit")
def rows_more_than_two_billion_elements_apart():
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16)  # 4 GB of addresses, of which two pages are touched
    t = integer_inputs(2, 2, 33, torch.bfloat16, torch.bfloat16)
    for name in ("x", "weight", "scores"):
        strided = far.as_strided((2, 33), (2**31, 1)).copy_(getattr(t, name))
        arguments = {"x": t.x, "weight": t.weight, "scores": t.scores}
        two = torch.tensor(2.0)
        equal(masked_linear(**arguments | {name: strided}, threshold=two), masked_linear(**arguments, threshold=two))
    equal(kept_threshold(strided, 0.5), kept_threshold(t.scores, 0.5))


@accepted("the shapes of results: sizes beyond 2^31 on torch's meta device, where nothing is computed")
def more_than_two_billion_weights():
    with torch.device("meta"):
        large = torch.empty(70_000, 40_000)
        y = masked_linear(torch.empty(3, 40_000), large, large, torch.empty(()))
        assert y.shape == (3, 70_000)
        assert pack_mask(large, torch.empty(())).shape == (70_000, 1250)


@accepted("the reference computes in it, unless a backend is asked for by name")
def tensors_of_float64():
    y = masked_linear(x.double(), weight.double(), scores.double(), threshold.double())
    assert y.dtype == torch.float64


class Tagged(torch.Tensor):
    """A subclass with nothing of its own."""


@accepted("the same result, in the subclass where torch's own operations would give it")
def a_subclass_of_tensor():
    own = x.clone().as_subclass(Tagged)
    y = masked_linear(own, weight, scores, threshold)
    assert type(y) is type(nn.functional.linear(own, weight))
    equal(y.as_subclass(torch.Tensor), masked_linear(x, weight, scores, threshold))


@accepted("the op reaches the subclass's own __torch_dispatch__, and runs on each tensor inside")
def a_subclass_that_wraps_tensors():
    y = masked_linear(TwoTensor(x, 2 * x), weight, scores, threshold)
    equal(y.a, masked_linear(x, weight, scores, threshold))
    equal(y.b, masked_linear(2 * x, weight, scores, threshold))


@accepted("one call a slice, right and slow: torch warns that it loops")
def vmap_over_tokens_or_masks():
    many = torch.stack([scores, 0.1 * scores, scores])
    with warnings.catch_warnings(action="ignore"):
        y = torch.vmap(lambda s: masked_linear(x, weight, s, threshold))(many)
        rows = torch.vmap(lambda row: masked_linear(row, weight, scores, threshold))(x)
    equal(y[:, 0, 0], torch.tensor([5.0, 0, 5]))
    equal(rows, masked_linear(x, weight, scores, threshold))


@accepted(
    "seen after an in-place operation, an optimizer step or a write by .data; after any other write, call outdate()"
)
def scores_changed_between_two_forwards():
    layer = MaskedLinear(5, 4, bias=False, keep_ratio=0.5)
    before = layer.mask()
    with torch.no_grad():
        layer.scores.copy_(layer.scores.flip(1))
    equal(layer.mask().float(), before.flip(1).float())
    layer.scores.data.copy_(layer.scores.flip(1))
    equal(layer(torch.eye(5)), torch.where(before, layer.weight, 0).T)


@accepted("not noticed, as with torch's own operations: d_x is taken by the new scores. torch.no_grad() would be seen")
def scores_written_through_data_before_the_backward():
    own, learned = x.clone().requires_grad_(), scores.clone().requires_grad_()
    y = masked_linear(own, weight, learned, threshold)
    learned.data.zero_()
    y.sum().backward()
    equal(own.grad, torch.zeros(2, 5))


@accepted("x, weight and bias are cast, scores never, so that the mask stays what it is")
def autocast():
    with torch.autocast("cpu", torch.bfloat16):
        y = masked_linear(x, weight, scores, threshold, bias)
    assert y.dtype == torch.bfloat16


@accepted("the mask is found anew at each call, as such tensors do not say when they change")
def scores_made_in_inference_mode():
    with torch.inference_mode():
        layer = MaskedLinear(5, 4, keep_ratio=0.5)
        before = layer.mask()
        layer.scores.copy_(layer.scores.flip(1))
        equal(layer.mask().float(), before.flip(1).float())


@accepted("no gradient, as sign(0) is 0: MaskedLinear begins with none")
def a_score_of_exactly_zero():
    learned = scores.clone()
    learned[0, 0] = 0
    learned.requires_grad_()
    masked_linear(x, weight, learned, torch.tensor(0.0)).sum().backward()
    assert learned.grad[0, 0] == 0
    assert learned.grad.count_nonzero() == 19


@accepted("what the reference gives for infinite thresholds: nothing is kept, or all")
def an_infinite_threshold():
    for value, kept in ((torch.inf, 0.0), (-torch.inf, 5.0)):
        y = masked_linear(x, weight, scores, torch.tensor(value))
        equal(y, torch.full((2, 4), kept))
        equal(y, reference.masked_linear(x, weight, scores, torch.tensor(value), None, "magnitude"))
