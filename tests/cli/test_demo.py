"""mft demo on a tiny model: what it prints, what it writes, and what it deletes."""

import json
import re

import pytest
import torch
from tiny import counting_lines, masked_llama
from transformers import AutoModelForCausalLM

from mft.cli import demo
from mft.cli.demo import run_demo
from mft.config_file import load_config, save_config
from mft.masks.convert import masked_modules, merge_model

LEFT = {"config.yaml", "masks", "metrics.jsonl", "model", "plot.png", "table.json", "table.md"}


@pytest.fixture
def config(model_dir, tmp_path, monkeypatch):
    """Return the shipped configuration on the tiny model and counting rows, in tmp_path/run, with a fitting prompt."""
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "PROMPT", "1 2 3")
    monkeypatch.setattr(demo, "TOKENS", 6)
    (tmp_path / "data.jsonl").write_text(counting_lines())
    tiny = [f"model.name={model_dir}", f"data.source={tmp_path}/data.jsonl", "data.sequence_length=12"]
    tiny += ["data.max_train_tokens=192", "mask.layers_to_transform=2-3", "mask.budget=0.2", "train.lr=5e-2"]
    return load_config("demo", [*tiny, f"output_dir={tmp_path}/run"])


def told(config, capsys, **options):
    run_demo(config, **options)
    return capsys.readouterr().out


def test_the_demo_tells_before_and_after_and_leaves_a_run_with_its_merged_model(config, model_dir, tmp_path, capsys):
    printed = told(config, capsys)
    assert {path.name for path in (tmp_path / "run").iterdir()} == LEFT
    words = " ".join(printed.split())
    # The base answers before anything is trained, and again next to the masked model.
    assert printed.index("1 2 3") < printed.index("before, validation:") < printed.index("mask fine-tune:")
    first, second, third = re.findall(r"^1 2 3.*$", printed, re.MULTILINE)
    assert first == second != third
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    difference = table["loss after - before"]
    assert f"{table['documents']} documents that it was not trained on: {difference:+.3f} nats per token" in words
    sizes = [
        (tmp_path / "run" / name).stat().st_size
        for name in ("model/model.safetensors", "masks/adapter_model.safetensors")
    ]
    assert f"model: {sizes[0]:,} bytes; mask: {sizes[1]:,} bytes, {sizes[0] / sizes[1]:.0f} times smaller" in words
    base, merged = (
        dict(AutoModelForCausalLM.from_pretrained(at).named_parameters())
        for at in (model_dir, tmp_path / "run" / "model")
    )
    gone = sum(int((base[name].bfloat16() != weight).sum()) for name, weight in merged.items())
    assert gone > 0
    assert f"bit-equal: {gone:,} of {sum(weight.numel() for weight in base.values()):,} weights are 0 now" in words


def test_an_earlier_demo_is_deleted_finished_or_not_and_another_run_only_if_asked(
    config, tmp_path, monkeypatch, capsys
):
    run, begun = tmp_path / "run", []
    monkeypatch.setattr(demo, "_continue", lambda *_: "1 2 3")
    monkeypatch.setattr(demo, "run_train", lambda start: begun.append(start.overwrite) or 1 / 0)

    def begins(**options):
        with pytest.raises(ZeroDivisionError):
            run_demo(config, **options)
        return begun.pop()

    assert not begins()  # there is nothing to delete
    run.mkdir()
    save_config(config, run / "config.yaml")
    (run / ".masks.abcdefgh.tmp").mkdir()  # left by a killed demo
    config.model.dtype = "float32"  # which dtype is faster is measured each time
    assert begins()
    (run / "masks").mkdir()
    assert begins()
    config.train.lr = 2e-2
    with pytest.raises(ValueError, match=r"already holds a run \(.*pass --overwrite"):
        run_demo(config)
    assert begins(overwrite=True)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bit_that_differs_is_an_error(name, dtype):
    masked = masked_llama(dtype=dtype)
    merged = merge_model(masked_llama(dtype=dtype))
    dropped = sum(int((~module.mask()).sum()) for module in masked_modules(masked).values())
    assert f"bit-equal: {dropped:,} of " in demo._check_bits(masked, merged)
    with torch.no_grad():
        weight = merged.get_parameter(name)
        at = tuple(weight.eq(0).nonzero()[0]) if weight.eq(0).any() else (0, 0)
        weight[at] = -0.0 if weight[at] == 0 else weight[at].nextafter(torch.tensor(9.0, dtype=dtype))
    with pytest.raises(RuntimeError, match=f"must hold the base's bits, and [+]0 .*; {name} differs"):
        demo._check_bits(masked, merged)
