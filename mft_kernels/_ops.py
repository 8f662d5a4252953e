"""The namespace of the ops, named only here. A build for the Kernel Hub has another (docs/how-to/kernel-hub.md)."""

import torch

ops = torch.ops.mft


def add_op_namespace_prefix(op_name: str) -> str:
    """Return an op's full name, with its namespace."""
    return f"{ops.name}::{op_name}"
