"""Run the Python of docs/how-to/transformers.md, block after block, on a tiny model instead of SmolLM2."""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch

import mft

pytestmark = pytest.mark.slow

DOC = Path(__file__).parents[3] / "docs" / "how-to" / "transformers.md"


def test_every_block_runs(tiny_llama, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mft, "load_model", lambda name: (copy.deepcopy(tiny_llama), tokenizer), raising=False)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 10
    names = {"__name__": "doc"}
    for block in blocks:
        exec(block, names)
    written = {path.relative_to("runs").as_posix() for path in Path("runs").rglob("*")}
    assert {"trainer/checkpoint-2", "masks/adapter_model.safetensors", "masked.pt2", "merged.pt2"} <= written
    ids = names["prompt"]["input_ids"]
    torch.testing.assert_close(names["again"](ids), names["merged"].module()(ids))
