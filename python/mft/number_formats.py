"""What numbers are held in, by the names that a configuration gives: the bytes of each, and what it rules out."""

from collections.abc import Mapping
from dataclasses import dataclass

AUTO = "auto"  # of scores and moments: the widest that fit, of a run; where nothing chooses, float32
DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float16": 2}  # of weights and gradients


@dataclass(frozen=True)
class ScoreFormat:
    """has_gradient: whether autograd reaches the scores; else MaskAdamW alone trains them."""

    bytes: int
    has_gradient: bool = True


@dataclass(frozen=True)
class MomentsFormat:
    """bytes: of the two of a score. name: as MaskAdamW calls it."""

    bytes: float
    name: str


@dataclass(frozen=True)
class QuantizedFormat:
    """Of a base's weights; models/codes/weight.py encodes and decodes them."""

    bytes_a_weight: float
    bytes_a_row: int = 0

    def bytes(self, rows: int, columns: int) -> int:
        return int(rows * columns * self.bytes_a_weight) + rows * self.bytes_a_row


SCORE_FORMATS = {
    "float32": ScoreFormat(4),
    "bfloat16": ScoreFormat(2),
    "int16": ScoreFormat(2, has_gradient=False),  # fixed point, see mft_kernels/reference/fixed_point.py
}
MOMENT_FORMATS = {
    "float32": MomentsFormat(8, "fp32"),
    "8bit": MomentsFormat(2 + 2 * 4 / 256, "8bit"),  # an fp32 scale for each 256
}
QUANTIZED_FORMATS = {
    "nf4": QuantizedFormat(0.5 + 4 / 64),  # an fp32 scale for each 64
    "nf4-dq": QuantizedFormat(0.5 + (1 + 4 / 256) / 64),  # double quantisation: a byte for that, and an fp32 for 256
    "int8": QuantizedFormat(1, bytes_a_row=4),
}


def unless_auto(name: str) -> str:
    """The format of scores or moments where nothing has chosen one."""
    return "float32" if name == AUTO else name


def state_bytes(scores: str, moments: str) -> float:
    """A score with its moments, at rest."""
    return SCORE_FORMATS[scores].bytes + MOMENT_FORMATS[moments].bytes


def at_most_as_wide(name: str, formats: Mapping[str, ScoreFormat] | Mapping[str, MomentsFormat]) -> list[str]:
    """That format, and those of fewer bytes."""
    return [one for one, format in formats.items() if one == name or format.bytes < formats[name].bytes]
