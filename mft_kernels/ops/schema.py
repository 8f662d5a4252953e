"""Every op of namespace ``mft``: its flat schema, and its fake, which gives shapes and dtypes alone.

No argument of a schema has a default: the dispatcher drops trailing arguments that equal theirs, and needs_input_grad
would lose their places. In ops that write in place the mode is called "mask_mode": the functionalisation of such ops
(torch 2.13) trips over an argument called "mode".
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..reference.linear import Gradients

library = torch.library.Library(ops.name, "DEF")


def _define(schema: str, fake: Callable) -> None:
    library.define(schema)
    torch.library.register_fake(add_op_namespace_prefix(schema.split("(", 1)[0]), fake, lib=library)


def _product(x, weight, *_):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _grouped_product(x, weight, transposed):
    return x.new_empty((x.shape[0], weight.shape[2 if transposed else 1]))


def _words(scores):
    return scores.new_empty((scores.shape[0], (scores.shape[1] + 31) // 32), dtype=torch.int32)


def _gradients(
    output_mask: list[bool],
    grad_output: Tensor,
    x_shape: Sequence[int],
    weight: Tensor,
    score_dtype: torch.dtype,
    bias_shape: Sequence[int] | None = None,
) -> Gradients:
    """(d_x, d_weight, d_scores, d_bias), (0,) where not wanted; bias_shape: (N,) unless given."""
    wanted = (
        (x_shape, grad_output.dtype),
        (weight.shape, weight.dtype),
        (weight.shape, score_dtype),
        (weight.shape[:1] if bias_shape is None else bias_shape, grad_output.dtype),
    )
    empty = [
        grad_output.new_empty(shape, dtype=dtype) if wants else grad_output.new_empty(0)
        for wants, (shape, dtype) in zip(output_mask, wanted)
    ]
    return empty[0], empty[1], empty[2], empty[3]


def _matrix_gradients(grad_output, weight, score_dtype, output_mask):
    return _gradients(output_mask, grad_output, (*grad_output.shape[:-1], weight.shape[1]), weight, score_dtype)


def _grouped_gradients(grad_output, weight, score_dtype, transposed, output_mask):
    x_shape = (grad_output.shape[0], weight.shape[1 if transposed else 2])
    return _gradients(output_mask, grad_output, x_shape, weight, score_dtype, (weight.shape[0], grad_output.shape[1]))


def _dtype_of(scores):
    return torch.float32 if scores is None else scores.dtype


_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"

# ---------------------------------------------------------------------------------------------- one matrix

_define(
    "masked_linear(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Tensor? bias, "
    "str mode, str backend) -> Tensor",
    _product,
)
_define(
    "masked_linear_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold, "
    f"str mode, bool[4] output_mask, str backend) -> {_GRADIENTS}",
    lambda grad_output, x, weight, scores, threshold, mode, output_mask, backend: _matrix_gradients(
        grad_output, weight, scores.dtype, output_mask
    ),
)
_define(
    "masked_linear_packed(Tensor x, Tensor weight, Tensor packed, Tensor? bias, str backend) -> Tensor",
    _product,
)
_define(
    "masked_linear_packed_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor packed, Tensor? scores, "
    f"Tensor? signs, str mode, bool[4] output_mask, str backend) -> {_GRADIENTS}",
    lambda grad_output, x, weight, packed, scores, signs, mode, output_mask, backend: _matrix_gradients(
        grad_output, weight, _dtype_of(scores), output_mask
    ),
)
_define(
    "masked_linear_by_ratio(Tensor x, Tensor weight, Tensor scores, Tensor? bias, float keep_ratio, "
    "float? threshold, str mode, str backend) -> Tensor",
    _product,
)
_define(
    "masked_linear_by_ratio_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, float keep_ratio, "
    f"float? threshold, str mode, bool[4] output_mask, str backend) -> {_GRADIENTS}",
    lambda grad_output, x, weight, scores, keep_ratio, threshold, mode, output_mask, backend: _matrix_gradients(
        grad_output, weight, scores.dtype, output_mask
    ),
)
_define(
    "masked_linear_many(Tensor x, Tensor weight, Tensor[] masks, Tensor tasks, Tensor? bias, str backend) -> Tensor",
    _product,
)
_define(
    "masked_linear_many_backward(Tensor grad_output, Tensor weight, Tensor[] masks, Tensor tasks, str backend) "
    "-> Tensor",
    lambda grad_output, weight, *_: grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1])),
)
_define(
    "accumulate_score_grad(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor? weight, Tensor? scores, "
    "Tensor? signs, str mask_mode, str backend) -> ()",
    lambda *_: None,
)

# ---------------------------------------------------------------------------------------------- codes

_define(
    "masked_linear_quantized(Tensor x, Tensor codes, Tensor[] absmax, Tensor? packed, Tensor? bias, SymInt[] shape, "
    "str kind, str backend) -> Tensor",
    lambda x, codes, absmax, packed, bias, shape, *_: x.new_empty((*x.shape[:-1], shape[0])),
)
_define(
    "masked_linear_quantized_d_x(Tensor grad_output, Tensor codes, Tensor[] absmax, Tensor? packed, SymInt[] shape, "
    "str kind, str backend) -> Tensor",
    lambda grad_output, codes, absmax, packed, shape, *_: grad_output.new_empty((*grad_output.shape[:-1], shape[1])),
)
_define(
    "dequantize(Tensor codes, Tensor[] absmax, SymInt[] shape, str kind, ScalarType dtype, str backend) -> Tensor",
    lambda codes, absmax, shape, kind, dtype, backend: codes.new_empty(shape, dtype=dtype),
)

# ---------------------------------------------------------------------------------------------- experts

_define(
    "masked_linear_grouped(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Tensor offsets, Tensor? bias, "
    "bool transposed, str mode, str backend) -> Tensor",
    lambda x, weight, scores, threshold, offsets, bias, transposed, *_: _grouped_product(x, weight, transposed),
)
_define(
    "masked_linear_grouped_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold, "
    f"Tensor offsets, bool transposed, str mode, bool[4] output_mask, str backend) -> {_GRADIENTS}",
    lambda grad_output, x, weight, scores, threshold, offsets, transposed, mode, output_mask, backend: (
        _grouped_gradients(grad_output, weight, scores.dtype, transposed, output_mask)
    ),
)
_define(
    "masked_linear_grouped_packed(Tensor x, Tensor weight, Tensor packed, Tensor offsets, Tensor? bias, "
    "bool transposed, str backend) -> Tensor",
    lambda x, weight, packed, offsets, bias, transposed, backend: _grouped_product(x, weight, transposed),
)
_define(
    "masked_linear_grouped_packed_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor packed, Tensor? scores, "
    f"Tensor? signs, Tensor offsets, bool transposed, str mode, bool[4] output_mask, str backend) -> {_GRADIENTS}",
    lambda grad_output, x, weight, packed, scores, signs, offsets, transposed, mode, output_mask, backend: (
        _grouped_gradients(grad_output, weight, _dtype_of(scores), transposed, output_mask)
    ),
)
_define(
    "masked_linear_grouped_by_ratio(Tensor x, Tensor weight, Tensor scores, Tensor offsets, Tensor? bias, "
    "float keep_ratio, float? threshold, bool transposed, str mode, str backend) -> Tensor",
    lambda x, weight, scores, offsets, bias, keep_ratio, threshold, transposed, *_: _grouped_product(
        x, weight, transposed
    ),
)
_define(
    "masked_linear_grouped_by_ratio_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, "
    "Tensor offsets, float keep_ratio, float? threshold, bool transposed, str mode, bool[4] output_mask, str backend) "
    f"-> {_GRADIENTS}",
    lambda grad_output, x, weight, scores, offsets, keep_ratio, threshold, transposed, mode, output_mask, backend: (
        _grouped_gradients(grad_output, weight, scores.dtype, transposed, output_mask)
    ),
)
_define(
    "accumulate_score_grad_grouped(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor offsets, Tensor? weight, "
    "Tensor? scores, Tensor? signs, bool transposed, str mask_mode, str backend) -> ()",
    lambda *_: None,
)

# ---------------------------------------------------------------------------------------------- scores

_define(
    "kept_threshold(Tensor scores, float keep_ratio, str mode, str backend) -> Tensor",
    lambda scores, *_: scores.new_empty(()),
)
_define(
    "kept_thresholds(Tensor scores, float keep_ratio, str mode, str backend) -> Tensor",
    lambda scores, *_: scores.new_empty(scores.shape[:1]),
)
_define(
    "pack_mask(Tensor scores, Tensor threshold, str mode, str backend) -> Tensor",
    lambda scores, *_: _words(scores),
)
_define(
    "pack_signs(Tensor scores, str backend) -> (Tensor, Tensor)",
    lambda scores, backend: (_words(scores), scores.new_empty((), dtype=torch.int64)),
)
_define(
    "unpack_mask(Tensor packed, SymInt[] shape) -> Tensor",
    lambda packed, shape: packed.new_empty(shape, dtype=torch.bool),
)
_define(
    "select_each(Tensor scores, float keep_ratio, str mode) -> (Tensor, Tensor)",
    lambda scores, keep_ratio, mode: (
        scores.new_empty(scores.shape[:1]),
        scores.new_empty((*scores.shape[:2], (scores.shape[2] + 31) // 32), dtype=torch.int32),
    ),
)


def _step(scores, *rest):
    if rest[14] is None:  # keep_ratio
        return scores.new_empty(0), scores.new_empty(0, dtype=torch.int32)
    return scores.new_empty(()), _words(scores)


_define(
    "score_step(Tensor(a!) scores, Tensor grad, Tensor? weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor(d!)? scales, int step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "Tensor? grad_scale, int seed, str mask_mode, float? keep_ratio, Tensor? threshold, str backend) "
    "-> (Tensor, Tensor)",
    _step,
)
