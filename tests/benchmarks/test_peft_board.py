"""benchmarks/peft_board: an entry that PEFT can read."""

import json

from peft import PeftConfig

import mft.masks.peft  # noqa: F401
from benchmarks.records import ROOT


def test_peft_reads_our_entry():
    entry = ROOT / "benchmarks" / "peft_board" / "experiments" / "mft" / "llama-3.2-3B-budget0.006"
    assert PeftConfig.from_pretrained(str(entry)).task_type == "CAUSAL_LM"
    assert json.loads((entry / "training_params.json").read_text())["optimizer_kwargs"]["lr"] > 0
