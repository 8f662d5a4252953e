"""TRL's trainers with vLLM in their own process: before each answer, only the bits of the masks that flipped travel."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

from mft.vllm.client import load
from mft.vllm.stream import MaskStream, check_masks_alone
from mft.vllm.versions import check_vllm

TASK = "policy"


@contextlib.contextmanager
def masks_in_trl() -> Iterator[None]:
    """Trainers of TRL that are made in this context send flips to their vLLM, instead of all weights.

        with mft.vllm.masks_in_trl():
            trainer = GRPOTrainer(model, args=GRPOConfig(use_vllm=True, vllm_mode="colocate", ...), ...)
        trainer.train()

    The trained model is one of mft.mask_model, or a base with a MaskPeftConfig. Its name_or_path is a directory or hub
    id of the base, which vLLM loads in the dtype of the trained model.
    Raises: RuntimeError without a supported vLLM or TRL. Making a trainer raises ValueError for another vllm_mode, for
        vllm_enable_sleep_mode, and for a model that MaskStream refuses.
    """
    check_vllm()
    generation, start = _generation()

    def init_vllm(self: Any) -> None:
        _check(self)
        check_masks_alone(self.model)
        dtype = next(self.model.parameters()).dtype  # vLLM by itself would load an fp32 model in bf16
        with patch.object(generation, "LLM", partial(_plain_llm, dtype=dtype)):
            start(self)
        self.sync_weights = MaskStream(self.llm, TASK, self.model).update

    with patch.object(generation.VLLMGeneration, "_init_vllm", init_vllm):
        yield


# ---------------------------------------------------------------------------------------------- private


def _generation() -> tuple[Any, Any]:
    """Return TRL's module that starts vLLM, and the method that does it."""
    try:
        from trl.generation import vllm_generation

        start = vllm_generation.VLLMGeneration._init_vllm
        _ = vllm_generation.VLLMGeneration.sync_weights, vllm_generation.LLM
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            "TRL must start vLLM by trl.generation.vllm_generation, as 1.16 does, got none "
            f"({type(error).__name__}: {error}): pip install 'trl>=1.16,<1.17'"
        ) from error
    return vllm_generation, start


def _check(generation: Any) -> None:
    if generation.mode != "colocate":
        raise ValueError(
            f"vllm_mode must be 'colocate' for masks, got {generation.mode!r}: for a server, start python -m mft.vllm "
            "and send the masks by mft.vllm.MaskStream"
        )
    if generation.enable_sleep_mode:
        raise ValueError(
            "vllm_enable_sleep_mode must be False for masks, got True, which throws the base's weights away: leave it "
            "out"
        )


def _plain_llm(*, model: str, quantization: str | None, **options: Any) -> Any:
    """Make the vllm.LLM that TRL asks for, with weights that masks can change."""
    if quantization is not None:
        raise ValueError(f"model must have exact weights for masks in vLLM, got {quantization}: load it unquantised")
    return load(model, {}, **options)
