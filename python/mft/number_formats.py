"""The number formats that a configuration can name: the bytes of each, and what it rules out."""

from collections.abc import Mapping
from dataclasses import dataclass

AUTO = "auto"  # for scores and moments: in a run, the widest that fits; where nothing chooses, float32
DTYPE_BYTES = {"bfloat16": 2, "float32": 4, "float16": 2}  # for weights and gradients


@dataclass(frozen=True)
class ScoreFormat:
    """A format of scores. has_gradient: whether autograd reaches the scores; if not, only MaskAdamW can train them."""

    bytes: int
    has_gradient: bool = True


@dataclass(frozen=True)
class MomentsFormat:
    """A format of the optimiser's moments. bytes: of a score's two moments together. name: MaskAdamW's name for it."""

    bytes: float
    name: str


SCORE_FORMATS = {
    "float32": ScoreFormat(4),
    "bfloat16": ScoreFormat(2),
    "int16": ScoreFormat(2, has_gradient=False),  # fixed point, see mft_kernels/reference/fixed_point.py
}
MOMENT_FORMATS = {
    "float32": MomentsFormat(8, "fp32"),
    "8bit": MomentsFormat(2 + 2 * 4 / 256, "8bit"),  # one fp32 scale for each 256 values
}
CODED_FORMATS = ("bf16", "int8", "nf4", "int4")  # of a study's coded arms; mft_study/number_codes.py has them


def unless_auto(name: str) -> str:
    """Return the format of scores or moments, with float32 for auto."""
    return "float32" if name == AUTO else name


def state_bytes(scores: str, moments: str) -> float:
    """Return the bytes of a score with its moments between steps."""
    return SCORE_FORMATS[scores].bytes + MOMENT_FORMATS[moments].bytes


def formats_no_wider(name: str, formats: Mapping[str, ScoreFormat] | Mapping[str, MomentsFormat]) -> list[str]:
    """Return the name of this format, and the names of those with fewer bytes."""
    return [one for one, format in formats.items() if one == name or format.bytes < formats[name].bytes]
