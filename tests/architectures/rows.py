"""The sweeps' results, one row per architecture in results.csv: the sweeps write it, and the site's page reads it."""

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
    """The result for one architecture; if converted, what was masked and what was left out."""

    kind: str
    state: str
    words: str
    left: str = ""
    transformers: str = transformers.__version__


#: By name of the sweep, then by model type.
Rows = Mapping[str, Mapping[str, Row]]


def read(path: Path = RESULTS) -> dict[str, dict[str, Row]]:
    """Return the rows on disk."""
    rows: dict[str, dict[str, Row]] = {}
    with path.open(newline="") as file:
        for fields in csv.DictReader(file):
            sweep = fields.pop("sweep")
            rows.setdefault(sweep, {})[fields["kind"]] = Row(**fields)
    return rows


def write(rows: Rows, path: Path = RESULTS) -> None:
    """Write one sweep after another, each sorted by model type."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["sweep", *Row.__dataclass_fields__], lineterminator="\n")
        writer.writeheader()
        for sweep, kinds in rows.items():
            writer.writerows({"sweep": sweep} | asdict(row) for _, row in sorted(kinds.items()))
