"""Masks from the hub: downloaded whole and checked, pinned to a commit, cached, and refused with clear messages."""

import pytest
import torch
from hub_stub.asked import hub_for
from hub_stub.server import READS
from huggingface_hub import constants
from tiny import make_llama, masked_llama

from mft.files.hub import HubError, NotOnHub, hub_is_reachable
from mft.masks.convert import masked_modules
from mft.masks.export import load_masks, save_masks
from mft.masks.location import local_directory, masks_directory

NAME = "user/masks"
CONFIG, MASKS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_for(tmp_path, monkeypatch, token=None) as hub:
        yield hub


@pytest.fixture
def masked():
    return masked_llama()


@pytest.fixture
def saved(masked, tmp_path):
    return save_masks(masked, tmp_path / "export")


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def repository(hub, saved):
    return hub.add(NAME, files_of(saved) | {"README.md": b"# Masks\n", "more.bin": b"0" * 100})


def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_is_reachable.cache_clear()


def test_a_string_that_names_no_directory_is_a_repository_of_which_the_export_alone_is_fetched(
    hub, repository, saved, masked
):
    loaded = load_masks(make_llama(), NAME)
    expected = masked_modules(masked)
    found = masked_modules(loaded)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].mask(), expected[name].mask()) for name in expected)
    directory = masks_directory(NAME)
    assert files_of(directory) == files_of(saved)
    assert directory.name == repository.branches["main"]


def test_what_is_in_the_cache_is_not_fetched_again_and_serves_where_the_hub_is_not_asked(hub, repository, monkeypatch):
    first = masks_directory(NAME)
    del hub.requests[:]
    hub_is_reachable.cache_clear()
    assert masks_directory(f"{NAME}@{first.name}") == first  # a commit: no request is needed
    assert hub.requests == []
    assert masks_directory(NAME) == first
    assert hub.requests == ["HEAD /", f"GET /api/models/{NAME}"]
    offline(monkeypatch)
    assert masks_directory(NAME) == first
    with pytest.raises(NotOnHub, match="in the hub's local cache either; .* HF_HUB_OFFLINE is set: unset it"):
        masks_directory("user/other")
    with pytest.raises(NotOnHub, match="at revision 'v2' is not in the hub's local cache"):
        masks_directory(NAME, "v2")


def test_a_revision_is_a_branch_or_a_commit_that_stays_what_it_was(hub, repository, saved, tmp_path, masked):
    old = repository.branches["main"]
    for module in masked.modules():
        if hasattr(module, "scores"):
            module.scores.data.neg_().add_(0.01)
    new = save_masks(masked, tmp_path / "new")
    repository.branches["next"] = old
    files = repository.files()
    changed = {name: type(files[name])(content, files[name].large) for name, content in files_of(new).items()}
    head = repository.commit("next", files | changed, "2")
    assert masks_directory(NAME, "next").name == masks_directory(f"{NAME}@next").name == head
    assert files_of(masks_directory(NAME, "next")) == files_of(new)
    assert files_of(masks_directory(NAME, old)) == files_of(saved)
    with pytest.raises(NotOnHub, match="must have the requested revision, got 'v9'"):
        load_masks(make_llama(), NAME, revision="v9")
    with pytest.raises(ValueError, match="revision must be given once, got 'a' and 'user/masks@b'"):
        masks_directory(f"{NAME}@b", "a")


def test_a_directory_wins_and_a_path_is_never_a_repository(hub, repository, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    saved.rename(tmp_path / NAME)
    masks_directory(NAME)
    (tmp_path / NAME / "masks").mkdir()
    assert masks_directory(NAME) == (tmp_path / NAME / "masks").relative_to(tmp_path)
    assert str(local_directory("./user/none")) == "user/none"
    assert str(local_directory(tmp_path / "no" / "where")) == str(tmp_path / "no" / "where")
    assert hub.requests == []
    with pytest.raises(ValueError, match="revision must be None for masks on this machine"):
        masks_directory(NAME, "main")


def test_a_name_that_is_neither_is_told_of_both(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "masks").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        load_masks(make_llama(), "runs/mask")
    told = str(caught.value)
    assert "masks must be a directory or a repository of the hub, got 'runs/mask'" in told
    assert "no such directory here; did you mean runs/masks?, and the hub has no 'runs/mask', or you may not" in told


def test_a_private_repository_is_shown_to_a_token_that_may_read_it(hub, saved, monkeypatch):
    hub.add(NAME, files_of(saved), private=True)
    with pytest.raises(NotOnHub, match="if it is private, `hf auth login`, or set HF_TOKEN"):
        masks_directory(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_forgotten")
    with pytest.raises(HubError, match=r"got no valid token \(Invalid credentials .*hf auth login"):
        masks_directory(NAME)
    monkeypatch.setenv("HF_TOKEN", READS)
    assert files_of(masks_directory(NAME)) == files_of(saved)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({CONFIG: b"{}"}, "got no adapter_model.safetensors"),
        ({CONFIG: b'{"peft_type": "LORA"}', MASKS: b"0"}, "expected peft_type 'MFT', got 'LORA'"),
        ({CONFIG: b" " * (1 << 24) + b"{}", MASKS: b"0"}, "adapter_config.json must be of at most 16777216 bytes"),
    ],
)
def test_what_is_no_export_is_refused_before_its_weights_are_fetched(hub, files, message):
    hub.add(NAME, files)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        masks_directory(NAME)
    assert not any(request.startswith("GET") and request.endswith(MASKS) for request in hub.requests)


def test_masks_larger_than_their_description_are_not_fetched(hub, saved, monkeypatch):
    monkeypatch.setattr("mft.masks.export_format.MOST_HEADER", 1000)
    hub.add(NAME, files_of(saved) | {MASKS: files_of(saved)[MASKS] + bytes(10_000)})
    with pytest.raises(ValueError, match=f"{MASKS} must be of at most .* bytes, got .* it is not fetched"):
        masks_directory(NAME)
    assert not any(request.endswith(MASKS) for request in hub.requests if "resolve" in request)


def test_a_connection_that_breaks_off_leaves_no_half_masks_and_the_next_try_goes_on(
    hub, repository, saved, monkeypatch
):
    hub.fail("GET", f"/{NAME}/resolve/.*/{MASKS}", after=700, times=99)
    model = make_llama()
    with pytest.raises(HubError, match=f"connection to the hub for '{NAME}' broke off .* nothing of it is used"):
        load_masks(model, NAME)
    assert all(type(module).__name__ != "MaskedLinear" for module in model.modules())
    offline(monkeypatch)
    with pytest.raises(NotOnHub, match="not in the hub's local cache"):
        masks_directory(NAME)
    hub.faults.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_is_reachable.cache_clear()
    assert files_of(masks_directory(NAME)) == files_of(saved)


def test_masks_that_were_damaged_on_the_hub_or_learned_on_another_base_are_refused(hub, repository, saved):
    content = files_of(saved)[MASKS]
    damaged = content[:-1] + bytes([content[-1] ^ 1])
    hub.add("user/damaged", files_of(saved) | {MASKS: damaged})
    with pytest.raises(ValueError, match="damaged|must keep"):
        load_masks(make_llama(), "user/damaged")
    other = make_llama()
    with torch.no_grad():
        other.model.layers[2].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the masks were learned on other weights of the same shapes"):
        load_masks(other, NAME)


def test_a_hub_that_answers_with_an_error_is_told_apart_from_one_without_the_repository(hub, repository):
    hub.fail("GET", f"/api/models/{NAME}", 503, "Service Unavailable", times=9)
    message = r"must answer for 'user/masks', got 503 \(.*Service Unavailable\): try again"
    with pytest.raises(HubError, match=message) as caught:
        masks_directory(NAME)
    assert not isinstance(caught.value, NotOnHub)
