"""Send the masks of a model in training to vLLM step by step: only the bits that flip are sent."""

from typing import Any

from torch import Tensor, nn

from mft.files.weights_hash import dtype_name
from mft.masks.convert import masked_modules
from mft.masks.export import base_hash
from mft.vllm.client import change
from mft.vllm.flips import Flips, flips_between, words_of_mask


class MaskStream:
    """A task in vLLM that follows the masks of model.

    Args:
        llm: what mft.vllm.load returned, or a server's address. It serves the base that model is trained on.
        task: a name that llm does not know yet.
        model: a model masked by mft.mask_model, whose masked layers are plain matrices.
    """

    def __init__(self, llm: Any, task: str, model: nn.Module) -> None:
        self.llm, self.task, self.model = llm, task, model
        self.step = 0
        self._sent: dict[str, Tensor] = {}

    def update(self) -> int:
        """Send the bits that have flipped since the last call, and print the number of bytes.

        The first call also makes vLLM answer with the masks of this task.
        Returns: the bytes. Raises: as mft.vllm.use; ValueError if vLLM serves another base. After an error, the next
            call sends the same again.
        """
        layers = masked_modules(self.model)
        masks = {name: layer.packed_mask().cpu() for name, layer in layers.items()}
        shapes = {name: (layer.scores.shape[0], layer.scores.shape[1]) for name, layer in layers.items()}
        size = sum(rows * columns for rows, columns in shapes.values())
        kept = sum(int.from_bytes(words_of_mask(mask).tobytes(), "little").bit_count() for mask in masks.values())
        first = self.step == 0
        flips = Flips(
            step=self.step,
            dropped=size - kept,
            streams=flips_between(self._sent, masks, shapes),
            shapes=shapes,
            dtypes={name: dtype_name(layer.weight) for name, layer in layers.items()} if first else {},
            base_hash=base_hash(self.model) if first else None,
        )
        change(self.llm, {"task": self.task, "flips": flips.message(text=isinstance(self.llm, str))})
        self.step, self._sent = self.step + 1, masks
        if first:
            change(self.llm, {"task": self.task})
        weights = sum(layer.weight.nbytes for layer in layers.values())
        print(
            f"{self.task}, step {flips.step}: {flips.nbytes:,d} bytes for {len(flips.streams)} of {len(layers)} layers "
            f"({100 * flips.nbytes / weights:.3f} % of their weights)"
        )
        return flips.nbytes
