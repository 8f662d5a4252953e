"""examples/first_mask.ipynb runs from top to bottom, on a tiny model in two steps."""

import re
from pathlib import Path

import pytest
import torch

from mft.models.pretrained import save_model

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_mask.ipynb"
SMALL = ["data.sequence_length=128", "train.steps=2", "data.max_eval_tokens=1024"]


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, tiny_llama, tokenizer, monkeypatch):
    save_model(tiny_llama.to(torch.bfloat16), tokenizer, tmp_path / "model")
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    small = nbformat.v4.new_code_cell(f"model_name, settings = {str(tmp_path / 'model')!r}, {SMALL}")
    notebook.cells.insert(at + 1, small)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = {cell.id: text_of(cell) for cell in notebook.cells if cell.cell_type == "code"}
    assert printed["look"].count("<|im_start|>assistant") >= 2  # the first row is packed
    assert "before" in printed["table"]
    assert "after" in printed["table"]
    assert len(re.findall("base: |masked:", printed["answers"])) == 4
    assert "adapter_model.safetensors" in printed["size"]
    zeros = int(re.search(r"zeros among its weights: (\d+)", printed["merge"])[1])
    assert zeros > 0


def text_of(cell):
    """Return what a cell printed and showed."""
    found = []
    for output in cell.outputs:
        found += [output.text] if output.output_type == "stream" else [output.data.get("text/markdown", "")]
    return "".join(found)
