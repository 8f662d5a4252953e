"""Pictures as PNG files, each written whole or not at all, and their colours: one per method."""

from pathlib import Path
from typing import TYPE_CHECKING

from mft.files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which colour-blind readers can tell apart, and a few more.
COLOURS = {
    "base": "0.6",
    "full fine-tune": "0.25",
    "continued": "#a6761d",
    "control": "#e69f00",
    "mask": "#c1121f",
    "one-shot mask": "0.5",
    "LoRA": "#0072b2",
    "rsLoRA": "#56b4e9",
    "DoRA": "#009e73",
    "SHiRA": "#8c564b",
    "norm gains": "#7f7f00",
    "in codes": "#66a5ad",
    "coded": "#d55e00",
    "bitdelta": "#1b9e77",
    "ternary": "#7a5195",
    "sparse delta": "#bc8f6f",
}

# How far, and towards black or white, for each arm after the first.
_TOWARDS = ((0.0, 0.0), (0.45, 1.0), (0.4, 0.0), (0.7, 1.0), (0.2, 0.0), (0.25, 1.0), (0.65, 0.0), (0.58, 1.0))


def new_figure(width: float, height: float) -> "Figure":
    """Return a figure of width x height inches that needs no display."""
    from matplotlib.figure import Figure  # imported here because matplotlib takes half a second

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, *, dpi: int = 120) -> None:
    """Write the figure as a PNG file."""
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=dpi)


def shade(colour: str, number: int) -> str:
    """Return the colour for the n-th arm of a method: the method's own colour first, then lighter and darker ones."""
    from matplotlib.colors import to_hex, to_rgb  # imported here because matplotlib takes half a second

    share, end = _TOWARDS[number % len(_TOWARDS)]
    red, green, blue = ((1 - share) * part + share * end for part in to_rgb(colour))
    return to_hex((red, green, blue))
