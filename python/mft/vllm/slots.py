"""Which task each token of the running batch has, read from the inside of vLLM's LoRA machinery: here alone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mft.vllm.versions import INSTALL


class Slots:
    """The LoRA slot of each token, as the number of a task.

    loras: the number of a task by the id of its LoRA. Raises: ValueError if model has no lora_manager of vLLM.
    """

    def __init__(self, model: Any, loras: Mapping[int, int]) -> None:
        self._loras = loras
        self._ids: list[int | None] | None = None  # for which _numbers was made
        self._numbers = torch.empty(0)
        try:
            self._manager = model.lora_manager
            [self._punica] = self._manager.punica_wrapper_mapping.values()
            if not isinstance(self._manager.lora_index_to_id, list) or self._punica.token_lora_indices.dim() != 1:
                raise TypeError("they are of another kind")
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "vLLM must tell the LoRA slot of each token (lora_manager, token_lora_indices), and this one does not "
                f"({type(error).__name__}: {error}): {INSTALL}, or serve without --per-request"
            ) from error

    def tasks_of_tokens(self) -> Tensor:
        """(tokens,), -1 for the base. Raises: RuntimeError if a LoRA is active that is no task's."""
        ids = self._manager.lora_index_to_id
        if ids != self._ids:
            strange = [each for each in ids if each is not None and each not in self._loras]
            if strange:
                raise RuntimeError(f"each LoRA must be a task's with masks per request, got ids {strange}: remove them")
            self._numbers = torch.tensor([*(-1 if each is None else self._loras[each] for each in ids), -1])
            self._ids = list(ids)
        return self._numbers[self._punica.token_lora_indices]  # index -1, no slot, takes the last
