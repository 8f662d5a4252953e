"""Models inside torch.compile, DistributedDataParallel or fully_shard: get the inner model and its whole parameters."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

# What to use instead of DeepSpeed; part of a message.
INSTEAD = "use FSDP2, by memory: sharded under torchrun, or by accelerate launch with fsdp_version: 2"


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DistributedDataParallel and DataParallel, else model itself."""
    inner = uncompiled(model)
    if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(inner.module)
    return inner


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, which has the same parameters and names, else model itself."""
    return getattr(model, "_orig_mod", model)


def check_no_deepspeed(model: nn.Module) -> None:
    """Raise ValueError if DeepSpeed runs the model, or (ZeRO-3) has partitioned its parameters."""
    engine = type(model).__name__ == "DeepSpeedEngine"
    if engine or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        what = "a DeepSpeedEngine" if engine else f"a {type(model).__name__} that its ZeRO-3 has partitioned"
        raise ValueError(
            f"model must not be DeepSpeed's, because its flat partitions hold no rows of a mask, got {what}: {INSTEAD}"
        )


def check_unsharded(model: nn.Module) -> None:
    """Raise ValueError if fully_shard has sharded the model over processes."""
    if _sharded(model):
        raise ValueError(
            f"model must not be sharded yet, got a {type(model).__name__} that fully_shard has spread over processes: "
            "load_masks before fully_shard; to merge, save_masks under mft.gathered(model), then load_masks and "
            "merge_model on the base"
        )


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """Make the parameters that fully_shard (FSDP2) has sharded whole in this context. Every process must enter.

    save_masks needs this:

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
    """Return the modules that fully_shard was called on, found without importing FSDP."""
    return [module for module in model.modules() if hasattr(module, "unshard")]
