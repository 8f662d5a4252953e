"""Run the Python of docs/how-to/trl.md, block after block, on a Llama of two layers instead of SmolLM2."""

import re
from pathlib import Path

import pytest
import torch
from tiny import make_llama

from mft.masks.peft_layers.layer import MaskLinear
from mft.models import pretrained

pytest.importorskip("trl")

pytestmark = pytest.mark.slow

DOC = Path(__file__).parents[3] / "docs" / "how-to" / "trl.md"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated and will be removed:FutureWarning")
def test_every_block_runs(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    base = make_llama(torch.bfloat16, num_hidden_layers=2, tie_word_embeddings=True, **words)
    pretrained.save_model(base, tokenizer, tmp_path / "base")
    monkeypatch.setattr(pretrained, "smollm2_directory", lambda dtype: tmp_path / "base")
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    names = {"__name__": "doc"}
    for block in blocks:
        exec(block, names)
    written = {path.relative_to("runs").as_posix() for path in Path("runs").rglob("*")}
    assert {"sft/checkpoint-2", "adapter/adapter_config.json", "masks/adapter_model.safetensors"} <= written
    ids = torch.arange(3, 12)[None]
    model, engine = names["trainer"].model.eval(), names["engine"]
    assert any(isinstance(module, MaskLinear) for module in model.modules())
    model.merge_adapter()
    with torch.no_grad():
        assert torch.equal(engine(ids).logits, model(ids).logits)
