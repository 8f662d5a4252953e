"""Masks in vLLM: one base, the masks of many tasks, and a switch between requests.

    llm = mft.vllm.load("base", {"python": "runs/python"})
    mft.vllm.use(llm, "python")

Nothing here imports vLLM before it is needed.
"""

from typing import TYPE_CHECKING, Any

from mft.vllm.client import add_tasks, load, use

if TYPE_CHECKING:
    from mft.vllm.stream import MaskStream

__all__ = ["MaskStream", "add_tasks", "load", "use"]


def __getattr__(name: str) -> Any:
    """MaskStream at its first use: it is for whoever trains, and loads transformers."""
    if name != "MaskStream":
        raise AttributeError(f"module 'mft.vllm' has no attribute {name!r}")
    from mft.vllm.stream import MaskStream

    return MaskStream
