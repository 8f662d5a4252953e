"""The search for a default mask keeps what is stored, and its settings are configurations that load."""

import pytest

from benchmarks.default_mask import MODEL, SETTINGS, TEXTS
from mft.config_file import load_config


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_is_a_run_s_configuration(setting):
    config = load_config(None, [*f"{MODEL} {TEXTS['stdlib']} {SETTINGS[setting]}".split(), "train.steps=24"])
    assert f"{config.train.lr:g}" == f"{float(setting.rpartition(', ')[2]):g}"
