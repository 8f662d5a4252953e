"""The question of experts: what is timed computes the same, and a whole answer on small modules."""

import torch

from benchmarks import bench_experts, harness, measured
from benchmarks.bench_experts import Budget, Competitors, Size
from benchmarks.plots import draw_experts, picture_of
from benchmarks.records import by_machine, file_name
from benchmarks.tables import experts_tables

SMALL = Size(4, 32, 24, 2), Size(16, 32, 24, 3)


def test_dense_and_masked_modules_compute_the_same_where_all_is_kept():
    for size in SMALL:
        made = Competitors(size, torch.float32)
        for layer in made.layers:
            layer.keep_ratio = 1.0
        made._held = [(layer.packed_mask(), torch.zeros_like(layer.weight)) for layer in made.layers]
        for op in ("forward", "step"):
            found = {name: call() for name, call in made.calls(op, 1).items()}
            expected = found.pop("grouped_mm")
            for got in found.values():
                both = zip([got], [expected]) if op == "forward" else zip(got[:2], expected[:2])
                for a, b in both:
                    assert torch.allclose(a, b, atol=1e-6)
        for (_, buffer), d_weight in zip(made._held, expected[2:]):
            assert torch.allclose(buffer, d_weight, atol=1e-6)


def test_the_question_of_experts_is_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_folder", tmp_path)
    bench_experts.main(budget=Budget(sizes=SMALL, tokens=(1, 5), seconds=0.0, least=1))
    (record,) = by_machine(tmp_path, "experts").values()
    (table,) = experts_tables(record)
    assert table.count("\n") == 1 + 2 * 2 * 3
    for case in record["cases"]:
        case["ratio"]["median"] = 1.16
    assert experts_tables(record)[0].count("**1.16**") == 2 * 2 * 3 * 2
    asked = [finding for finding in record["findings"] if finding["bound"] == bench_experts.BOUND]
    assert len(asked) == len(record["findings"])
    assert "64 experts" in measured.written(measured.DOCUMENT.read_text()) or not by_machine(
        measured.RESULTS, "experts"
    )
    path = tmp_path / file_name("experts", harness.instruction_set())
    draw_experts(path)
    assert picture_of(path).stat().st_size > 0
