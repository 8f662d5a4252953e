"""The boards' page in pieces: a table for each budget, and a picture of loss over bytes, from table.json of studies.

    python -m benchmarks.board RESULT.json [RESULT.json ...] [--picture docs/images/board.png]
    python -m benchmarks.board RESULT.json --equal-bytes  # only each mask and its best rivals, with p

Each table belongs to one budget: the masks of about as many bytes. It lists every arm that stores 0.5 to 1.25 times as
many bytes, the base and the full fine-tune. The mask in bold ran with the most seeds, because it was the best on
validation. Differences from it with an interval are those of the report. Others are differences of means.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.files.figure import COLOURS, new_figure, save_figure, shade
from mft.study.report.at_equal_bytes import UNDECIDED
from mft.study.report.statistics import Difference
from mft.study.report.verdict import shown_interval, shown_p

from .tables import markdown

LEAST, MOST = 0.5, 1.25  # times a mask's bytes
_SAME = 1.05  # times the bytes of another mask of its budget, at most
_FEW_BITS = " in few bits"
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
    """Return the tables of one study: for each domain one table per budget, the smallest budget first."""
    parts = []
    for domain, table in numbers["domains"].items():
        for mask in _masks(table):
            title = f"### {name}, {domain}: about {mask['bytes']:,.0f} bytes"
            parts += [title, markdown(_HEADER, [_cells(table, mask, row) for row in _of_budget(table, mask)])]
    return "\n\n".join(parts)


def equal_bytes(numbers: Mapping[str, Any]) -> str:
    """Return the stored comparisons of each mask with its best rivals of no more, and of about as many bytes."""
    header = ["the mask's bytes", "rival", "its bytes", "mask less rival", "p", "the mask is"]
    rows = []
    for one in numbers.get("at_equal_bytes", []):
        if one["rival"] is None:
            continue
        found = Difference(**one["difference"])
        shown = "not shown to differ" if one["verdict"] == UNDECIDED else one["verdict"]
        sizes = [_count(one["bytes"]), one["rival"], _count(one["rival_bytes"])]
        rows.append([*sizes, shown_interval(found), shown_p(found), shown])
    return markdown(header, rows)


def picture(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw one panel for each domain of each study: loss over bytes, one line for each family of arms."""
    panels = {f"{name}, {domain}": table for name, of in results.items() for domain, table in of["domains"].items()}
    figure = new_figure(9, 4.6 * len(panels))
    for axes, (title, table) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items()):
        adapters = (row for row in table["rows"] if row["bytes"] and row["kind"] != "full")
        stored = sorted(adapters, key=lambda row: row["bytes"])
        for row in table["rows"]:
            if row["kind"] in ("base", "full"):
                axes.axhline(row["loss"], color="0.6", linestyle="--", linewidth=1)
                side = "bottom" if row["kind"] == "base" else "top"
                axes.annotate(row["arm"], (1, row["loss"]), xycoords=("axes fraction", "data"), ha="right", va=side)
        for name, style in _styles(map(family, stored)).items():
            own = [row for row in stored if family(row) == name]
            axes.plot([row["bytes"] for row in own], [row["loss"] for row in own], label=name, **style)
        axes.set(xscale="log", xlabel="bytes to store, the base not counted")
        axes.set_ylabel("test loss, nats per token (lower is better)")
        axes.set_title(_finding(title, stored), loc="left")
        axes.grid(color="0.92")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    save_figure(figure, path, dpi=100)


def family(row: Mapping[str, Any]) -> str:
    """Return an arm's name without its size: "LoRA in few bits" for LoRA 7 in 4 bits, "mask" for mask (33 kB)."""
    name = re.split(r" \(| \d", row["arm"])[0]
    return f"{name}{_FEW_BITS}" if row["kind"] == "coded" and " bits" in row["arm"] else name


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the line style of each family, masks first: the method's colour; dashed and hollow in few bits."""
    found: dict[str, dict[str, Any]] = {}
    of_method = Counter[str]()
    for name in sorted(set(names), key=lambda name: ("mask" not in name, name)):
        method = name.removesuffix(_FEW_BITS).replace("sparse fine-tune", "sparse delta")
        colour = COLOURS["mask"] if "mask" in name else COLOURS.get(method)
        if colour is None:  # a method without a colour of its own
            colour, of_method["others"] = shade(COLOURS["ternary"], of_method["others"]), of_method["others"] + 1
        elif "mask" in name:
            colour, of_method["mask"] = shade(colour, of_method["mask"]), of_method["mask"] + 1
        few = name.endswith(_FEW_BITS)
        look = {"linestyle": "--" if few else "-", "markerfacecolor": "white" if few else colour}
        found[name] = {"color": colour, "marker": "o", "linewidth": 2.5 if "mask" in name else 1.2, **look}
    return found


def _finding(title: str, stored: Sequence[Mapping[str, Any]]) -> str:
    """Return a title that says for how many of the masks' sizes an arm of no more bytes has a lower loss."""
    masks, rivals = _masks({"rows": stored}), [row for row in stored if "mask" not in row["arm"]]
    behind = sum(
        any(rival["loss"] < mask["loss"] and rival["bytes"] <= MOST * mask["bytes"] for rival in rivals)
        for mask in masks
    )
    return f"{title}: masks are behind at {behind} of {len(masks)} sizes"


def _masks(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return for each budget the trained mask that had the most seeds."""
    found: list[Mapping[str, Any]] = []
    masks = [row for row in table["rows"] if row["kind"] == "mask" and row["bytes"] is not None]
    for mask in sorted(masks, key=lambda row: row["bytes"]):
        if found and mask["bytes"] <= _SAME * found[-1]["bytes"]:
            found[-1] = max(found[-1], mask, key=lambda row: row.get("seeds", 0))
        else:
            found.append(mask)
    return found


def _of_budget(table: Mapping[str, Any], mask: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of the mask's budget, the best first."""
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
    """Return the difference with its interval, and * if p < 0.05 after Holm's correction over the whole study."""
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
    parser.add_argument("--equal-bytes", action="store_true", help="only each mask and its best rivals")
    asked = parser.parse_args(given)
    if missing := [path for path in asked.results if not path.is_file()]:
        parser.error(f"RESULT.json must be the table.json of a study, got {missing[0]}, which is no file")
    results = {
        path.stem.removeprefix("compare-"): json.loads(path.read_text(encoding="utf-8")) for path in asked.results
    }
    found = (equal_bytes(numbers) if asked.equal_bytes else board(name, numbers) for name, numbers in results.items())
    print("\n\n".join(found))
    if asked.picture is not None:
        picture(results, asked.picture)


if __name__ == "__main__":
    main()
