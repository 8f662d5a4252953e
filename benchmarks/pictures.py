"""Draw every stored picture again, from the stored results: python -m benchmarks.pictures

Run it after a change of colours or titles.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mft_study.ablate import plot_ablation
from mft_study.report.pictures.by_bytes import plot_bytes
from mft_study.report.pictures.forgetting import plot_forgetting
from mft_study.report.pictures.plots import plot_summary
from mft_study.report.rewards import plot_rewards

from .board import picture
from .records import RESULTS, ROOT

Numbers = Mapping[str, Any]


def _ablation(what: str, numbers: Numbers, path: Path) -> None:
    plot_ablation(numbers, what, path)


def _masks_alone(numbers: Numbers, path: Path) -> None:
    """Draw the masks of a study next to their controls, without its other arms."""
    domains = {
        name: {**table, "rows": [row for row in table["rows"] if row["masked"]]}
        for name, table in numbers["domains"].items()
    }
    plot_summary({**numbers, "domains": domains}, path)


def _board(path: Path, *boards: str) -> None:
    picture({name: json.loads((RESULTS / f"compare-{name}.json").read_text(encoding="utf-8")) for name in boards}, path)


#: Picture in benchmarks/results: (the study whose numbers it shows, the function that draws it).
STUDIES: dict[str, tuple[str, Callable[[Numbers, Path], None]]] = {
    "ablation-data-small": ("ablation-data-small", partial(_ablation, "data")),
    "ablation-layers-small": ("ablation-layers-small", partial(_ablation, "layers")),
    "ablation-ratio-small": ("ablation-ratio-small", partial(_ablation, "ratio")),
    "bytes-all-layers-quantised": ("compare-all-layers-quantised", plot_bytes),
    "bytes-all-layers-smollm2": ("compare-all-layers-smollm2", plot_bytes),
    "bytes-headers": ("compare-bytes", plot_bytes),
    "bytes-quantised": ("compare-quantised", plot_bytes),
    "bytes-quantised-small": ("compare-quantised-small", plot_bytes),
    "bytes-smollm2": ("compare-from-base-smollm2", plot_bytes),
    "compare-small": ("compare-small", _masks_alone),
    "forgetting-bytes": ("compare-bytes", plot_forgetting),
    "forgetting-distillation-smollm2": ("compare-distillation-smollm2", plot_forgetting),
    "forgetting-small": ("compare-small", plot_forgetting),
    "rewards": ("compare-rewards", plot_rewards),
    "rewards-distillation-smollm2": ("compare-distillation-smollm2", plot_rewards),
    "rewards-smollm2": ("compare-rewards-smollm2", plot_rewards),
}


def main() -> None:
    """Draw all pictures, and print the path of each."""
    for name, (study, draw) in STUDIES.items():
        numbers = json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))
        draw(numbers, RESULTS / f"{name}.png")
        print(RESULTS / f"{name}.png")
    _board(ROOT / "docs" / "images" / "board.png", "board-small", "board-smollm2")
    _board(ROOT / "docs" / "images" / "board-smollm2.png", "board-smollm2")


if __name__ == "__main__":
    main()
