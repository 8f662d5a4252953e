"""DPO on rows from load_splits, compared with trl.DPOTrainer on the same pairs: loss and gradients of the scores."""

import json

import pytest
import torch
from datasets import Dataset
from whole_logits import assert_same, step

from mft.config import DataConfig, MaskConfig
from mft.data.batches import take_rows
from mft.data.splits import load_splits
from mft.masks.convert import mask_model, masked_modules
from mft.objectives.dpo import DPO

PAIRS = [
    {"prompt": f"{i} {i + 1} ", "chosen": f"{i + 2} {i + 3} {i + 4}", "rejected": f"{i} {i}"} for i in range(1, 13)
]


@pytest.mark.filterwarnings("ignore")  # warnings of trl and accelerate
def test_a_step_of_dpo_is_that_of_trl(model_dir, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    def masked():
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        return mask_model(model, MaskConfig.paper(layers_to_transform=[1, 3]))

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    for split in ("validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(PAIRS[0]) + "\n")
    rows = load_splits(DataConfig(str(tmp_path), sequence_length=32), tokenizer, pairs=True).train
    batch = take_rows(rows, list(range(len(rows))))
    objective = DPO(beta=0.3)
    assert objective.count(batch) == len(PAIRS)
    assert len(rows) < len(PAIRS)
    losses, grads = step(masked(), "resident", objective, [batch], monkeypatch)
    theirs, base = masked(), AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    settings = {"max_length": None, "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    trainer = DPOTrainer(
        theirs,
        base,
        args=DPOConfig(str(tmp_path / "trl"), beta=0.3, per_device_train_batch_size=len(PAIRS), **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    loss = trainer.compute_loss(theirs, next(iter(trainer.get_train_dataloader())))
    loss.backward()
    expected = {name: module.scores.grad for name, module in masked_modules(theirs).items()}
    assert_same(([losses[0] / len(PAIRS)], grads), ([loss.item()], expected), 1e-4)
