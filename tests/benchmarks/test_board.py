"""The boards' page: the best entries at a budget, from a stored study."""

import json
from pathlib import Path

import pytest

from benchmarks.board import _finding, _styles, board, family, main

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "compare-all-layers-smollm2.json"


@pytest.fixture(scope="module")
def numbers():
    return json.loads(RESULT.read_text(encoding="utf-8"))


def _rows(text):
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}


def test_a_table_has_the_arms_of_about_as_many_bytes_and_the_bounds_best_first(numbers):
    rows = _rows(board("study", numbers))
    assert list(rows) == ["arm", "full fine-tune", "LoRA (rank 1 on all layers)", "**MFT**", "LoRA (rank 6)", "base"]


def test_differences_are_the_reports_from_the_arm_to_the_mask(numbers):
    (one,) = (one for one in numbers["domains"]["code"]["comparisons"] if one["rival"] == "LoRA (rank 6)")
    found = one["domain"]["difference"]
    expected = f"{-found['estimate']:+.4f} [{-found['high']:+.4f}, {-found['low']:+.4f}]"
    assert expected in _rows(board("study", numbers))["LoRA (rank 6)"]


def test_masks_of_about_as_many_bytes_have_one_table_with_the_one_of_most_seeds(numbers):
    domain = numbers["domains"]["code"]
    (mask,) = (row for row in domain["rows"] if row["kind"] == "mask")
    other = mask | {"arm": "another", "bytes": 1.04 * mask["bytes"], "seeds": 5}
    larger = mask | {"arm": "a larger one", "bytes": 1.2 * mask["bytes"]}
    rows = {"rows": [*domain["rows"], other, larger]}
    first, second = board("study", {"domains": {"code": domain | rows}}).split("### ")[1:]
    assert first.startswith("study, code: about 767,212 bytes")
    assert {"**another**", "MFT", "a larger one"} <= _rows(first).keys()
    assert "**a larger one**" in _rows(second)


def test_arms_of_other_sizes_are_one_family():
    arms = {
        "LoRA 1 (attention) in 4 bits": "coded",
        "LoRA 7 in 4 bits": "coded",
        "LoRA 2": "lora",
        "mask (33 kB)": "mask",
    }
    arms |= {"sparse fine-tune (2.1 kB)": "coded", "norm gains": "peft"}
    expected = ["LoRA in few bits", "LoRA in few bits", "LoRA", "mask", "sparse fine-tune", "norm gains"]
    assert [family({"arm": arm, "kind": kind}) for arm, kind in arms.items()] == expected


def test_the_command_writes_tables_and_a_picture(capsys, tmp_path):
    main([str(RESULT), "--picture", str(tmp_path / "board.png")])
    assert "about 737,704 bytes" in capsys.readouterr().out
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_each_mask_and_its_best_rivals(capsys):
    main([str(RESULT.with_name("compare-board-smollm2.json")), "--equal-bytes"])
    table = capsys.readouterr().out.strip()
    ahead = "898,506 | LoRA 2 in 4 bits | 305,657 | -0.0094 [-0.0167, -0.0029] | 0.025 | ahead"
    level = "898,506 | LoRA 7 in 4 bits | 1,080,060 | -0.0065 [-0.0161, +0.0018] | 0.256 | not shown to differ"
    assert f"| {ahead} |\n| {level} |" in table
    assert table in (RESULT.parents[2] / "docs" / "explanation" / "board.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("study", "domain", "said"),
    [
        ("board-small", "headers", "masks are behind at 3 of 3 sizes"),
        (
            "board-smollm2",
            "code",
            "masks of 0.29 and 0.90 MB are not shown to differ\n"
            "from LoRA in 4 bits of about as many bytes; at 2.33 MB the mask is behind",
        ),
        ("all-layers-smollm2", "code", "masks are behind at 1 of 1 sizes"),
    ],
)
def test_a_title_says_what_the_comparison_at_equal_bytes_found(study, domain, said):
    numbers = json.loads(RESULT.with_name(f"compare-{study}.json").read_text(encoding="utf-8"))
    assert _finding(numbers, domain) == said


def test_each_family_has_a_colour_and_a_marker_of_its_own():
    rows = [
        row
        for study in ("board-small", "board-smollm2")
        for table in json.loads(RESULT.with_name(f"compare-{study}.json").read_text())["domains"].values()
        for row in table["rows"]
        if row["bytes"] and row["kind"] != "full"
    ]
    styles = _styles(map(family, rows)).values()
    assert len(styles) == 14
    assert len({style["marker"] for style in styles}) == len({style["color"] for style in styles}) == 14


def test_a_result_that_is_not_there_is_said(capsys):
    with pytest.raises(SystemExit):
        main(["nowhere.json"])
    assert (
        "RESULT.json must be the table.json of a study, got nowhere.json, which is no file" in capsys.readouterr().err
    )


def test_the_page_has_the_tables_of_the_stored_board():
    page = (RESULT.parents[2] / "docs" / "explanation" / "board.md").read_text(encoding="utf-8")
    for name, count in (("board-small", 12), ("board-smollm2", 6)):
        stored = RESULT.with_name(f"compare-{name}.json")
        tables = board(name, json.loads(stored.read_text(encoding="utf-8"))).split("\n\n")
        assert len(tables) == count
        assert [table for table in tables if table not in page] == []
