"""Masks in vLLM: serve one base with the masks of many tasks, and switch between requests, or per request.

    llm = mft.vllm.load("base", {"python": "runs/python"})
    mft.vllm.use(llm, "python")

vLLM is imported only when it is needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mft.vllm.client import add_tasks, load, request_of, use

if TYPE_CHECKING:
    from mft.vllm.stream import MaskStream
    from mft.vllm.trl_trainers import masks_in_trl

_FOR_TRAINING = {"MaskStream": "stream", "masks_in_trl": "trl_trainers"}  # name: its module
__all__ = ["MaskStream", "add_tasks", "load", "masks_in_trl", "request_of", "use"]


def __getattr__(name: str) -> Any:
    """Import what training needs at its first use: it loads transformers."""
    if name in _FOR_TRAINING:
        return getattr(import_module(f"mft.vllm.{_FOR_TRAINING[name]}"), name)
    raise AttributeError(f"module 'mft.vllm' has no attribute {name!r}")
