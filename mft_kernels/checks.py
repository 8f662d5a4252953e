"""What the public functions refuse, checked once at the door: argument, rule, value received, remedy."""

import torch
from torch import Tensor

MODES = ("magnitude", "value")
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class NonFiniteScores(ValueError):
    """Scores hold NaN or Inf, so that no threshold exists; ``module`` is the module's name where it is known."""

    def __init__(self, scores: Tensor, module: str = "") -> None:
        bad = int((~scores.isfinite()).sum())
        where = f"of module {module!r} " if module else ""
        super().__init__(
            f"scores {where}must be finite, got {bad} NaN or Inf among {tuple(scores.shape)}; "
            "lower the learning rate, or look for a non-finite loss before this step"
        )


def check_keep_ratio(keep_ratio: float) -> None:
    """Raise unless keep_ratio is a number in [0, 1] (NaN is not)."""
    if not isinstance(keep_ratio, int | float) or isinstance(keep_ratio, bool):
        raise TypeError(f"keep_ratio must be a number, got {type(keep_ratio).__name__}")
    if not 0 <= keep_ratio <= 1:
        raise ValueError(f"keep_ratio must lie in [0, 1] (the share of the weights that is kept), got {keep_ratio}")


def check_scores(scores: Tensor, weight: Tensor) -> None:
    """Raise unless scores match weight's shape and device and are of a floating dtype."""
    check_floating("scores", scores)
    if scores.shape != weight.shape:
        raise ValueError(f"scores must match weight {tuple(weight.shape)}, got {tuple(scores.shape)}")
    check_device("scores", scores, "weight", weight)


def check_threshold(threshold: Tensor, scores: Tensor) -> None:
    """Raise unless threshold is one for the matrix, (), or one for each row of scores, (N,)."""
    if threshold.dim() != 0 and threshold.shape != scores.shape[:1]:
        raise ValueError(
            f"threshold must be () or one a row {tuple(scores.shape[:1])}, got shape {tuple(threshold.shape)}; "
            "see kept_threshold"
        )
    check_device("threshold", threshold, "scores", scores)


def check_packed(name: str, packed: Tensor, shape: tuple[int, int] | torch.Size) -> None:
    """Raise unless ``packed`` holds the bits of an (N, K) mask."""
    words = (shape[0], -(-shape[1] // 32))
    if packed.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {packed.dtype}")
    if tuple(packed.shape) != words:
        raise ValueError(f"{name} must be {words}, 1 bit a weight of {tuple(shape)}, got {tuple(packed.shape)}")


def check_mode(mode: str) -> None:
    """Raise unless mode is "magnitude" or "value"."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless x (..., K), weight (N, K) and bias (N,) fit each other as in nn.Linear."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must end in in_features = {weight.shape[1]} of weight {tuple(weight.shape)}, got shape {tuple(x.shape)}"
        )
    check_device("x", x, "weight", weight)
    check_floating("x", x)
    autocast = torch.is_autocast_enabled(x.device.type)  # which brings the dtypes together
    if x.dtype != weight.dtype and not autocast:
        raise TypeError(f"x must have weight's dtype {weight.dtype}, got {x.dtype}; convert x or use torch.autocast")
    if bias is not None:
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
        check_device("bias", bias, "weight", weight)
        if bias.dtype != weight.dtype and not autocast:
            raise TypeError(f"bias must have weight's dtype {weight.dtype}, got {bias.dtype}")


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor's dtype is a floating one that the ops know."""
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}")
