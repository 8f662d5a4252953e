"""The boards' page in pieces: a table for each budget, and a picture of loss over bytes, from table.json of studies.

    python -m benchmarks.board RESULT.json [RESULT.json ...] [--picture docs/images/board.png]
    python -m benchmarks.board RESULT.json --equal-bytes  # only each mask and its best rivals, with p
    python -m benchmarks.board benchmarks/results/compare-board-smollm2.json --picture docs/images/board-smollm2.png

Each table belongs to one budget: the masks of about as many bytes. It lists every arm that stores 0.5 to 1.25 times as
many bytes, the base and the full fine-tune. The mask in bold ran with the most seeds, because it was the best on
validation. Differences from it with an interval are those of the report. Others are differences of means.
"""

import argparse
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mft.files.figure import COLOURS, new_figure, save_figure, shade
from mft_study.report.at_equal_bytes import UNDECIDED
from mft_study.report.pictures.labels import Label, place_labels
from mft_study.report.statistics import Difference
from mft_study.report.verdict import shown_interval, shown_p

from .tables import markdown

LEAST, MOST = 0.5, 1.25  # times a mask's bytes
_SAME = 1.05  # times the bytes of another mask of its budget, at most
_FEW_BITS = " in few bits"
_LABELS = 8  # a panel of more families has a legend instead of labels on its lines
_MODELS = {"board-small": "Small model", "board-smollm2": "SmolLM2-135M"}
_MARKERS = {  # so that families can be told apart without colours
    **{"mask": "o", "mask from equal scores": "X", "LoRA": "^", "LoRA in few bits": "v", "sparse fine-tune": "x"},
    **{"SHiRA": "s", "SHiRA in few bits": "D", "DoRA": ">", "DoRA in few bits": "<", "norm gains": "P"},
    **{"rsLoRA": "p", "rsLoRA in few bits": "h", "IA3": "*", "VeRA": "d"},
}
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
            parts += [title, markdown(_HEADER, [_cells(table, mask, row) for row in _budget_rows(table, mask)])]
    return "\n\n".join(parts)


def equal_bytes(numbers: Mapping[str, Any]) -> str:
    """Return the stored comparisons of each mask with its best rivals of no more, and of about as many bytes."""
    header = ["rival stores", "mask, MB", "rival", "MB", "mask minus rival [95 %]", "seeds", "p", "the mask is"]
    rows = []
    for one in sorted(numbers.get("at_equal_bytes", []), key=lambda one: one["stores"]):
        if one["rival"] is None:
            continue
        table = numbers["domains"][one["domain"]]
        mask, rival = one["mask"], one["rival"]
        pair = next(pair for pair in table["comparisons"] if (pair["arm"], pair["rival"]) == (mask, rival))
        found = Difference(**one["difference"])
        shown = "not shown to differ" if one["verdict"] == UNDECIDED else one["verdict"]
        if one["verdict"] != UNDECIDED and pair["domain"]["difference"]["p_holm"] >= 0.05:
            shown += " (not of all)"  # comparisons of the study
        sizes = [f"{size / 1e6:.2f}" for size in (one["bytes"], one["rival_bytes"])]
        name, _, _ = rival.partition(" (")  # without the bytes that it aimed at
        compared = [shown_interval(found), str(found.seeds), shown_p(found), shown]
        rows.append([one["stores"], sizes[0], name, sizes[1], *compared])
    return markdown(header, rows)


def picture(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw one panel for each domain of each study: loss over bytes, one line for each family of arms.

    A bar is the 95 % interval of an arm's difference from the full fine-tune, around the arm's loss.
    """
    panels = [(name, domain, numbers) for name, numbers in results.items() for domain in numbers["domains"]]
    figure = new_figure(9.5, 5.2 * len(panels))
    drawn = []
    for axes, (name, domain, numbers) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        drawn.append((axes, *_draw(axes, numbers["domains"][domain]["rows"])))
        several = f", {domain}" if len(numbers["domains"]) > 1 else ""
        axes.set_title(f"{_MODELS.get(name, name)}{several}: {_finding(numbers, domain)}", loc="left", fontsize=11)
    figure.draw_without_rendering()
    for axes, labels, covered in drawn:
        place_labels(axes, labels, size="small", others=covered)
    save_figure(figure, path, dpi=100)


def _draw(axes: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Label], list[tuple[float, float]]]:
    """Draw the rows of one domain; return the labels at the ends of lines, and points on lines and bars."""
    stored = sorted((row for row in rows if row["bytes"] and row["kind"] != "full"), key=lambda row: row["bytes"])
    for row in rows:
        if row["kind"] in ("base", "full"):
            axes.axhline(row["loss"], color="0.6", linestyle="--", linewidth=1)
            side = "bottom" if row["kind"] == "base" else "top"
            words = f"{row['arm']} {row['loss']:.3f}"
            axes.annotate(words, (0.99, row["loss"]), xycoords=("axes fraction", "data"), ha="right", va=side)
    labels, covered, styles = [], [], _styles(map(family, stored))
    for name, style in styles.items():
        own = [row for row in stored if family(row) == name]
        axes.plot(
            [row["bytes"] for row in own], [row["loss"] for row in own], label=_name_with_bits(name, own), **style
        )
        for row in own:
            ends = [row["loss"] + row["minus_full"][end] - row["minus_full"]["estimate"] for end in ("low", "high")]
            axes.plot([row["bytes"]] * 2, ends, color=style["color"], linewidth=1.2, alpha=0.6)
            covered += [(row["bytes"], loss) for loss in (*ends, row["loss"])]
        for one, other in itertools.pairwise(own):
            shares = [part / 20 for part in range(21)]
            covered += [
                (one["bytes"] * (other["bytes"] / one["bytes"]) ** s, one["loss"] + s * (other["loss"] - one["loss"]))
                for s in shares
            ]
        labels.append((own[-1]["bytes"], own[-1]["loss"], _name_with_bits(name, own), style["color"]))
    axes.set(xscale="log", xlabel="bytes to store, the base not counted (bars: 95 % interval of loss - full fine-tune)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB")
    axes.set_ylabel("test loss, nats per token (lower is better)")
    axes.margins(x=0.12)
    axes.grid(color="0.92")
    if len(styles) > _LABELS:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        labels = []
    return labels, covered


def family(row: Mapping[str, Any]) -> str:
    """Return an arm's name without its size: "LoRA in few bits" for LoRA 7 in 4 bits, "mask" for mask (33 kB)."""
    name = re.split(r" \(| \d", row["arm"])[0]
    return f"{name}{_FEW_BITS}" if row["kind"] == "coded" and " bits" in row["arm"] else name


def _name_with_bits(name: str, arms: Iterable[Mapping[str, Any]]) -> str:
    """Return a family's name with the bits of its arms: "LoRA in 4 bits" for "LoRA in few bits"."""
    bits = sorted({found[1] for arm in arms if (found := re.search(r" in (\d+) bits", arm["arm"]))})
    return name.replace("few", " or ".join(bits)) if bits else name


def _styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the look of each family, masks first: a colour and a marker of its own; dashed and hollow in few bits."""
    found: dict[str, dict[str, Any]] = {}
    others = 0
    for name in sorted(set(names), key=lambda name: ("mask" not in name, name)):
        few, method = name.endswith(_FEW_BITS), name.removesuffix(_FEW_BITS).replace("sparse fine-tune", "sparse delta")
        if "mask" in name:
            colour = shade(COLOURS["mask"], sum("mask" in other for other in found))
        elif method in COLOURS:
            colour = shade(COLOURS[method], 2) if few else COLOURS[method]
        else:  # a method without a colour of its own
            colour, others = shade(COLOURS["ternary"], others), others + 1
        look = {"linestyle": "--" if few else "-", "markerfacecolor": "white" if few else colour}
        width = 2.5 if "mask" in name else 1.2
        found[name] = {"color": colour, "marker": _MARKERS.get(name, "."), "markersize": 8, "linewidth": width, **look}
    return found


def _finding(numbers: Mapping[str, Any], domain: str) -> str:
    """Return what the study's comparison at equal bytes says of the masks, size by size."""
    masks = _masks(numbers["domains"][domain])
    compared = [one for one in numbers.get("at_equal_bytes", []) if one["domain"] == domain]
    if not compared:
        return "test loss by bytes"
    of_mask = {mask["arm"]: [one for one in compared if one["mask"] == mask["arm"]] for mask in masks}
    behind = [mask for mask in masks if any(one["verdict"] == "behind" for one in of_mask[mask["arm"]])]
    alike = [
        (mask, one)
        for mask in masks
        for one in of_mask[mask["arm"]]
        if mask not in behind and one.get("stores") == "about as much" and one["verdict"] == "undecided"
    ]
    if not alike:
        return f"masks are behind at {len(behind)} of {len(masks)} sizes"
    rows = {row["arm"]: row for row in numbers["domains"][domain]["rows"]}
    rivals = [rows[one["rival"]] for _, one in alike]
    names = sorted({_name_with_bits(family(rival), [rival]) for rival in rivals})
    told = f"masks of {_sizes(mask for mask, _ in alike)} are not shown to differ\nfrom {' and '.join(names)}"
    return f"{told} of about as many bytes{f'; at {_sizes(behind)} the mask is behind' if behind else ''}"


def _sizes(masks: Iterable[Mapping[str, Any]]) -> str:
    return " and ".join(f"{mask['bytes'] / 1e6:.2f}" for mask in masks) + " MB"


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


def _budget_rows(table: Mapping[str, Any], mask: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
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
