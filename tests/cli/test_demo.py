"""The demo as far as a test has the time: its run begins with a configuration that loads again."""

import pytest

import mft.demo.run
from mft.config import load_config


class Stop(Exception):
    pass


def test_the_demos_configuration_is_written_and_loads(tmp_path, monkeypatch):
    def stop(_):
        raise Stop

    monkeypatch.setattr(mft.demo.run, "load_model", stop)
    with pytest.raises(Stop):
        mft.demo.run.run_demo(tmp_path / "demo")
    config = load_config(tmp_path / "demo" / "config.yaml")
    assert (config.output_dir, config.memory) == (str(tmp_path / "demo"), "plain")
    assert config.mask.init == "magnitude"
