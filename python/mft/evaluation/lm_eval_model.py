"""lm-eval's model ``mft``, whose argument is a directory of masks: they are put on the base that they name.

    python -m mft.evaluation.lm_eval_model --model mft --model_args pretrained=runs/masks --tasks gsm8k

This is lm-eval's own command line with all its options: up to 0.4.13 it looks for models in its own package alone. In
Python, importing this module makes the model known to simple_evaluate.
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
    """lm-eval's HFLM on a base with masks: merged into exact weights, or live on the quantised ones they learned on.

    Args:
        pretrained: what save_masks wrote, a run of mft train, or a repository of the hub as for load_masks.
        base: as model.name in a configuration; by default the one that the masks name.
        dtype: of the base; "auto" for that in which the masks were learned.
        device: as for hf; a GPU where there is none means the CPU.
        force: accept other base weights of the same shapes.
        unquantized: on exact weights, also if the masks were learned on quantised ones.
        softmax_dtype, options: as HFLM takes them beside a model that is loaded already.
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
        softmax_dtype: str = "float32",
        **options: Any,
    ) -> None:
        model, tokenizer = load_masked(pretrained, base, dtype, force=force, unquantized=unquantized)
        # lm-eval's command line names cuda:0 unless told otherwise.
        without_gpu = device.startswith("cuda") and not torch.cuda.is_available()
        model.to("cpu" if without_gpu else device)
        refuse_long_batches(model)
        super().__init__(pretrained=model, tokenizer=tokenizer, softmax_dtype=softmax_dtype, **options)


def load_masked(
    directory: str | os.PathLike, base: str | None, dtype: str, *, force: bool, unquantized: bool
) -> tuple[Any, Any]:
    """(model, tokenizer) of MaskedLM."""
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


# By name, so that `python -m`, which runs this file beside the module, registers the one class twice and not two.
model_registry.register("mft", target="mft.evaluation.lm_eval_model:MaskedLM")

if __name__ == "__main__":
    cli_evaluate()
