"""The Hugging Face Hub: `hub_for(tmp, patch)` is one on loopback, whose client has a token that may write to
`user/...`; `masks_in(tmp)` is an export of masks of a random Llama of four layers.
"""

import contextlib

import torch
from hub_stub.asked import turn_to
from hub_stub.server import READS, WRITES, Hub
from huggingface_hub import constants
from tiny import make_llama, masked_llama

from mft.cli.serve import parse_masks
from mft.files.hub import HubError, NotOnHub, hub_is_reachable
from mft.masks.convert import masked_modules
from mft.masks.export import load_masks, save_masks
from mft.publishing.push import push_to_hub

from .registry import accepted, refused


@contextlib.contextmanager
def hub_for(tmp, patch, token=WRITES):
    with Hub() as hub:
        turn_to(hub, patch, tmp / "cache", token)
        try:
            yield hub
        finally:
            hub_is_reachable.cache_clear()


def masks_in(tmp):
    return save_masks(masked_llama(), tmp / "masks", base_model_name_or_path="user/base")


@refused(
    NotOnHub,
    where="masks must be",
    got="got 'user/maks'",
    rule="a directory or a repository of the hub",
    remedy="check the name; if it is private, `hf auth login`, or set HF_TOKEN of who may read it",
)
def masks_that_are_neither_here_nor_on_the_hub(tmp, patch):
    with hub_for(tmp, patch):
        load_masks(make_llama(), "user/maks")


@refused(
    NotOnHub,
    where="masks must be",
    got="got 'user/masks'",
    rule="is not in the hub's local cache either",
    remedy="the hub is not asked, as HF_HUB_OFFLINE is set: unset it",
)
def masks_of_the_hub_while_it_is_not_asked(tmp, patch):
    with hub_for(tmp, patch):
        patch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the variable does when the client is imported
        load_masks(make_llama(), "user/masks")


@refused(NotOnHub, where="'user/masks'", got="got 'v2'", rule="must have the revision", remedy="check the name")
def a_revision_that_the_hub_does_not_have(tmp, patch):
    with hub_for(tmp, patch):
        push_to_hub(masks_in(tmp), "user/masks")
        load_masks(make_llama(), "user/masks@v2")


@refused(ValueError, where="revision", got="got 'v1' and 'user/masks@v2'", rule="given once", remedy="leave one out")
def a_revision_that_is_given_twice():
    load_masks(make_llama(), "user/masks@v2", revision="v1")


@refused(
    ValueError,
    where="revision",
    got="got 'v1' for",
    rule="must be None for masks on this machine",
    remedy="leave it out, or name a repository of the hub",
)
def a_revision_of_masks_on_this_machine(tmp):
    load_masks(make_llama(), masks_in(tmp), revision="v1")


@refused(
    FileNotFoundError,
    where="the hub's 'user/model'",
    got="got no adapter_config.json",
    rule="must hold an export of masks",
    remedy="a whole model is loaded with load_model",
)
def a_repository_without_masks(tmp, patch):
    with hub_for(tmp, patch) as hub:
        hub.add("user/model", {"config.json": b"{}"})
        load_masks(make_llama(), "user/model")


@refused(
    HubError,
    where="'user/masks'",
    got="Invalid credentials",
    rule="the hub must know who asks",
    remedy="`hf auth login`, or set HF_TOKEN",
)
def a_token_that_the_hub_does_not_know(tmp, patch):
    with hub_for(tmp, patch, token="hf_forgotten"):
        load_masks(make_llama(), "user/masks")


@refused(
    HubError,
    where="'user/masks'",
    got="got no token that it knows",
    rule="the hub must know who asks",
    remedy="`hf auth login`, or set HF_TOKEN",
)
def a_push_without_a_token(tmp, patch):
    with hub_for(tmp, patch, token=None):
        push_to_hub(masks_in(tmp), "user/masks")


@refused(
    HubError,
    where="'user/masks'",
    got="got 403",
    rule="the hub must let you write",
    remedy="take a token that may, or another name",
)
def a_push_with_a_token_that_may_only_read(tmp, patch):
    with hub_for(tmp, patch, token=READS):
        push_to_hub(masks_in(tmp), "user/masks")


@refused(
    HubError,
    where="'user/masks'",
    got="got 412",
    rule="must stay as it was while it is written to",
    remedy="try again",
)
def a_push_while_somebody_else_commits(tmp, patch):
    with hub_for(tmp, patch) as hub:
        hub.fail("POST", "/api/models/user/masks/commit/main", 412, "A commit has happened since.")
        push_to_hub(masks_in(tmp), "user/masks")


@refused(
    HubError,
    where="the connection to the hub for 'user/masks'",
    got="broke off (RemoteProtocolError",
    rule="nothing of it is used",
    remedy="try again",
)
def a_connection_that_breaks_off_while_masks_are_sent(tmp, patch):
    with hub_for(tmp, patch) as hub:
        hub.fail("PUT", "/lfs/.*", after=100, times=9)
        push_to_hub(masks_in(tmp), "user/masks")


@refused(ValueError, where="repository", got="got 'masks'", rule="must be user/name")
def a_repository_without_an_owner(tmp):
    push_to_hub(masks_in(tmp), "masks")


@refused(ValueError, where="revision", got="got 0000000", rule="must be a branch, which grows")
def a_push_onto_a_commit(tmp):
    push_to_hub(masks_in(tmp), "user/masks", revision="0" * 40)


@refused(
    ValueError,
    where="private",
    got="got 'user/masks'",
    rule="must be False for a repository that is public",
    remedy="see its settings",
)
def masks_that_should_be_private_into_a_public_repository(tmp, patch):
    with hub_for(tmp, patch) as hub:
        hub.add("user/masks")
        push_to_hub(masks_in(tmp), "user/masks", private=True)


@refused(
    ValueError,
    where="license and README.md",
    got='"license" must be one of',
    rule="must be as the hub takes them",
)
def a_license_that_the_hub_does_not_know(tmp, patch):
    with hub_for(tmp, patch):
        push_to_hub(masks_in(tmp), "user/masks", license="apache2")


@refused(
    ValueError,
    where="adapter_config.json",
    got="got 'LORA'",
    rule="peft_type must be 'MFT' to be pushed by mft",
    remedy="push it with peft's push_to_hub",
)
def a_push_of_an_adapter_that_is_not_ours(tmp):
    (tmp / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    push_to_hub(tmp, "user/lora")


@refused(
    ValueError,
    where="directory",
    got="without a result",
    rule="must be a finished run's",
    remedy="--resume",
)
def a_push_of_a_run_that_is_not_finished(tmp):
    (tmp / "config.yaml").write_text("model: {name: smollm2-135m}\n")
    push_to_hub(tmp, "user/masks")


@refused(
    ValueError,
    where="repository",
    got="got 'user/masks' with adapter_config.json for model",
    rule="must be new or hold the same kind of thing",
    remedy="name another one",
)
def a_model_into_a_repository_of_masks(tmp, patch):
    make_llama().save_pretrained(tmp / "model")
    with hub_for(tmp, patch):
        push_to_hub(masks_in(tmp), "user/masks")
        push_to_hub(tmp / "model", "user/masks")


@accepted("It is asked for when the service starts; a directory of that name would win.")
def a_repository_to_serve():
    assert parse_masks(["code=user/masks@v1"]) == {"code": "user/masks@v1"}


@accepted("The masks as they were fetched: a commit's hash is asked for nowhere once it lies in the cache.")
def masks_of_a_commit_without_a_hub(tmp, patch):
    with hub_for(tmp, patch):
        place = f"user/masks@{push_to_hub(masks_in(tmp), 'user/masks').revision}"
        load_masks(make_llama(), place)
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded, expected = (masked_modules(model) for model in (load_masks(make_llama(), place), masked_llama()))
    assert all(torch.equal(loaded[name].mask(), expected[name].mask()) for name in expected)
    hub_is_reachable.cache_clear()
