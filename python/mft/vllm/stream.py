"""Send the masks of a model in training to vLLM step by step: only the bits that flip are sent."""

from typing import Any

from torch import Tensor, nn

from mft.files.weights_hash import dtype_name, weights_hash
from mft.masks.convert import masked_modules
from mft.masks.export import base_hash
from mft.masks.merged_weights import is_peft_mask
from mft.models.parallel import check_unsharded, unwrapped
from mft.vllm.client import change
from mft.vllm.mask_flips import Flips, flips_between, words_of_mask


class MaskStream:
    """A task in vLLM that follows the masks of model.

    Args:
        llm: what mft.vllm.load returned, or a server's address. It serves the base that model is trained on.
        task: a name that llm does not know yet.
        model: of mft.mask_model, or a PeftModel whose active adapter is a mask. Its masked layers are plain matrices.
        api_key: an admin's, for a server.
    Raises: ValueError if nothing is masked, or if other parameters than scores are trained.
    """

    def __init__(self, llm: Any, task: str, model: nn.Module, *, api_key: str | None = None) -> None:
        self.llm, self.task, self.model = llm, task, model
        self.step, self._api_key = 0, api_key
        self._sent: dict[str, Tensor] = {}
        check_masks_alone(model)

    def update(self) -> int:
        """Send the bits that have flipped since the last call, and print the number of bytes.

        The first call also makes vLLM answer with the masks of this task.
        Returns: the bytes. Raises: as mft.vllm.use; ValueError if vLLM serves another base. After an error, the next
            call sends the same again.
        """
        masks, weights = _masks_and_weights(self.model)
        shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        size = sum(rows * columns for rows, columns in shapes.values())
        kept = sum(int.from_bytes(words_of_mask(mask).tobytes(), "little").bit_count() for mask in masks.values())
        first = self.step == 0
        flips = Flips(
            step=self.step,
            dropped=size - kept,
            streams=flips_between(self._sent, masks, shapes),
            shapes=shapes,
            dtypes={name: dtype_name(weight) for name, weight in weights.items()} if first else {},
            base_hash=_hash(self.model, weights) if first else None,
        )
        flipped = flips.message(text=isinstance(self.llm, str))
        change(self.llm, {"task": self.task, "flips": flipped}, self._api_key)
        self.step, self._sent = self.step + 1, masks
        if first:
            change(self.llm, {"task": self.task}, self._api_key)
        nbytes = sum(weight.nbytes for weight in weights.values())
        print(
            f"{self.task}, step {flips.step}: {flips.nbytes:,d} bytes for {len(flips.streams)} of {len(weights)} "
            f"layers ({100 * flips.nbytes / nbytes:.3f} % of their weights)"
        )
        return flips.nbytes


def check_masks_alone(model: nn.Module) -> None:
    """Raise ValueError if a model cannot be followed by its masks: none, sharded, or trained in other parameters."""
    check_unsharded(model)
    scores = [id(layer.scores) for layer in masked_modules(model).values()]
    scores += [id(each) for layer in _peft_layers(model) for each in layer.mft_scores.parameters()]
    if not scores:
        raise ValueError(f"model must have masks, got a {type(model).__name__} without: use mft.mask_model")
    others = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in scores]
    if others:
        raise ValueError(
            f"model must train nothing but scores, as only masks are sent, got {len(others)} more such as {others[0]}: "
            "freeze them (requires_grad_(False)), or send mft.merged_weights(model)"
        )


# ---------------------------------------------------------------------------------------------- private


def _masks_and_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the packed masks on the CPU, and the weights (N, K), by the layers' names in the unmasked model."""
    masks = {name: layer.packed_mask() for name, layer in masked_modules(unwrapped(model)).items()}
    weights = {name: layer.weight for name, layer in masked_modules(unwrapped(model)).items()}
    for layer in _peft_layers(model):
        for part, packed, weight in layer.active_masks():
            masks[layer.names[part]], weights[layer.names[part]] = packed, weight
    return {name: mask.cpu() for name, mask in masks.items()}, weights


def _hash(model: nn.Module, weights: dict[str, Tensor]) -> str:
    if _peft_layers(model):
        return weights_hash(weights, weights.__getitem__)
    return base_hash(unwrapped(model))


def _peft_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_peft_mask(module)]
