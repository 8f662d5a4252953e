"""Masks in vLLM: serve one base with the masks of many tasks, and switch between requests, or per request.

    llm = mft.vllm.load("base", {"python": "runs/python"})
    mft.vllm.use(llm, "python")

vLLM is imported only when it is needed.
"""

from typing import TYPE_CHECKING, Any

from mft.vllm.client import add_tasks, load, request_of, use

if TYPE_CHECKING:
    from mft.vllm.stream import MaskStream

__all__ = ["MaskStream", "add_tasks", "load", "request_of", "use"]


def __getattr__(name: str) -> Any:
    """Import MaskStream at its first use: only training needs it, and it loads transformers."""
    if name != "MaskStream":
        raise AttributeError(f"module 'mft.vllm' has no attribute {name!r}")
    from mft.vllm.stream import MaskStream

    return MaskStream
