"""The weight-transfer engine that vLLM runs in its worker: masks by task, one of which is applied to the weights."""

import logging
import time
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from mft.vllm.failures import marked
from mft.vllm.flips import read_flips
from mft.vllm.plain_linear import is_plain
from mft.vllm.slices import Slices
from mft.vllm.tasks import Tasks

logger = logging.getLogger(__name__)


@dataclass
class MaskInit(WeightTransferInitInfo):
    """Tasks to add. tasks: {name: directory of its masks}."""

    tasks: dict[str, str] = field(default_factory=dict)
    force: bool = False


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
        _check_served(vllm_config)
        self.tasks = Tasks(Slices(model, is_plain).find)

    def init_transfer_engine(self, init_info: MaskInit) -> None:
        with marked():
            self.tasks.add(init_info.tasks, force=init_info.force)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Do the same as the base class, but without waiting for an accelerator, which a CPU machine does not have."""
        with marked():
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


def _check_served(vllm_config: Any) -> None:
    """Raise ValueError for settings that were not tried, or with which answers would not use the masked weights."""
    refused = {
        "one process without parallelism": (vllm_config.parallel_config.world_size, 1),
        "no LoRA": (vllm_config.lora_config is not None, False),
        "an attention without absorbed weights (MLA)": (bool(vllm_config.model_config.use_mla), False),
        "quantization='mft'": (vllm_config.model_config.quantization, "mft"),
    }
    for words, (found, wanted) in refused.items():
        if found != wanted:
            raise ValueError(
                f"masks in vLLM must have {words}, got {found}: start vLLM that way, or serve a merged model"
            )
