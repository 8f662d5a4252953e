"""benchmarks/peft_board: entries that PEFT can read, and stand-ins for its data; PEFT's script is a stub here."""

import json
import sys

import pytest

from benchmarks.peft_board import small_data
from benchmarks.peft_board.__main__ import HERE, SUITE, copy_suite, main

ENTRIES = sorted(path.parent for path in HERE.rglob("adapter_config.json"))


@pytest.fixture
def checkout(tmp_path):
    """Make what a PEFT checkout has: a script that prints its entry, and results that are not copied."""
    suite = tmp_path / "peft" / SUITE
    (suite / "results").mkdir(parents=True)
    (suite / "results" / "lora.json").write_text("{}")
    (suite / "run.py").write_text("import sys, os; print(sys.argv, os.path.exists('results/lora.json'))")
    return tmp_path / "peft"


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_peft_reads_an_entry(entry):
    from peft import PeftConfig

    import mft.masks.peft  # noqa: F401

    assert PeftConfig.from_pretrained(str(entry)).task_type == "CAUSAL_LM"
    assert json.loads((entry / "training_params.json").read_text())["optimizer_kwargs"]["lr"] > 0


def test_the_script_of_the_checkout_runs_on_our_entry_and_the_checkout_stays(checkout, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["any"])
    main([str(checkout), "mft/llama-3.2-3B-budget0.006", "--out", str(tmp_path / "out")])
    said = "['run.py', '--verbose', 'experiments/mft/llama-3.2-3B-budget0.006'] False"
    assert said in capsys.readouterr().out
    assert not (checkout / SUITE / "experiments").exists()


@pytest.mark.parametrize(
    ("folder", "entry", "said"),
    [
        ("elsewhere", "mft/llama-3.2-3B-budget0.006", "peft must be a checkout of PEFT's repository"),
        ("peft", "mft/unknown", "entry must be one of lora/smollm2-135M-rank1, mft/"),
    ],
)
def test_what_is_no_checkout_or_no_entry_is_refused(checkout, tmp_path, folder, entry, said):
    with pytest.raises(SystemExit, match=said):
        copy_suite(tmp_path / folder, entry, tmp_path / "out")


def test_local_data_has_the_columns_of_pefts():
    train = small_data._load_dataset("meta-math/MetaMathQA")["train"]
    assert set(train.column_names) == {"type", "query", "original_question", "response"}
    questions = small_data._load_dataset("openai/gsm8k", "main")
    assert questions["test"].column_names == ["question", "answer"]
    assert not set(questions["test"]["question"]) & set(train["query"])
    assert questions["test"]["answer"][0].startswith("#### ")
    texts = small_data._load_dataset("HuggingFaceFW/finewiki", split="train", streaming=True).take(100)
    assert [len(row["text"]) for row in texts] == [small_data.LONGEST] * small_data.TEXTS
    with pytest.raises(ValueError, match="PEFT's data.py has changed"):
        small_data._load_dataset("other")
