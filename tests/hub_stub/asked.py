"""Direct huggingface_hub's client to the hub on loopback, in this process or in a new one."""

import contextlib

import huggingface_hub
import huggingface_hub.file_download
import huggingface_hub.utils._http
from huggingface_hub import constants, hf_api

from mft.files.hub import hub_is_reachable

from .server import WRITES, Hub


class _WithoutWaiting:
    """Replaces the module time for the client's retries."""

    @staticmethod
    def sleep(seconds):
        pass


def turn_to(hub, patch, cache, token=WRITES):
    """Direct this process's client to ``hub`` with the MonkeyPatch ``patch`` and its own cache; None: no token."""
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(hf_api.api, "endpoint", hub.url)  # the client's own, created at import
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    patch.setattr(huggingface_hub.file_download, "time", _WithoutWaiting)
    patch.setattr(huggingface_hub.utils._http, "time", _WithoutWaiting)
    patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    hub_is_reachable.cache_clear()


@contextlib.contextmanager
def hub_for(tmp, patch, token=WRITES):
    """Yield a hub that this process's client uses, with its cache in ``tmp``."""
    with Hub() as hub:
        turn_to(hub, patch, tmp / "hub-cache", token)
        try:
            yield hub
        finally:
            hub_is_reachable.cache_clear()


def environment(hub, home, token=None):
    """Return the environment of a process that knows only this hub, and has nothing cached."""
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return variables | ({} if token is None else {"HF_TOKEN": token})
