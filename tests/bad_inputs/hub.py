"""The Hugging Face Hub: `hub_for(tmp, patch)` is a hub on loopback, whose client has a token that may write to
`user/...`; `masks_in(tmp)` is an export of masks of a random Llama of four layers.
"""

import torch
from hub_stub.asked import hub_for
from hub_stub.server import READS
from huggingface_hub import constants
from tiny import make_llama, masked_llama

from mft.files.hub import HubError, NotOnHub, hub_is_reachable
from mft.masks.convert import masked_modules
from mft.masks.export import load_masks, save_masks
from mft.publishing.push import push_to_hub
from mft.serving.task_list import parse_masks


def masks_in(tmp):
    return save_masks(masked_llama(), tmp / "masks", base_model_name_or_path="user/base")


TABLE = r"""
masks that are neither here nor on the hub
    with hub_for(tmp, patch):
        load_masks(make_llama(), "user/maks")
    -> NotOnHub: masks must be | a directory or a repository of the hub | got 'user/maks'
        | check the name; if it is private, `hf auth login`, or set HF_TOKEN, as a user who may read it
masks of the hub while it is not asked
    with hub_for(tmp, patch):
        patch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the variable does when the client is imported
        load_masks(make_llama(), "user/masks")
    -> NotOnHub: masks must be | is not in the hub's local cache either | got 'user/masks'
        | the hub is not asked, as HF_HUB_OFFLINE is set: unset it
a revision that the hub does not have
    with hub_for(tmp, patch):
        push_to_hub(masks_in(tmp), "user/masks")
        load_masks(make_llama(), "user/masks@v2")
    -> NotOnHub: 'user/masks' | must have the requested revision | got 'v2' | check the name
a revision that is given twice
    load_masks(make_llama(), "user/masks@v2", revision="v1")
    -> ValueError: revision | given once | got 'v1' and 'user/masks@v2' | leave one out
a revision of masks on this machine
    load_masks(make_llama(), masks_in(tmp), revision="v1")
    -> ValueError: revision | must be None for masks on this machine | got 'v1' for
        | leave it out, or name a repository of the hub
a repository without masks
    with hub_for(tmp, patch) as hub:
        hub.add("user/model", {"config.json": b"{}"})
        load_masks(make_llama(), "user/model")
    -> FileNotFoundError: the hub's 'user/model' | must hold an export of masks | got no adapter_config.json
        | a whole model is loaded with load_model
a token that the hub does not know
    with hub_for(tmp, patch, token="hf_forgotten"):
        load_masks(make_llama(), "user/masks")
    -> HubError: 'user/masks' | the hub must know who asks | Invalid credentials | `hf auth login`, or set HF_TOKEN
a push without a token
    with hub_for(tmp, patch, token=None):
        push_to_hub(masks_in(tmp), "user/masks")
    -> HubError: 'user/masks' | the hub must know who asks | got no valid token
        | `hf auth login`, or set HF_TOKEN
a push with a token that may only read
    with hub_for(tmp, patch, token=READS):
        push_to_hub(masks_in(tmp), "user/masks")
    -> HubError: 'user/masks' | the hub must let you write | got 403 | use a token that may write there, or another name
a push while somebody else commits
    with hub_for(tmp, patch) as hub:
        hub.fail("POST", "/api/models/user/masks/commit/main", 412, "A commit has happened since.")
        push_to_hub(masks_in(tmp), "user/masks")
    -> HubError: 'user/masks' | must not change while it is written to | got 412 | try again
a connection that breaks off while masks are sent
    with hub_for(tmp, patch) as hub:
        hub.fail("PUT", "/lfs/.*", after=100, times=9)
        push_to_hub(masks_in(tmp), "user/masks")
    -> HubError: the connection to the hub for 'user/masks' | nothing of it is used | broke off (RemoteProtocolError
        | try again
a repository without an owner
    push_to_hub(masks_in(tmp), "masks")
    -> ValueError: repository | must be user/name | got 'masks'
a push onto a commit
    push_to_hub(masks_in(tmp), "user/masks", revision="0" * 40)
    -> ValueError: revision | must be a branch, which grows | got 0000000
masks that should be private into a public repository
    with hub_for(tmp, patch) as hub:
        hub.add("user/masks")
        push_to_hub(masks_in(tmp), "user/masks", private=True)
    -> ValueError: private | must be False for a repository that is public | got 'user/masks' | see its settings
a license that the hub does not know
    with hub_for(tmp, patch):
        push_to_hub(masks_in(tmp), "user/masks", license="apache2")
    -> ValueError: license and README.md | must be valid on the hub | "license" must be one of
a push of an adapter that is not ours
    (tmp / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    push_to_hub(tmp, "user/lora")
    -> ValueError: adapter_config.json | peft_type must be 'MFT' to be pushed by mft | got 'LORA'
        | push it with peft's push_to_hub
a push of a run that is not finished
    (tmp / "config.yaml").write_text("model: {name: smollm2-135m}\n")
    push_to_hub(tmp, "user/masks")
    -> ValueError: directory | must be a finished run's | without a result | --resume
a model into a repository of masks
    make_llama().save_pretrained(tmp / "model")
    with hub_for(tmp, patch):
        push_to_hub(masks_in(tmp), "user/masks")
        push_to_hub(tmp / "model", "user/masks")
    -> ValueError: repository | must be new or hold the same kind of thing
        | got 'user/masks' with adapter_config.json for model | name another one
a repository to serve
    assert parse_masks(["code=user/masks@v1"]) == {"code": "user/masks@v1"}
    -> accepted: It is asked for when the service starts; a directory of that name would win.
masks of a commit without a hub
    with hub_for(tmp, patch):
        place = f"user/masks@{push_to_hub(masks_in(tmp), 'user/masks').revision}"
        load_masks(make_llama(), place)
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded, expected = (masked_modules(model) for model in (load_masks(make_llama(), place), masked_llama()))
    assert all(torch.equal(loaded[name].mask(), expected[name].mask()) for name in expected)
    hub_is_reachable.cache_clear()
    -> accepted: The masks as they were fetched: a commit's hash is asked for nowhere once it lies in the cache.
"""
