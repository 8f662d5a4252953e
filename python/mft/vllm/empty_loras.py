"""A LoRA for each task that changes nothing: by it vLLM knows the task of each token, and keys its prefix cache.

All tasks share one adapter of zeros, and no layer takes LoRA: vLLM computes nothing for it.
"""

import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from mft.masks.export_format import read_description
from mft.masks.location import masks_directory
from mft.vllm.worker_errors import check_known
from mft_kernels.internal import MOST_MASKS

EAGER = "on with masks per request, which a compiled model would not read"
NO_MODULES = ["mft-per-request"]  # the layers that take LoRA, by a name that none has


class Adapters:
    """The LoRAs of tasks; their directory lives as long as this object. Raises: ValueError for too many tasks."""

    def __init__(self, tasks: Mapping[str, str | os.PathLike]) -> None:
        if not 1 <= len(tasks) <= MOST_MASKS:
            raise ValueError(
                f"tasks must be 1 to {MOST_MASKS} with masks per request, got {len(tasks)}: start a server for each "
                f"{MOST_MASKS}, or switch tasks without --per-request (per_request=True)"
            )
        self.ids = {task: number for number, task in enumerate(tasks, 1)}
        self.path = tempfile.mkdtemp(prefix="mft-vllm-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
        layer = read_description(masks_directory(next(iter(tasks.values())))).modules[0]  # vLLM wants one at least
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": [layer.name.rpartition(".")[2]]}
        zeros = {"A": torch.zeros(1, layer.shape[-1]), "B": torch.zeros(layer.shape[-2], 1)}
        (Path(self.path) / "adapter_config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(
            {f"base_model.model.{layer.name}.lora_{side}.weight": zero for side, zero in zeros.items()},
            Path(self.path) / "adapter_model.safetensors",
        )

    @property
    def options(self) -> dict[str, Any]:
        """Of vLLM, by which there is a slot for each task."""
        return {
            "enable_lora": True,
            "max_loras": len(self.ids),
            "max_lora_rank": 1,
            "lora_target_modules": NO_MODULES,
        }

    def request(self, task: str) -> Any:
        """The vllm.lora.request.LoRARequest of a task. Raises: ValueError for an unknown one."""
        check_known(task, self.ids)
        from vllm.lora.request import LoRARequest

        return LoRARequest(task, self.ids[task], self.path)
