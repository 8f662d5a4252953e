"""The program that test_sharded_trainers.py runs with accelerate launch: a Trainer, or TRL's SFTTrainer, over FSDP2.

accelerate launch --config_file fsdp.yaml launched_trainer.py KIND DIRECTORY
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from tiny import make_llama, make_rows
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import mft
from mft.config import MaskConfig
from mft_kernels import MaskAdamW

ARGUMENTS = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3, "max_grad_norm": 1.0}
ARGUMENTS |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "steps", "save_steps": 2}
MOMENTS = {"trainer": "8bit", "sft": "fp32"}


def train(kind: str, directory: Path, rows_at_once: int, *, sharded: bool) -> None:
    """Train masks into directory/masks; the Trainer stops after its save at step 2, and continues from there."""
    given = ARGUMENTS | {"output_dir": str(directory / "run"), "per_device_train_batch_size": rows_at_once}
    rows = make_rows(12).select_columns(["input_ids", "labels"])
    for resumed in (False, True) if kind == "trainer" else (False,):
        model = mft.mask_model(make_llama(), MaskConfig.paper())
        steps = {"max_steps": 3 if resumed or kind != "trainer" else 2}
        optimizer = MaskAdamW, {"lr": 1e-2, "moments": MOMENTS[kind]}
        if kind == "trainer":
            arguments = TrainingArguments(**given | steps)
        else:
            arguments = SFTConfig(
                **given | steps, bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}
            )
        if sharded:
            assert arguments.device.type == "cpu"
            # accelerate allows FSDP only between accelerators; nothing else in it checks this.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        options = {"model": model, "args": arguments, "train_dataset": Dataset.from_dict(rows.to_dict())}
        if kind == "trainer":
            trainer = Trainer(**options, optimizer_cls_and_kwargs=optimizer)
        else:
            trainer = SFTTrainer(**options, processing_class=tokenizer(), optimizer_cls_and_kwargs=optimizer)
        trainer.train(resume_from_checkpoint=resumed)
    wrapped = trainer.model_wrapped
    assert hasattr(next(p for p in wrapped.parameters() if p.requires_grad), "full_tensor") == sharded
    with mft.gathered(wrapped):
        if PartialState().is_main_process:
            mft.save_masks(wrapped, directory / "masks")


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"<end>": 0} | {str(i): i for i in range(1, 61)}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<end>", pad_token="<end>")


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], Path(sys.argv[2]), 2, sharded=True)
