"""Pictures as PNG files, each whole or absent."""

from pathlib import Path
from typing import TYPE_CHECKING

from mft.files.atomic import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches, which needs no display."""
    from matplotlib.figure import Figure  # matplotlib takes half a second: only who draws waits for it

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, *, dpi: int = 120) -> None:
    """Write it as a PNG file."""
    with atomic_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=dpi)
