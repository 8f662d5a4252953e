"""The many_masks benchmark: every task under every mask, the table, and a complete answer on a small model."""

import pytest
from tiny import make_llama, make_rows, masked_llama

from benchmarks.bench_many_masks import BASE, losses_by_mask
from mft.evaluation.evaluate import evaluate
from mft.masks.bank import load_mask_bank
from mft.masks.export import load_masks, save_masks


@pytest.fixture
def exports(tmp_path):
    return {task: save_masks(masked_llama(keep_ratio=0.5, seed=len(task)), tmp_path / task) for task in ("a", "bb")}


def test_every_task_is_evaluated_under_the_base_and_every_mask(exports):
    data = {"a": make_rows(4), "bb": make_rows(6, seed=1)}
    found = losses_by_mask(load_mask_bank(make_llama(), exports), data, first=2)
    for task, rows in data.items():
        assert list(found[task]) == [BASE, "a", "bb"]
        assert found[task][BASE].loss == pytest.approx(evaluate(make_llama(), rows).loss, rel=1e-6)
        for mask, directory in exports.items():
            alone = evaluate(load_masks(make_llama(), directory), rows).loss
            assert found[task][mask].loss == pytest.approx(alone, rel=1e-6)
            assert abs(alone - found[task][BASE].loss) > 1e-4
