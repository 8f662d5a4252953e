"""A model ``mft`` for lm-eval. Its argument is a directory of masks, which are loaded onto the base that they name.

    python -m mft.evaluation.lm_eval_model --model mft --model_args pretrained=runs/masks --tasks gsm8k

This is lm-eval's own command line with all its options. It is needed because lm-eval up to 0.4.13 looks for models only
in its own package. In Python, importing this module makes the model known to simple_evaluate.
"""

import os
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
from lm_eval.models.huggingface import HFLM

from mft.config import ModelConfig
from mft.evaluation.evaluated_base import evaluated_base
from mft.masks.convert import merge_model
from mft.masks.export import load_masks
from mft.masks.export_format import read_export
from mft.masks.location import masks_directory
from mft.masks.quantize import quantize_model
from mft.models.longrope import refuse_long_batches
from mft.models.pretrained import load_model


class MaskedLM(HFLM):
    """lm-eval's HFLM on a base with masks: merged into exact weights, or separate over quantised ones.

    Args:
        pretrained: A directory that save_masks wrote, a run of mft train, or a hub repository as for load_masks.
        base, dtype: Of the base; by default (dtype: "auto") those that the masks name.
        device: As for lm-eval's hf model. If it is a GPU and there is none, the CPU is used.
        force: Accept other base weights of the same shapes.
        unquantized: Use exact weights even if the masks were learned on quantised ones.
        options: As for HFLM with a model that is loaded already. softmax_dtype is float32 if it is not given.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        base: str | None = None,
        dtype: str = "auto",
        device: str = "cuda",
        force: bool = False,
        unquantized: bool = False,
        **options: Any,
    ) -> None:
        model, tokenizer = load_masked(pretrained, base, dtype, force=force, unquantized=unquantized)
        # lm-eval's command line passes cuda:0 by default.
        without_gpu = device.startswith("cuda") and not torch.cuda.is_available()
        model.to("cpu" if without_gpu else device)
        refuse_long_batches(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, **{"softmax_dtype": "float32"} | options)


def load_masked(
    directory: str | os.PathLike, base: str | None, dtype: str, *, force: bool, unquantized: bool
) -> tuple[Any, Any]:
    """Return (model, tokenizer) for MaskedLM."""
    path = masks_directory(directory)
    export = read_export(path)
    name = base or export.base_model_name_or_path
    if name is None:
        raise ValueError(f"base must name the model that the masks are for, {path} does not: --model_args base=...")
    config = ModelConfig(name, dtype=export.modules[0].dtype if dtype == "auto" else dtype)
    kind, quantize_masked = evaluated_base(config, export, unquantized)
    model, tokenizer = load_model(config)
    load_masks(model, path, force=force)
    if kind is None:
        return merge_model(model), tokenizer
    return quantize_model(model.requires_grad_(False), kind, masked=quantize_masked), tokenizer


# By name: `python -m` runs this file as a second module, and two different classes could not share the name.
model_registry.register("mft", target="mft.evaluation.lm_eval_model:MaskedLM")

if __name__ == "__main__":
    cli_evaluate()
