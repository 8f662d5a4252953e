"""The namespace of the ops: all that names it. A build for the Kernel Hub has another (docs/how-to/kernel-hub.md)."""

import torch

ops = torch.ops.mft


def add_op_namespace_prefix(op_name: str) -> str:
    """An op's whole name."""
    return f"{ops.name}::{op_name}"
