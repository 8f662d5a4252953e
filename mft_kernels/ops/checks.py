"""Argument checks of the public functions. A message names the argument, the rule, the value received and a remedy."""

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch  # no public function tells whether torch.func tracks a tensor
from torch.autograd import forward_ad

from ..operands import MODES, PATTERNS

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPPED = (torch.float32, torch.bfloat16, torch.int16)  # dtypes of scores that an optimiser step takes
OLDEST_TORCH = (2, 11)
BLOCK = 256  # elements of 8-bit moments that share a scale
_SHOWN = 3  # experts that a message lists


class NonFiniteScores(ValueError):
    """Scores hold NaN or Inf, so no threshold exists. ``module`` is the module's name, if known."""

    def __init__(self, scores: Tensor, module: str = "") -> None:
        finite = scores.isfinite()
        where = f"of module {module!r} " if module else ""
        among = f"among {tuple(scores.shape)}"
        if scores.dim() == 3:
            experts = (~finite.flatten(1).all(1)).nonzero().flatten().tolist()
            more = ", ..." if len(experts) > _SHOWN else ""
            among += f", in expert {', '.join(map(str, experts[:_SHOWN]))}{more}"
        super().__init__(
            f"scores {where}must be finite, got {int((~finite).sum())} NaN or Inf {among}; "
            "lower the learning rate, or look for NaN or Inf in the weight, and in the gradients of the step before"
        )


def check_keep_ratio(keep_ratio: float) -> None:
    """Raise unless keep_ratio is a number in [0, 1] (NaN is not)."""
    check_number("keep_ratio", keep_ratio)
    if not 0 <= keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in [0, 1] (the share of the weights that is kept), got {keep_ratio}")


def check_pattern(
    pattern: str, keep_ratio: float, threshold: float | None, shape: tuple[int, ...] | torch.Size, module: str = ""
) -> None:
    """Raise unless weights of ``shape`` can be selected in this pattern by this rule."""
    of = f" of module {module!r}" if module else ""
    where = f"pattern{of}"
    if pattern not in PATTERNS:
        raise ValueError(f"{where} must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    if pattern == "matrix":
        return
    if threshold is not None:
        raise ValueError(
            f"{where} must be matrix with a threshold, got {pattern} and threshold {threshold}: a pattern keeps a "
            "share of each group; set threshold to None, and keep_ratio"
        )
    if len(shape) != 2:
        raise ValueError(
            f"{where} must be matrix for experts in one parameter, got {pattern} for a weight of {tuple(shape)}: "
            "leave pattern out, or mask other layers"
        )
    if pattern == "row":
        return
    size = int(pattern.partition(":")[2])
    if keep_ratio != 0.5:
        raise ValueError(
            f"keep_ratio{of} must be 0.5 with pattern {pattern}, got {keep_ratio}: set it to 0.5, or pattern to row"
        )
    if shape[-1] % size:
        raise ValueError(
            f"{where} must be row or matrix if in_features is no multiple of {size}, got {pattern} for a weight of "
            f"{tuple(shape)}: choose row, or mask other layers"
        )


def check_alpha(alpha: float) -> None:
    """Raise unless alpha is a number in (0, 1] (NaN is not)."""
    check_number("alpha", alpha)
    if not 0 < alpha <= 1:
        raise ValueError(
            "alpha must lie in (0, 1] (the strength of the mask: dropped weights are scaled by 1 - alpha), got "
            f"{alpha}: 1 applies the mask in full, and 0 would change nothing"
        )


def check_scores(scores: Tensor, weight: Tensor) -> None:
    """Raise unless scores match weight's shape and device and are of a floating dtype."""
    check_tensor("scores", scores)
    check_floating("scores", scores)
    if scores.shape != weight.shape:
        raise ValueError(f"scores must match weight {tuple(weight.shape)}, got {tuple(scores.shape)}")
    check_device("scores", scores, "weight", weight)


def check_whole(name: str, tensor: Tensor) -> None:
    """Raise if tensor is a DTensor: a process holds only a part, and a part has a different threshold."""
    if hasattr(tensor, "full_tensor"):  # torch.distributed.tensor takes long to import
        raise ValueError(
            f"{name} must be a plain tensor, got a DTensor of shape {tuple(tensor.shape)} spread over processes: "
            f"unshard() its module on every process first (mft.gathered(model) does), or take {name}.full_tensor()"
        )


def check_threshold(threshold: Tensor, scores: Tensor) -> None:
    """Raise unless threshold is (), one per row of scores (N, K), or one per expert of scores (E, N, K)."""
    check_tensor("threshold", threshold)
    if threshold.dim() != 0 and threshold.shape != scores.shape[:1]:
        each, see = ("per expert", "kept_thresholds") if scores.dim() == 3 else ("per row", "kept_threshold")
        raise ValueError(
            f"threshold must be () or one {each} {tuple(scores.shape[:1])}, got shape {tuple(threshold.shape)}; "
            f"see {see}"
        )
    check_device("threshold", threshold, "scores", scores)


def check_fixed_threshold(threshold: float | None) -> None:
    """Raise unless threshold is None or a number other than NaN."""
    if threshold is None:
        return
    check_number("threshold", threshold)
    if threshold != threshold:
        raise ValueError("threshold must be a number or None, got nan, which keeps nothing; use keep_ratio=0 for that")


def check_packed(name: str, packed: Tensor, shape: tuple[int, ...] | torch.Size) -> None:
    """Raise unless ``packed`` has the dtype and shape of a packed mask for ``shape``, (N, K) or (E, N, K)."""
    words = (*shape[:-1], -(-shape[-1] // 32))
    check_tensor(name, packed)
    if packed.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {packed.dtype}")
    if tuple(packed.shape) != words:
        raise ValueError(f"{name} must be {words}, 1 bit per weight of {tuple(shape)}, got {tuple(packed.shape)}")


def check_shape(shape: tuple[int, ...] | torch.Size, *, experts: bool = False) -> None:
    """Raise unless shape is (N, K), or (E, N, K) if experts is True."""
    rule = "(N, K), or (E, N, K) for experts" if experts else "(N, K)"
    try:
        dimensions = len(torch.Size(shape))
    except TypeError:
        raise TypeError(f"shape must be {rule}, in integers, got {shape!r}") from None
    if dimensions != 2 and not (experts and dimensions == 3):
        raise ValueError(f"shape must be {rule}, got {tuple(shape)}")


def check_factors(call: Any) -> None:
    """Raise unless a call of accumulate_score_grad has the scores or signs that it needs, and they fit weight."""
    weight, scores, signs = call.weight, call.scores, call.signs
    if weight is None:
        if scores is not None or signs is not None:
            given = "scores" if scores is not None else "signs"
            raise ValueError(
                f"{given} must be None if weight is None (score_step applies sign and weight), got a tensor"
            )
        return
    if call.mask_mode == "magnitude" and scores is None and signs is None:
        raise ValueError('mode "magnitude" needs scores or signs, got neither')
    if scores is not None:
        check_scores(scores, weight)
    if signs is not None:
        check_packed("signs", signs, weight.shape)
        check_device("signs", signs, "weight", weight)


def check_mode(mode: str) -> None:
    """Raise unless mode is "magnitude" or "value"."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")


def check_linear(call: Any) -> Any:
    """Return the call. Raises: unless x (..., K), weight (N, K) and bias (N,) fit each other as in nn.Linear."""
    x, weight, bias = call.x, call.weight, call.bias
    check_tensor("x", x)
    check_tensor("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must end in in_features = {weight.shape[1]} of weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    check_multiplied(x, weight)
    check_bias(bias, x, (weight.shape[0],))
    return call


def check_multiplied(x: Tensor, weight: Tensor) -> None:
    """Raise unless x and weight are on one device and have one floating dtype, or autocast will give them one."""
    check_device("x", x, "weight", weight)
    check_floating("x", x)
    if x.dtype != weight.dtype:
        check_floating("weight", weight)
        if not autocasts(x):
            raise TypeError(
                f"x must have weight's dtype {weight.dtype}, got {x.dtype}; convert x or use torch.autocast"
            )


def check_bias(bias: Tensor | None, x: Tensor, shape: tuple[int, ...], meaning: str = "") -> None:
    """Raise unless bias is None, or has this shape and x's dtype and device."""
    if bias is None:
        return
    check_tensor("bias", bias)
    if bias.shape != shape:
        raise ValueError(f"bias must be {meaning}{shape}, got {tuple(bias.shape)}")
    check_device("bias", bias, "x", x)
    if bias.dtype != x.dtype and not autocasts(x):
        raise TypeError(f"bias must have x's dtype {x.dtype}, got {bias.dtype}; convert it with bias.to(x.dtype)")


def autocasts(x: Tensor) -> bool:
    """Return whether torch.autocast will cast the operands to one dtype; False on meta, which cannot be asked."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_product(call: Any, layout: str = "(N, K)", *, transposed: bool = False) -> None:
    """Raise unless grad_output (..., N), x (..., K) and out fit each other for out += grad_output.T @ x.

    layout: of out; for experts "(E, N, K)", or "(E, K, N)" if transposed. Their tokens are (T, N) and (T, K).
    """
    out, grad_output, x = call.out, call.grad_output, call.x
    for name, tensor in (("out", out), ("grad_output", grad_output), ("x", x)):
        check_tensor(name, tensor)
    if out.dim() != layout.count(",") + 1 or not out.is_contiguous():
        raise ValueError(f"out must be contiguous and {layout}, got shape {tuple(out.shape)}, strides {out.stride()}")
    check_floating("out", out)
    check_floating("x", x)
    n, k = out.shape[-2:] if not transposed else out.shape[:-3:-1]
    experts = out.dim() == 3
    if x.dim() == 0 or x.shape[-1] != k or (experts and x.dim() != 2):
        rule = f"be (rows, {k}) for" if experts else f"end in K = {k} of"
        raise ValueError(f"x must {rule} out {tuple(out.shape)}, got shape {tuple(x.shape)}")
    expected = (*x.shape[:-1], n)
    if grad_output.shape != expected:
        raise ValueError(f"grad_output must be {expected}, got {tuple(grad_output.shape)}")
    if grad_output.dtype != x.dtype:
        raise TypeError(f"grad_output must have x's dtype {x.dtype}, got {grad_output.dtype}; convert one of them")
    check_device("x", x, "out", out)
    check_device("grad_output", grad_output, "out", out)


def check_tensor(name: str, value: Tensor) -> None:
    """Raise unless value is a dense tensor: kernels read its memory by strides."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; use torch.as_tensor({name})")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {value.layout}; use {name}.to_dense()")


def check_transforms(op: str, *tensors: Tensor | None, in_place: bool = False) -> None:
    """Raise if torch.func or forward mode tracks a tensor. The ops do not support them, so a jvp would be zero.

    in_place: also raise if torch.vmap has batched a tensor. Other ops make one call per slice under vmap.
    """
    if torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        return
    for tensor in tensors:
        inner = tensor
        while inner is not None and functorch.is_batchedtensor(inner):
            inner = functorch.get_unwrapped(inner)
        if inner is not tensor and in_place:
            raise RuntimeError(
                f"{op} must not be called under torch.vmap, as it writes in place, got a batched tensor: call it for "
                "one matrix after the other"
            )
        if inner is not None and (
            functorch.is_gradtrackingtensor(inner) or forward_ad.unpack_dual(inner).tangent is not None
        ):
            raise RuntimeError(
                f"{op} must be differentiated by backward() or torch.autograd.grad, got a tensor that torch.func or "
                "forward mode tracks: call backward(), once per sample if each needs its own gradient"
            )


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor's dtype is one of FLOATING."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}")


def check_step_inputs(
    scores: Tensor, grad: Tensor, weight: Tensor | None, grad_scale: Tensor | None, threshold: Tensor | None
) -> None:
    """Raise unless these arguments of score_step have valid dtypes, shapes and devices."""
    check_tensor("scores", scores)
    check_stepped("scores", scores)
    if scores.dim() != 2 or not scores.is_contiguous():
        raise ValueError(f"scores must be (N, K) and contiguous, got {tuple(scores.shape)}, strides {scores.stride()}")
    check_tensor("grad", grad)
    for name, tensor in (("grad", grad), ("weight", weight)):
        if tensor is None:
            continue
        check_tensor(name, tensor)
        if tensor.dtype not in FLOATING[:3]:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.shape != scores.shape:
            raise ValueError(f"{name} must match scores {tuple(scores.shape)}, got {tuple(tensor.shape)}")
        check_device(name, tensor, "scores", scores)
    for name, scalar, dtype in (("grad_scale", grad_scale, torch.float32), ("threshold", threshold, scores.dtype)):
        if scalar is None:
            continue
        check_tensor(name, scalar)
        if scalar.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {scalar.dtype}")
        if scalar.dim() != 0:
            raise ValueError(f"{name} must be a scalar (), got {tuple(scalar.shape)}")
        check_device(name, scalar, "scores", scores)


def check_stepped(name: str, scores: Tensor) -> None:
    """Raise unless the scores' dtype is one that an optimiser step takes."""
    if scores.dtype not in STEPPED:
        raise TypeError(
            f"{name} must be float32, bfloat16 (rounded stochastically) or int16 (fixed point), got {scores.dtype}"
        )


def check_moments(scores: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, scales: Tensor | None) -> None:
    """Raise unless the moments fit the scores and one of the two schemes."""
    dtype, scheme = (torch.float32, "without scales") if scales is None else (torch.uint8, "with scales")
    for name, tensor in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_tensor(name, tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} {scheme}, got {tensor.dtype}")
        if tensor.shape != scores.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous and match scores {tuple(scores.shape)}, got {tuple(tensor.shape)}"
            )
        check_device(name, tensor, "scores", scores)
    if scales is None:
        return
    check_tensor("scales", scales)
    if scales.dtype != torch.float32:
        raise TypeError(f"scales must be float32, got {scales.dtype}")
    expected = (2, -(-scores.numel() // BLOCK))
    if tuple(scales.shape) != expected or not scales.is_contiguous():
        raise ValueError(f"scales must be contiguous {expected}, one per block of {BLOCK}, got {tuple(scales.shape)}")
    check_device("scales", scales, "scores", scores)


def check_adam(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Raise unless these are valid settings of AdamW."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        check_number(name, value)
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    for name, beta in zip(("betas[0]", "betas[1]"), check_betas(betas)):
        check_number(name, beta)
        if not 0 <= beta < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {beta}")


def check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    """Return betas. Raise unless there are two of them."""
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas must be a pair, got {betas!r}")
    if len(betas) != 2:
        raise ValueError(f"betas must be a pair, got {betas!r}")
    return betas


def check_number(name: str, value: float) -> None:
    """Raise unless value is an int or a float. A tensor would have to be read from its device at every step."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}; use float({name})")


def check_scores_dtype(dtype: torch.dtype) -> None:
    """Raise unless a layer can initialise and select scores of this dtype."""
    if dtype not in (*FLOATING, torch.int16):
        raise TypeError(f"scores_dtype must be float32, bfloat16, float16, float64 or int16 (fixed point), got {dtype}")


def check_torch() -> None:
    """Raise unless torch is recent enough for the ops and the compiled libraries."""
    version, oldest = torch.__version__, ".".join(map(str, OLDEST_TORCH))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise ImportError(f"mft_kernels needs torch {oldest} or newer, got {version}; pip install 'torch>={oldest}'")
