"""The boards' page: the best entries at a budget, from a stored study."""

import json

from benchmarks.board import board, main
from benchmarks.records import RESULTS, ROOT

PAGE = (ROOT / "docs" / "explanation" / "board.md").read_text(encoding="utf-8")


def test_the_command_prints_each_mask_and_its_best_rivals(capsys):
    main([str(RESULTS / "compare-board-smollm2.json"), "--equal-bytes"])
    table = capsys.readouterr().out.strip()
    ahead = "LoRA 2 in 4 bits | 0.31 | -0.0094 [-0.0167, -0.0029] | 3 | 0.025 | ahead (not of all) |"
    level = "LoRA 7 in 4 bits | 1.08 | -0.0065 [-0.0161, +0.0018] | 3 | 0.256 | not shown"
    assert f"| no more | 0.90 | {ahead}" in table
    assert f"| about as much | 0.90 | {level}" in table
    assert [row for row in table.splitlines() if row not in PAGE] == []


def test_the_page_has_the_tables_of_the_stored_board():
    for name, count in (("board-small", 12), ("board-smollm2", 6)):
        stored = RESULTS / f"compare-{name}.json"
        tables = board(name, json.loads(stored.read_text(encoding="utf-8"))).split("\n\n")
        assert len(tables) == count
        assert [table for table in tables if table not in PAGE] == []
