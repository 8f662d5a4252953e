"""The many_masks benchmark: every task under every mask, the table, and a complete answer on a small model."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import make_llama, make_rows, masked_llama
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import bench_many_masks, harness
from benchmarks.bench_many_masks import BASE, bytes_of, loss_rows, losses_by_mask
from benchmarks.records import file_name
from benchmarks.tables import many_masks_tables
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


def test_the_table_of_many_masks_shows_losses_differences_and_bytes(exports):
    bank = load_mask_bank(make_llama(), exports)
    losses = losses_by_mask(bank, {"a": make_rows(4)}, first=2)
    sizes = bytes_of(bank)
    assert sizes["masks in memory"] == sizes["masks in memory, computed"] == sum(bank.nbytes().values()) > 0
    table, memory = many_masks_tables({"losses": loss_rows(losses), "bytes": sizes})
    header, _, row = table.splitlines()
    assert header == "| held-out loss of | base | a | bb |"
    base, other = losses["a"][BASE].loss, losses["a"]["bb"].loss
    assert row.startswith(f"| a | {base:.4f} | ")
    assert f" | {other:.4f} ({other - base:+.4f} ± " in row
    assert f"| masks in memory | {sizes['masks in memory']:,d} |" in memory


@pytest.mark.slow
def test_the_question_of_many_masks_is_answered(smollm2_dir, tokenizer, tmp_path, monkeypatch, capsys):
    def load_small(name):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
            config = LlamaConfig(**sizes, vocab_size=len(tokenizer), num_hidden_layers=30, tie_word_embeddings=True)
            return LlamaForCausalLM(config).eval(), tokenizer

    monkeypatch.setattr(bench_many_masks, "load_model", load_small)
    for name, value in {"STEPS": 2, "SECONDS": 0.0, "SCORED": 16, "PROMPT": 4, "GENERATED": 2}.items():
        monkeypatch.setattr(bench_many_masks, name, value)
    monkeypatch.setattr(harness, "_folder", tmp_path)
    short = {"max_train_tokens": 4 * 128, "max_eval_tokens": 4 * 128}
    tasks = {task: replace(config, **short) for task, config in bench_many_masks.TASKS.items()}
    monkeypatch.setattr(bench_many_masks, "TASKS", tasks)
    bench_many_masks.main()
    record = json.loads((tmp_path / file_name("many_masks", harness.instruction_set())).read_text())
    assert len(record["losses"]) == 12
    found = {finding["quantity"]: finding["measured"]["median"] for finding in record["findings"]}
    assert found["bank's loss against the merged model's, largest difference"] < 1e-4
    assert found["scoring: merged model"] > 0
    assert found["mixed batch / merged model: generating"] > 0
    assert record["bytes"]["masks in memory"] == 3 * 6 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64) // 8
    assert record["bytes"]["masks in memory, all layers"] == 5 * record["bytes"]["masks in memory"]
