"""Every op of namespace ``mft``: its flat schema, the class of its calls, and its fake, which makes empty results.

No argument of a schema has a default. The dispatcher drops trailing arguments that equal their default, and
needs_input_grad would lose their places. In ops that write in place the mode is called "mask_mode": torch 2.13 cannot
functionalise such an op if it has an argument called "mode".
"""

import operator
from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..reference.linear import Gradients

library = torch.library.Library(ops.name, "DEF")


class Call:
    """An op's arguments: a named tuple with the names of its schema.

    An argument that the schema does not have takes the value given here.
    """

    __slots__ = ()
    transposed: Any = False
    bias: Any = None
    scores: Any = None
    signs: Any = None
    mode: Any = "value"
    pattern: Any = "matrix"


#: The class of each op's calls. Typed Any, because mypy cannot know the fields of a class made from a schema.
calls: dict[str, Any] = {}


def arguments_of(op: str, names: Sequence[str]) -> Callable[[tuple], tuple]:
    """Return a function that turns a tuple of values with these names into the arguments of ``op``.

    Arguments that names does not list take the values of Call.
    """
    besides = [name for name in calls[op]._fields if name not in names]
    places = [[*names, *besides].index(name) for name in calls[op]._fields]
    values = tuple(getattr(Call, name) for name in besides)
    pick = operator.itemgetter(*places)
    return (lambda given: pick(given + values)) if values else pick


def _define(schema: str, fake: Callable[[Any], Any]) -> None:
    name = schema.split("(", 1)[0]
    library.define(schema)
    arguments = getattr(ops, name).default._schema.arguments
    calls[name] = type(name, (namedtuple(name, [a.name for a in arguments]), Call), {"__slots__": ()})
    torch.library.register_fake(
        add_op_namespace_prefix(name), lambda *given: fake(calls[name]._make(given)), lib=library
    )


def _product(call: Any) -> Tensor:
    return call.x.new_empty((*call.x.shape[:-1], call.weight.shape[-1 if call.transposed else -2]))


def _gradients(call: Any) -> Gradients:
    """Return empty d_x, d_weight, d_scores and d_bias; those not wanted have shape (0,)."""
    grad, weight = call.grad_output, call.weight
    wanted = (
        ((*grad.shape[:-1], weight.shape[-2 if call.transposed else -1]), grad.dtype),
        (weight.shape, weight.dtype),
        (weight.shape, torch.float32 if call.scores is None else call.scores.dtype),
        ((*weight.shape[:-2], grad.shape[-1]), grad.dtype),
    )
    empty = [
        grad.new_empty(shape, dtype=dtype) if wants else grad.new_empty(0)
        for wants, (shape, dtype) in zip(call.output_mask, wanted)
    ]
    return empty[0], empty[1], empty[2], empty[3]


def _words(scores: Tensor) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], (scores.shape[-1] + 31) // 32), dtype=torch.int32)


def _selection(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scores, words = call.scores, _words(call.scores)
    threshold = scores.new_empty(scores.shape[:1] if scores.dim() == 3 and call.threshold is None else ())
    signs = torch.empty_like(words) if call.with_signs else words.new_empty(0)
    return threshold, words, signs, words.new_empty((), dtype=torch.int64)


def _define_with_gradients(product: str, gradients: str) -> None:
    _define(f"{product} -> Tensor", _product)
    _define(f"{gradients} -> (Tensor, Tensor, Tensor, Tensor)", _gradients)


# ---------------------------------------------------------------------------------------------- one matrix

_define_with_gradients(
    "masked_linear(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Tensor? bias, str mode, str backend)",
    "masked_linear_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold, str mode, "
    "bool[4] output_mask, str backend)",
)
_define_with_gradients(
    "masked_linear_packed(Tensor x, Tensor weight, Tensor packed, Tensor? bias, str backend)",
    "masked_linear_packed_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor packed, Tensor? scores, "
    "Tensor? signs, str mode, bool[4] output_mask, str backend)",
)
_define_with_gradients(
    "masked_linear_by_ratio(Tensor x, Tensor weight, Tensor scores, Tensor? bias, float keep_ratio, float? threshold, "
    "str mode, str pattern, str backend)",
    "masked_linear_by_ratio_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, float keep_ratio, "
    "float? threshold, str mode, str pattern, bool[4] output_mask, str backend)",
)
_define(
    "masked_linear_many(Tensor x, Tensor weight, Tensor[] masks, Tensor tasks, Tensor? bias, str backend) -> Tensor",
    _product,
)
_define(
    "masked_linear_many_backward(Tensor grad_output, Tensor weight, Tensor[] masks, Tensor tasks, str backend) "
    "-> Tensor",
    lambda call: call.grad_output.new_empty((*call.grad_output.shape[:-1], call.weight.shape[1])),
)
_define(
    "accumulate_score_grad(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor? weight, Tensor? scores, "
    "Tensor? signs, str mask_mode, str backend) -> ()",
    lambda call: None,
)

# ---------------------------------------------------------------------------------------------- codes

_define(
    "masked_linear_quantized(Tensor x, Tensor codes, Tensor[] absmax, Tensor? packed, Tensor? bias, SymInt[] shape, "
    "str kind, str backend) -> Tensor",
    lambda call: call.x.new_empty((*call.x.shape[:-1], call.shape[0])),
)
_define(
    "masked_linear_quantized_d_x(Tensor grad_output, Tensor codes, Tensor[] absmax, Tensor? packed, SymInt[] shape, "
    "str kind, str backend) -> Tensor",
    lambda call: call.grad_output.new_empty((*call.grad_output.shape[:-1], call.shape[1])),
)
_define(
    "dequantize(Tensor codes, Tensor[] absmax, SymInt[] shape, str kind, ScalarType dtype, str backend) -> Tensor",
    lambda call: call.codes.new_empty(call.shape, dtype=call.dtype),
)

# ---------------------------------------------------------------------------------------------- experts

_define_with_gradients(
    "masked_linear_grouped(Tensor x, Tensor weight, Tensor scores, Tensor threshold, Tensor offsets, Tensor? bias, "
    "bool transposed, str mode, str backend)",
    "masked_linear_grouped_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, Tensor threshold, "
    "Tensor offsets, bool transposed, str mode, bool[4] output_mask, str backend)",
)
_define_with_gradients(
    "masked_linear_grouped_packed(Tensor x, Tensor weight, Tensor packed, Tensor offsets, Tensor? bias, "
    "bool transposed, str backend)",
    "masked_linear_grouped_packed_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor packed, Tensor? scores, "
    "Tensor? signs, Tensor offsets, bool transposed, str mode, bool[4] output_mask, str backend)",
)
_define_with_gradients(
    "masked_linear_grouped_by_ratio(Tensor x, Tensor weight, Tensor scores, Tensor offsets, Tensor? bias, "
    "float keep_ratio, float? threshold, bool transposed, str mode, str backend)",
    "masked_linear_grouped_by_ratio_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor scores, "
    "Tensor offsets, float keep_ratio, float? threshold, bool transposed, str mode, bool[4] output_mask, str backend)",
)
_define(
    "accumulate_score_grad_grouped(Tensor(a!) out, Tensor grad_output, Tensor x, Tensor offsets, Tensor? weight, "
    "Tensor? scores, Tensor? signs, bool transposed, str mask_mode, str backend) -> ()",
    lambda call: None,
)

# ---------------------------------------------------------------------------------------------- scores

_define(
    "kept_threshold(Tensor scores, float keep_ratio, str mode, str backend) -> Tensor",
    lambda call: call.scores.new_empty(()),
)
_define(
    "kept_thresholds(Tensor scores, float keep_ratio, str mode, str backend) -> Tensor",
    lambda call: call.scores.new_empty(call.scores.shape[:1]),
)
_define(
    "pack_mask(Tensor scores, Tensor threshold, str mode, str backend) -> Tensor",
    lambda call: _words(call.scores),
)
_define(
    "pack_signs(Tensor scores, str backend) -> (Tensor, Tensor)",
    lambda call: (_words(call.scores), call.scores.new_empty((), dtype=torch.int64)),
)
_define(
    "unpack_mask(Tensor packed, SymInt[] shape) -> Tensor",
    lambda call: call.packed.new_empty(call.shape, dtype=torch.bool),
)
_define(
    "select_mask(Tensor scores, float keep_ratio, float? threshold, str mode, bool with_signs, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _selection,
)


def _step(call: Any) -> tuple[Tensor, Tensor]:
    if call.keep_ratio is None:
        return call.scores.new_empty(0), call.scores.new_empty(0, dtype=torch.int32)
    return call.scores.new_empty(()), _words(call.scores)


for _name, _counted in (("score_step", "int step, float lr"), ("score_step_on_device", "Tensor step, Tensor lr")):
    _define(
        f"{_name}(Tensor(a!) scores, Tensor grad, Tensor? weight, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
        f"Tensor(d!)? scales, {_counted}, float beta1, float beta2, float eps, float weight_decay, "
        "Tensor? grad_scale, int seed, str mask_mode, float? keep_ratio, Tensor? threshold, str backend) "
        "-> (Tensor, Tensor)",
        _step,
    )
