"""A model within torch.compile, DistributedDataParallel or fully_shard: the model itself, and its parameters whole."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# What to use in DeepSpeed's place.
INSTEAD = "use FSDP2, by memory: sharded under torchrun, or by accelerate launch with fsdp_version: 2"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within torch.compile, DistributedDataParallel and DataParallel, else model itself."""
    inner = uncompiled(model)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(inner.module)
    return inner


def uncompiled(model: nn.Module) -> nn.Module:
    """The model within torch.compile, whose parameters and names it has, else model itself."""
    return getattr(model, "_orig_mod", model)


def check_no_deepspeed(model: nn.Module) -> None:
    """Raise ValueError if DeepSpeed runs the model, or (ZeRO-3) has partitioned its parameters."""
    engine = type(model).__name__ == "DeepSpeedEngine"
    if engine or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        what = "a DeepSpeedEngine" if engine else f"a {type(model).__name__} that its ZeRO-3 has partitioned"
        raise ValueError(
            f"model must not be DeepSpeed's, whose flat partitions hold no rows of a mask, got {what}: {INSTEAD}"
        )


def check_unsharded(model: nn.Module) -> None:
    """Raise ValueError if fully_shard has spread the model over processes."""
    if _sharded(model):
        raise ValueError(
            f"model must not be sharded yet, got a {type(model).__name__} that fully_shard has spread over processes: "
            "load_masks before fully_shard; to merge, save_masks under mft.gathered(model), then load_masks and "
            "merge_model on the base"
        )


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """model, with the parameters whole that fully_shard (FSDP2) has spread; every process must enter.

    As save_masks needs them:

        with mft.gathered(model):
            if torch.distributed.get_rank() == 0:
                mft.save_masks(model, "masks")
    """
    sharded = _sharded(model)
    for module in sharded:
        module.unshard()
    try:
        yield model
    finally:
        for module in sharded:
            module.reshard()


def _sharded(model: nn.Module) -> list[Any]:
    """What fully_shard was called on, known without an import of FSDP."""
    return [module for module in model.modules() if hasattr(module, "unshard")]
