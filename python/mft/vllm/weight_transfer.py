"""The weight-transfer engines that vLLM runs in its worker: one task's masks in the weights, or all tasks' apart."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from mft.vllm.empty_loras import NO_MODULES
from mft.vllm.mask_flips import read_flips
from mft.vllm.plain_linear import is_plain
from mft.vllm.slices import Slices
from mft.vllm.slots import Slots
from mft.vllm.task_masks import Tasks
from mft.vllm.token_masks import TokenMasks, masks_by_layer
from mft.vllm.worker_errors import PER_REQUEST, mark_errors

logger = logging.getLogger(__name__)


@dataclass
class MaskInit(WeightTransferInitInfo):
    """Tasks to add. tasks: {name: directory of its masks}."""

    tasks: dict[str, str] = field(default_factory=dict)
    force: bool = False


@dataclass
class PerRequestInit(MaskInit):
    """All tasks, and the id of the LoRA that stands for each."""

    loras: dict[str, int] = field(default_factory=dict)


@dataclass
class MaskUpdate(WeightTransferUpdateInfo):
    """A switch to task (None: the base), or, if flips are given, one step of the task's masks."""

    task: str | None
    flips: dict[str, Any] | None = None


class MaskTransferEngine(WeightTransferEngine[MaskInit, MaskUpdate]):
    """Holds the tasks. Each call makes the whole change, or raises and changes nothing."""

    init_info_cls = MaskInit
    update_info_cls = MaskUpdate
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        _check(self.must_have(vllm_config))
        self.slices = Slices(model, is_plain)
        self.tasks = Tasks(self.slices.find)

    @staticmethod
    def must_have(vllm_config: Any) -> dict[str, tuple[Any, Any]]:
        """In words, what is and what must be: for the rest was not tried, or would answer with other weights."""
        return {
            "one process without parallelism": (vllm_config.parallel_config.world_size, 1),
            "no LoRA": (vllm_config.lora_config is not None, False),
            "an attention without absorbed weights (MLA)": (bool(vllm_config.model_config.use_mla), False),
            "quantization='mft'": (vllm_config.model_config.quantization, "mft"),
        }

    def init_transfer_engine(self, init_info: MaskInit) -> None:
        with mark_errors():
            self.tasks.add(init_info.tasks, force=init_info.force)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Do the same as the base class, but without waiting for an accelerator, which a CPU machine does not have."""
        with mark_errors():
            self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: MaskUpdate) -> None:
        begin = time.perf_counter()
        if update_info.flips is None:
            count = self.tasks.use(update_info.task)
        else:
            count = self.tasks.flip(str(update_info.task), read_flips(update_info.flips))
        logger.debug("%s: %d weights in %.1f ms", update_info.task, count, 1e3 * (time.perf_counter() - begin))

    def start_weight_update(self) -> None:
        """Nothing to prepare: weights change in place."""

    def finish_weight_update(self) -> None:
        """Nothing to finish."""

    def shutdown(self) -> None:
        """Nothing is held outside the process."""


class PerRequestEngine(MaskTransferEngine):
    """The weights stay the base's: each token's product takes the masks of its request's task. Experimental."""

    init_info_cls = PerRequestInit

    @staticmethod
    def must_have(vllm_config: Any) -> dict[str, tuple[Any, Any]]:
        """Return what a switch needs too, and: a compiled model skips the choice, an image tower has other tokens."""
        lora, model = vllm_config.lora_config, vllm_config.model_config
        return MaskTransferEngine.must_have(vllm_config) | {
            "no LoRA": (lora is None or lora.target_modules != NO_MODULES, False),
            "an eager model (enforce_eager)": (model.enforce_eager, True),
            "a model of text alone": (model.is_multimodal_model, False),
        }

    def init_transfer_engine(self, init_info: PerRequestInit) -> None:
        count = len(init_info.tasks)
        with mark_errors():
            if init_info.tasks.keys() != init_info.loras.keys():
                raise ValueError(
                    f"tasks must be given at the start with masks per request, got {', '.join(init_info.tasks)} later: "
                    "start vLLM again with all of them"
                )
            slots = Slots(self.model, {init_info.loras[task]: i for i, task in enumerate(init_info.tasks)})
            tasks = Tasks(self.slices.find)  # not kept: it holds the values that a switch puts back
            tasks.add(init_info.tasks, force=init_info.force)
        for layer, masks in masks_by_layer(tasks, self.slices.layer_of).items():
            layer.quant_method.token_masks = TokenMasks(masks, slots.tasks_of_tokens, count)
        logger.warning("masks per request are experimental (%d tasks)", count)

    def receive_weights(self, update_info: MaskUpdate) -> None:
        raise ValueError(PER_REQUEST)


def _check(must_have: dict[str, tuple[Any, Any]]) -> None:
    for words, (found, wanted) in must_have.items():
        if found != wanted:
            raise ValueError(
                f"masks in vLLM must have {words}, got {found}: start vLLM that way, or serve a merged model"
            )
