"""Place names next to points, each where it covers no other name and no point."""

from collections.abc import Sequence
from typing import Any

_OFFSETS = (
    (7, 4),
    (7, -11),
    (-7, 4),
    (-7, -11),
    (7, 16),
    (7, -23),
    (-7, 16),
    (-7, -23),
    (7, 28),
    (-7, 28),
)  # in points
Label = tuple[float, float, str, str]  # x, y, words, colour


def place_labels(
    axes: Any, labels: Sequence[Label], *, size: str = "x-small", others: Sequence[tuple[float, float]] = ()
) -> None:
    """Write each label where it covers least, others too. The figure must have been laid out."""
    points = [tuple(axes.transData.transform(at)) for at in [*((x, y) for x, y, _, _ in labels), *others]]
    taken: list[Any] = []
    for x, y, words, colour in labels:
        note = axes.annotate(words, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=size, color=colour)

        def covered(offset: tuple[int, int], note: Any = note) -> float:
            note.set_position(offset)
            note.set_horizontalalignment("left" if offset[0] > 0 else "right")
            box = note.get_window_extent()
            names = sum(box.overlaps(other) for other in taken)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            return 2 * names + sum(box.contains(*point) for point in points) + 2 * (not inside)

        covered(min(_OFFSETS, key=covered))
        taken.append(note.get_window_extent())
