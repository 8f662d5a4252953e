"""transformers' Trainer and TRL's SFTTrainer, with accelerate launch and FSDP2, learn the masks of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched_trainer import train
from tiny import make_llama

import mft
from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
HERE = Path(__file__).parent
# Share of bits that may differ: for a sharded matrix, 8-bit moments are rounded with other random words.
APART = {"trainer": 0.02, "sft": 0.0}


def masks_in(directory):
    model = mft.load_masks(make_llama(), directory)
    return {name: module.mask() for name, module in masked_modules(model).items()}


def apart(masks, others):
    bits = sum(mask.numel() for mask in masks.values())
    return sum(int((mask != others[name]).sum()) for name, mask in masks.items()) / bits


@pytest.mark.slow
@pytest.mark.parametrize("kind", APART)
def test_accelerate_launch_with_fsdp2_learns_the_masks_of_one_process(kind, tmp_path):
    paths = [str(HERE.parents[1]), str(HERE.parents[1] / "python"), str(HERE.parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(HERE / "fsdp.yaml")]
    command = [*launch, str(HERE / "launched_trainer.py"), kind, str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    train(kind, tmp_path / "one", 4, sharded=False)
    two, one = (masks_in(tmp_path / name / "masks") for name in ("two", "one"))
    assert apart(two, one) <= APART[kind]
    start = mask_model(make_llama(), MaskConfig.paper())
    assert apart(two, {name: module.mask() for name, module in masked_modules(start).items()}) > 0.02
