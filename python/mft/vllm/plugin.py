"""The entry points of vLLM: what it calls in each of its processes, and in the one that answers HTTP."""

import logging
from typing import Any

from mft.vllm.versions import NAME, reason_against

logger = logging.getLogger(__name__)


def register() -> None:
    """vllm.general_plugins: make --quantization mft and the backend mft known.

    vLLM calls this wherever the package is installed. With another vLLM it does nothing but say why, so that models
    without masks still run.
    """
    reason = reason_against()
    if reason is not None:
        logger.warning("mft: masks are not available in this vLLM: %s", reason)
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    import mft.vllm.plain_linear  # noqa: F401  # registers itself, also in a process that only unpickles it

    try:
        WeightTransferEngineFactory.register_engine(NAME, "mft.vllm.engine", "MaskTransferEngine")
    except ValueError:
        logger.debug("mft: the engine is registered already")  # vLLM may call a plugin twice in one process


def endpoint() -> Any:
    """vllm.endpoint_plugins: the routes of /v1/mft, in a server that VLLM_PLUGINS allows them."""
    from mft.vllm.endpoint import MaskEndpoint

    return MaskEndpoint()
