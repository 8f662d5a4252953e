"""The search for a default mask keeps what is stored, and its settings are configurations that load."""

import json

import pytest

from benchmarks.default_mask import MODEL, SETTINGS, TEXTS, name_of, write_table
from mft.config_file import load_config


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_a_run_s_configuration(setting):
    config = load_config(None, [*f"{MODEL} {TEXTS['stdlib']} {SETTINGS[setting]}".split(), "train.steps=24"])
    assert f"{config.train.lr:g}" == f"{float(setting.rpartition(', ')[2]):g}"


def test_a_run_joins_what_is_stored(tmp_path):
    setting, other = list(SETTINGS)[:2]
    stored = {"base": 3.0, "change": -0.5, "standard error": 0.1, "dropped": 0.01, "bytes": 9}
    (tmp_path / "found.json").write_text(json.dumps({setting: {"chats": {"24": stored}}}))
    run = tmp_path / name_of(other, "headers", 64)
    (run / "masks").mkdir(parents=True)
    (run / "masks" / "adapter_model.safetensors").write_bytes(b"0" * 7)
    table = {"before": {"loss": 2.0}, "loss after - before": -0.25, "standard error": 0.125}
    (run / "table.json").write_text(json.dumps(table))
    (run / "metrics.jsonl").write_text('{"lr": 1e-3, "dropped": 0.02}\n{"phase": "after, validation"}\n')
    write_table(tmp_path, tmp_path / "found")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found[setting]["chats"]["24"] == stored
    assert found[other]["headers"]["64"]["bytes"] == 7
    assert "| -0.250 (2 %) |" in (tmp_path / "found.md").read_text()
