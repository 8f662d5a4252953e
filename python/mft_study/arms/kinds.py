"""The one registry of kinds of arms."""

from collections.abc import Mapping
from typing import Any

from mft.checks import check_one_of
from mft.config import IMPORTANCE_METHODS
from mft_study.arms.adapters import Lora, Peft
from mft_study.arms.arm import Arm
from mft_study.arms.coded import Coded
from mft_study.arms.compensated import Rounded, SparseGpt
from mft_study.arms.compressed import BitDelta, SparseDelta, Ternary
from mft_study.arms.full import Base, Continued, Control, Full, KeptWeights
from mft_study.arms.masked_lora import MaskedLora
from mft_study.arms.masks import Mask, OneShot
from mft_study.arms.means import Average, Interpolated
from mft_study.arms.quantized import InCodes, Quantized
from mft_study.arms.temperature import Temperature

KINDS: dict[str, type[Arm]] = {
    "base": Base,
    "full": Full,
    "continued": Continued,
    "control": Control,
    "kept_weights": KeptWeights,
    "lora": Lora,
    "masked_lora": MaskedLora,
    "peft": Peft,
    "mask": Mask,
    **dict.fromkeys(IMPORTANCE_METHODS, OneShot),  # random, magnitude, magnitude_rows, wanda, gradient, fisher
    "sparsegpt": SparseGpt,
    "temperature": Temperature,
    "quantized": Quantized,
    "rounded": Rounded,
    "average": Average,
    "interpolated": Interpolated,
    "bitdelta": BitDelta,
    "ternary": Ternary,
    "sparse_delta": SparseDelta,
    "coded": Coded,
    "in_codes": InCodes,
}


def class_of(values: Mapping[str, Any]) -> type[Arm]:
    """Return the class of an arm from its keys; Arm if kind is missing. Raises: ValueError for an unknown kind."""
    kind = values.get("kind")
    if not isinstance(kind, str):
        return Arm
    check_one_of("kind", kind, tuple(KINDS))
    return KINDS[kind]


def name_of(kind: type[Arm]) -> str:
    """Return the name of a kind in a study's file; for kinds with a single name."""
    return next(name for name, cls in KINDS.items() if cls is kind)


def make_arm(kind: str, **keys: Any) -> Arm:
    """Return an arm of this kind. Raises: ValueError that names the key."""
    return class_of({"kind": kind})(kind, **keys)
