"""Runs on streams of several sources: stopped and resumed, in several processes, and from the command line."""

import dataclasses
import json
import math
import random
import re

import pytest
import torch
from tiny import WORDS, masked_llama
from tiny_run import LEARN, assert_goes_on_bit_for_bit, assert_same_masks, killed_after, steps

from mft.config import DataConfig, TrainConfig
from mft.data.splits import load_splits
from mft.engines.distributed import ALONE, Processes
from mft.engines.step import NonFiniteLoss
from mft.training.loop import train_masks
from mft.training.row_source import open_rows

STEPS, FIRST = 12, 5
TRAIN = TrainConfig(lr=1e-2, steps=STEPS, batch_size=2, accumulation=2, seed=3)


@pytest.fixture(scope="module")
def numbers(model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture
def streamed(tmp_path):
    """Return a stream of texts and of sums, with windows of 8 documents."""
    draw = random.Random(0)
    texts = [{"text": " ".join(str(draw.randrange(1, WORDS)) for _ in range(draw.randrange(3, 20)))} for _ in range(60)]
    sums = [{"prompt": f"{1 + i} 2", "completion": f" {3 + i}"} for i in range(40)]
    for name, rows in {"texts": texts, "sums": sums}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        "texts": {"source": str(tmp_path / "texts.jsonl"), "weight": 3},
        "sums": {"source": str(tmp_path / "sums.jsonl")},
    }
    return DataConfig(sources=sources, sequence_length=12, streaming=True, buffer_size=8, max_eval_tokens=96)


@pytest.mark.parametrize("way", ["plain", "resident"])
def test_a_stopped_run_on_a_stream_goes_on_bit_for_bit(streamed, numbers, tmp_path, way):
    def run(model, **options):
        return train_masks(model, load_splits(streamed, numbers).train, TRAIN, way=way, **options)

    assert_goes_on_bit_for_bit(run, masked_llama, tmp_path / "checkpoints", FIRST)


def test_processes_take_the_micro_batches_that_one_alone_would(streamed, numbers):
    train = dataclasses.replace(TRAIN, accumulation=3)
    alone, *several = (
        open_rows(load_splits(streamed, numbers).train, train, processes)
        for processes in (ALONE, Processes(0, 2), Processes(1, 2))
    )
    for _ in range(9):
        wanted, shares = alone.next_step(), [rows.next_step() for rows in several]
        for i, batch in enumerate(wanted):
            taken = shares[i % 2][i // 2]
            assert torch.equal(taken.input_ids, batch.input_ids)
            assert (taken.rows, taken.documents, taken.sources) == (batch.rows, batch.documents, batch.sources)
    assert alone.state() == several[0].state() == several[1].state()


def test_a_loss_that_is_not_finite_names_documents_and_sources(streamed, numbers):
    model = masked_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.inf)
    with pytest.raises(NonFiniteLoss, match=r"rows \[0, 1\] \(documents \[\d+, \d+\] of texts, texts\)"):
        train_masks(model, load_splits(streamed, numbers).train, TRAIN)


def test_a_killed_run_of_the_command_line_goes_on_bit_for_bit_and_tells_of_each_source(streamed, cli, tmp_path):
    names = [f"data.sources.{name}.source={given.source}" for name, given in streamed.sources.items()]
    data = [
        *names,
        "data.source=stdlib",
        "data.sources.texts.weight=3",
        "data.buffer_size=8",
        "data.max_eval_tokens=96",
    ]
    run = [*LEARN, *data, "data.streaming=true", "train.steps=6", "checkpoint_minutes=0"]
    output = cli.done("train", *run, "output_dir=straight")
    assert "texts: validation: documents 0 to 5 of the stream, which are not trained on" in output
    assert "train: texts (weight 3) gives 9 rows: 75.0% of all rows" in output
    assert "validation by source" in output
    killed_after(cli, 4, "train", *run)
    output = cli.done("train", "--resume", "run")
    assert "goes on after step 3" in output
    assert "train: texts (weight 3) gives 9 rows: 75.0% of all rows" in output
    assert steps(tmp_path / "run") == steps(tmp_path / "straight")
    assert_same_masks(tmp_path / "run", tmp_path / "straight")
    tables = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("run", "straight")]
    assert tables[0] == tables[1]
    assert tables[0]["sources"].keys() == {"texts", "sums"}
    output = cli.done("evaluate", "--masks", "run", "--config", "run/config.yaml")
    assert f"{tables[0]['sources']['sums']['after']['loss']:.4f}" in output
    assert re.search(r"texts +6 ", output)
    assert re.search(r"sums +2 ", output)
