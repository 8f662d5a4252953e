"""The plugins for vLLM: it calls register in each of its processes, and endpoint in the one that answers HTTP."""

import logging
from typing import Any

from mft.vllm.versions import NAME, PER_REQUEST_BACKEND, reason_against

logger = logging.getLogger(__name__)


def register() -> None:
    """Register --quantization mft and our backends. Entry point in vllm.general_plugins.

    vLLM calls this wherever the package is installed. With an unsupported vLLM it only logs why.
    """
    reason = reason_against()
    if reason is not None:
        logger.warning("mft: masks are not available in this vLLM: %s", reason)
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    import mft.vllm.plain_linear  # noqa: F401  # registers itself, also in a process that only unpickles its class

    for backend, engine in ((NAME, "MaskTransferEngine"), (PER_REQUEST_BACKEND, "PerRequestEngine")):
        try:
            WeightTransferEngineFactory.register_engine(backend, "mft.vllm.weight_transfer", engine)
        except ValueError:
            logger.debug("mft: %s is registered already", backend)  # vLLM may call a plugin twice in one process


def endpoint() -> Any:
    """Return the routes of /v1/mft, for servers whose VLLM_PLUGINS allow them. Entry point in vllm.endpoint_plugins."""
    from mft.vllm.endpoint import MaskEndpoint

    return MaskEndpoint()
