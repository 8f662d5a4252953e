"""The boards' page in pieces: a table for each budget, and a picture of loss over bytes, from table.json of studies.

    python -m benchmarks.board RESULT.json [RESULT.json ...] [--picture docs/board.png]

A budget is that of masks of about as many bytes. Its table has every arm that stores from half to 1.25 times as many,
and the bounds that store none or all. Differences from the mask in bold, which had the most seeds, as validation liked
it best, are those of the report, paired by seed and document. Others are differences of means.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.study.report.pictures.by_bytes import plot_bytes

from .tables import markdown

LEAST, MOST = 0.5, 1.25  # times a mask's bytes
_SAME = 1.05  # times the bytes of another mask of its budget, at most
_HEADER = [
    "arm",
    "bytes",
    "resident",
    "loss",
    "less the mask's",
    "other text",
    "KL",
    "exact",
    "MB in training",
]


def board(name: str, numbers: Mapping[str, Any]) -> str:
    """Of one study: by domain, a table for each budget, the smallest first."""
    parts = []
    for domain, table in numbers["domains"].items():
        for mask in _masks(table):
            title = f"### {name}, {domain}: about {mask['bytes']:,.0f} bytes"
            parts += [title, markdown(_HEADER, [_cells(table, mask, row) for row in _of_budget(table, mask)])]
    return "\n\n".join(parts)


def picture(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A row for each domain of each study."""
    rows = {f"{name}, {domain}": table for name, of in results.items() for domain, table in of["domains"].items()}
    plot_bytes({"domains": rows}, path)


def _masks(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Of each budget the trained mask that had the most seeds."""
    found: list[Mapping[str, Any]] = []
    masks = [row for row in table["rows"] if row["kind"] == "mask" and row["bytes"] is not None]
    for mask in sorted(masks, key=lambda row: row["bytes"]):
        if found and mask["bytes"] <= _SAME * found[-1]["bytes"]:
            found[-1] = max(found[-1], mask, key=lambda row: row.get("seeds", 0))
        else:
            found.append(mask)
    return found


def _of_budget(table: Mapping[str, Any], mask: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The best first."""
    for row in sorted(table["rows"], key=lambda row: row["loss"]):
        bound = row["kind"] in ("base", "full")
        if bound or (row["bytes"] is not None and LEAST <= row["bytes"] / mask["bytes"] <= MOST):
            yield row


def _cells(table: Mapping[str, Any], mask: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    text = next(iter(row["general"].values()), None)
    return [
        f"**{row['arm']}**" if row is mask else row["arm"],
        _count(row["bytes"]),
        _count(row.get("resident")),
        f"{row['loss']:.4f}",
        _less_the_mask(table, mask, row),
        "-" if text is None or text["minus_start"] is None else f"{text['minus_start']['estimate']:+.4f}",
        "-" if text is None or text["kl"] is None else f"{text['kl']:.4f}",
        "-" if row["exact"] is None else f"{100 * row['exact']:.0f} %",
        "-" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}",
    ]


def _less_the_mask(table: Mapping[str, Any], mask: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """With its interval; * where p stays below 0.05 after Holm's correction over all the study's comparisons."""
    for one in table["comparisons"]:
        if (one["arm"], one["rival"]) == (mask["arm"], row["arm"]):
            found = one["domain"]["difference"]
            low, high = -found["high"], -found["low"]
            star = " *" if found["p_holm"] is not None and found["p_holm"] < 0.05 else ""
            return f"{-found['estimate']:+.4f} [{low:+.4f}, {high:+.4f}]{star}"
    return "-" if row is mask else f"{row['loss'] - mask['loss']:+.4f}"


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args(given)
    results = {
        path.stem.removeprefix("compare-"): json.loads(path.read_text(encoding="utf-8")) for path in asked.results
    }
    print("\n\n".join(board(name, numbers) for name, numbers in results.items()))
    if asked.picture is not None:
        picture(results, asked.picture)


if __name__ == "__main__":
    main()
