"""What the sweeps found, a row an architecture in results.csv: written by them, and read to make the site's page."""

import csv
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import transformers

RESULTS = Path(__file__).with_name("results.csv")
STATES = ("converted", "wrong", "refused", "not made")
UNTRAINED = "not trained by the recipe: "


@dataclass
class Row:
    """What became of one architecture; of a converted one what was masked, and what of its layers was left out."""

    kind: str
    state: str
    words: str
    left: str = ""
    transformers: str = transformers.__version__


#: By the name of the sweep, then by model type.
Rows = Mapping[str, Mapping[str, Row]]


def read(path: Path = RESULTS) -> dict[str, dict[str, Row]]:
    """Those on disk."""
    rows: dict[str, dict[str, Row]] = {}
    with path.open(newline="") as file:
        for fields in csv.DictReader(file):
            sweep = fields.pop("sweep")
            rows.setdefault(sweep, {})[fields["kind"]] = Row(**fields)
    return rows


def write(rows: Rows, path: Path = RESULTS) -> None:
    """A sweep after the other, each by model type."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sweep", *Row.__dataclass_fields__], lineterminator="\n")
        writer.writeheader()
        for sweep, kinds in rows.items():
            writer.writerows({"sweep": sweep} | asdict(row) for _, row in sorted(kinds.items()))
