"""PEFT reads masks from the hub: PeftModel.from_pretrained with a repository's name, pinned, offline, and checked."""

import pytest
import torch
from hub_stub.asked import hub_for
from hub_stub.repository import File
from huggingface_hub import constants
from peft import PeftModel
from peft_masks import STILL_CALLED, assert_same, config, with_masks
from tiny import logits, make_llama, masked_llama
from tiny_architectures import state

from mft.files.hub import hub_is_reachable
from mft.masks.convert import merge_model
from mft.masks.export import save_masks
from mft.masks.peft import MaskPeftConfig

pytestmark = STILL_CALLED
NAME = "user/masks"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_for(tmp_path, monkeypatch, token=None) as hub:
        yield hub


def put(hub, directory):
    return hub.add(NAME, {path.name: path.read_bytes() for path in directory.iterdir()})


def test_an_export_is_read_by_its_name_pinned_to_a_commit_and_offline(hub, tmp_path, monkeypatch):
    repository = put(hub, save_masks(masked_llama(), tmp_path / "masks"))
    old = repository.branches["main"]
    repository.commit("main", {}, "all gone")
    assert MaskPeftConfig.from_pretrained(NAME, revision=old).mode == "magnitude"
    expected = state(merge_model(masked_llama()))
    assert_same(state(PeftModel.from_pretrained(make_llama(), NAME, revision=old).merge_and_unload()), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_is_reachable.cache_clear()
    del hub.requests[:]
    model = PeftModel.from_pretrained(make_llama(), NAME, revision=old)
    model.load_adapter(NAME, "again", revision=old)
    assert_same(state(model.merge_and_unload()), expected)
    assert hub.requests == []


def test_what_is_loaded_is_what_was_checked_even_if_the_branch_has_moved_meanwhile(hub, tmp_path, monkeypatch):
    repository = put(hub, save_masks(masked_llama(), tmp_path / "masks"))
    other = save_masks(masked_llama(seed=7), tmp_path / "other")
    newer = {path.name: File(path.read_bytes(), path.suffix == ".safetensors") for path in other.iterdir()}

    def loading(*arguments, load=PeftModel.load_adapter, **options):
        repository.commit("main", newer, "newer")  # after the description was checked, before the weights are read
        return load(*arguments, **options)

    monkeypatch.setattr(PeftModel, "load_adapter", loading)
    merged = PeftModel.from_pretrained(make_llama(), NAME).merge_and_unload()
    assert_same(state(merged), state(merge_model(masked_llama())))


def test_an_adapter_of_scores_is_read_as_peft_reads_it(hub, tmp_path):
    model = with_masks()
    model.save_pretrained(tmp_path / "adapter")
    put(hub, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(make_llama(), NAME, is_trainable=True).eval()
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].keep_ratio == config().keep_ratio
