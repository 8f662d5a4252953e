"""Training step of a masked model, layer by layer by hand: what both orders of work share.

    up      h1 = layer 0 (h0), ... without autograd; from the first masked layer on each layer's input, its boundary,
            is kept in host memory
    loss    of the last layer's output, the head a chunk of tokens at a time; its gradient d
    down    each layer is run again from its boundary, now with autograd, and takes d from its output to its input;
            masked layers add grad.T @ x into their buffers

Nothing else of the forward pass is kept, and of the backward pass no more than one layer's activations exist at once.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from mft.data.batches import MicroBatch
from mft.engines.layer_calls import Call, LayerCalls
from mft.engines.offload import Mover
from mft.engines.score_states import HeldMask, ScoreStates, current_masks
from mft.engines.step_errors import naming_lack_of_memory
from mft.models.frozen_layers import PrefixMemory
from mft.models.token_loss import backward_labelled_loss
from mft_kernels import MaskAdamW

OnLoss = Callable[[MicroBatch, Tensor], None]  # may raise, before any score has changed


class LayerEngine:
    """Runs steps of a masked causal LM.

    Args:
        calls, head: how the model is run; see LayerCalls and causal_lm.split_at_head.
        masks: of the masked layers; states: of their scores, None for evaluation alone.
        grad_dtype: of the gradient buffers; None: the weights' dtype.
        memory: remembers what the layers below the first masked one make of a row.
    """

    way = ""  # its name in the configuration

    def __init__(
        self,
        calls: LayerCalls,
        head: nn.Module,
        masks: Sequence[HeldMask],
        mover: Mover,
        *,
        states: ScoreStates | None = None,
        grad_dtype: torch.dtype | None = None,
        memory: PrefixMemory | None = None,
    ) -> None:
        self.calls, self.head, self.mover = calls, head, mover
        calls.device = mover.device
        self._states, self.grad_dtype, self.memory = states, grad_dtype, memory
        for mask in masks:
            mask.threshold = mask.threshold.to(mover.device)
        self.masks_of_layer = [
            [mask for mask in masks if mask.module in modules]
            for modules in (set(layer.modules()) for layer in calls.layers)
        ]
        elsewhere = [mask.name for mask in masks if mask not in self.masks]
        if elsewhere:
            raise ValueError(
                f"memory must be plain where a masked layer lies outside the decoder layers, got {self.way} and "
                f"{elsewhere[0]}: leave it out with mask.exclude_modules"
            )
        numbers = [i for i, masks in enumerate(self.masks_of_layer) if masks]
        self.first = min(numbers, default=len(calls.layers))
        self._calls_of_shape: dict[torch.Size, list[Call]] = {}

    @property
    def depth(self) -> int:
        return len(self.calls.layers)

    @property
    def masks(self) -> list[HeldMask]:
        return [mask for masks in self.masks_of_layer for mask in masks]

    @property
    def states(self) -> ScoreStates:
        assert self._states is not None, "an engine for evaluation alone takes no step"
        return self._states

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        """One optimiser step; on_loss hears each micro-batch's sum of losses before any score changes.

        Args: scale: of the gradients. lr: None is a rehearsal: gradients are made, and nothing is updated.
        Raises: whatever on_loss raises; RuntimeError for a lack of memory, naming the layer.
        """
        raise NotImplementedError

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        """What the head reads (B, T, D) for each batch, without gradients."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise NonFiniteScores, naming the layer, if the last step has made a score NaN or infinite."""
        self.states.check()

    def check_learned(self) -> None:
        """Nothing: check() has looked at every step."""

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        """Remember what the frozen layers make of these rows, as step would; nothing is trained."""
        raise NotImplementedError

    @property
    def optimizer(self) -> MaskAdamW:
        return self.states.optimizer

    def learned(self) -> dict[str, Tensor]:
        """The scores, as they rest, by the parameter's name; copies of them have arrived."""
        self.mover.finish()
        return {f"{mask.name}.scores": mask.module.scores for mask in self.masks}

    def relearned(self) -> None:
        """After a change of the scores: the masks follow."""
        for mask, selected in zip(self.masks, current_masks({mask.name: mask.module for mask in self.masks})):
            mask.packed.copy_(selected.packed)
            mask.threshold = selected.threshold.to(self.mover.device)

    def close(self) -> None:
        """Layers compute with their scores again, and these can be read."""
        self.mover.finish()
        if self._states is not None:
            self._states.close()
        for mask in self.masks:
            mask.module.release()

    # ------------------------------------------------------------------------------------------ for both orders

    def enter(self, batch: MicroBatch) -> Tensor:
        """What layer 0 reads (B, T, D)."""
        hidden, calls = self.calls.enter(batch.input_ids.to(self.mover.device))
        self._calls_of_shape.setdefault(batch.input_ids.shape, calls)
        return hidden

    def up(self, layer: int, hidden: Tensor, batch: MicroBatch) -> Tensor:
        with torch.no_grad(), self._at(f"layer {layer}, forward"):
            return self.calls.run(layer, hidden, self._calls_of_shape[batch.input_ids.shape])

    def loss(self, batch: MicroBatch, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(sum of the tokens' losses, gradient of scale * that with respect to hidden)."""
        with self._at("the loss"):
            leaf = hidden.detach().requires_grad_()
            final = self.calls.leave(batch.input_ids.to(self.mover.device), leaf)
            total = backward_labelled_loss(self.head, final, batch.labelled.to(self.mover.device), scale)
            return total, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def down(self, layer: int, hidden: Tensor, grad: Tensor, batch: MicroBatch) -> Tensor | None:
        """The gradient with respect to the layer's input; None for the first masked layer, below which none is used."""
        with self._at(f"layer {layer}, backward"):
            hidden = hidden.detach().requires_grad_(layer > self.first)
            output = self.calls.run(layer, hidden, self._calls_of_shape[batch.input_ids.shape])
            edge = get_gradient_edge(output)
            del output  # its value is needed no more
            torch.autograd.backward((edge,), (grad,))
            return hidden.grad

    def embedding_alone(self) -> list[Tensor]:
        """What only the input embedding holds: it stays on the host, from which few rows are read."""
        embedding = self.calls.embedding
        others = [m for m in self.calls.model.modules() if not any(m is part for part in embedding.modules())]
        shared = {id(t) for m in others for t in (*m._parameters.values(), *m._buffers.values())}
        return [t for t in tensors_of(embedding) if id(t) not in shared]

    def remembered(self, batch: MicroBatch) -> Tensor | None:
        """What the frozen layers make of the batch's rows, if all of them are remembered."""
        if self.memory is None or not all(row in self.memory.states for row in batch.rows):
            return None
        if batch.input_ids.shape not in self._calls_of_shape:
            return None
        return torch.stack([self.memory.states[row].to(self.mover.device) for row in batch.rows])

    def remember(self, batch: MicroBatch, hidden: Tensor) -> None:
        """hidden is what reaches the first masked layer."""
        if self.memory is not None:
            for row, state in zip(batch.rows, hidden):
                self.memory.remember(row, state)

    def _at(self, place: str) -> AbstractContextManager:
        return naming_lack_of_memory(place, lambda: f"{self._live()}. {self._remedy()}")

    def _live(self) -> str:
        scores = {id(mask.module.scores) for mask in self.masks}
        tensors = [t for t in tensors_of(self.calls.model) if id(t) not in scores]
        here = sum(t.nbytes for t in tensors if t.device.type == self.mover.device.type)
        grads = sum(mask.grad.nbytes for mask in self.masks if mask.grad is not None)
        sizes = [f"weights {here / 1e9:.2f} GB", f"gradient buffers {grads / 1e9:.2f} GB"]
        if self.mover.device.type == "cuda":
            sizes.append(f"all tensors {torch.cuda.memory_allocated(self.mover.device) / 1e9:.2f} GB")
        return f"live on {self.mover.device} under memory: {self.way}: {', '.join(sizes)}"

    def _remedy(self) -> str:
        return "Set train.batch_size or data.sequence_length lower; `mft estimate` tells what fits"


class Resident(LayerEngine):
    """All weights, masks and gradient buffers on the device; one micro-batch after another."""

    way = "resident"

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        elsewhere = {id(mask.module.scores) for mask in self.masks} | {id(t) for t in self.embedding_alone()}
        for tensor in tensors_of(self.calls.model):
            if id(tensor) in elsewhere:
                tensor.data = self.mover.rest(tensor.data)
            else:
                tensor.data = tensor.data.to(self.mover.device)
        for mask in self.masks:
            mask.packed = mask.packed.to(self.mover.device)
            mask.hold(None if self._states is None else self.states.new_buffer(mask, self.grad_dtype))

    def step(
        self, batches: Sequence[MicroBatch], scale: float, lr: float | None, max_norm: float | None, on_loss: OnLoss
    ) -> None:
        masks = self.masks
        for mask in masks:
            assert mask.grad is not None
            mask.grad.zero_()
        for batch in batches:
            boundaries: list[Tensor] = []
            total, grad = self.loss(batch, self._climb(batch, boundaries), scale)
            on_loss(batch, total)
            top = [grad]
            del grad  # the way down is not to hold the gradient at its top
            self._descend(batch, boundaries, top)
        if lr is None:
            return
        with self._at("the optimiser step"):
            factor = None if max_norm is None else self.states.clip_factor(max_norm)
            self.states.update(masks, lr, factor)

    def hidden_states(self, batches: Sequence[MicroBatch]) -> Iterator[Tensor]:
        for batch in batches:
            hidden = self.enter(batch)
            for layer in range(self.depth):
                hidden = self.up(layer, hidden, batch)
            with torch.no_grad():
                yield self.calls.leave(batch.input_ids.to(self.mover.device), hidden)

    def _climb(self, batch: MicroBatch, boundaries: list[Tensor]) -> Tensor:
        """The last layer's output; boundaries become those from the first masked layer on, in host memory."""
        hidden = self._below(batch)
        for layer in range(self.first, self.depth):
            boundaries.append(self.mover.store(hidden))
            hidden = self.up(layer, hidden, batch)
        self.mover.let_go()
        return hidden

    def recall(self, batches: Sequence[MicroBatch]) -> None:
        if self.memory is not None:
            for batch in batches:
                self._below(batch)

    def _below(self, batch: MicroBatch) -> Tensor:
        """What reaches the first masked layer."""
        hidden = self.remembered(batch)
        if hidden is None:
            hidden = self.enter(batch)
            for layer in range(self.first):
                hidden = self.up(layer, hidden, batch)
            self.remember(batch, hidden)
        return hidden

    def _descend(self, batch: MicroBatch, boundaries: list[Tensor], grads: list[Tensor]) -> None:
        """grads holds the gradient of the last layer's output; empties both."""
        arriving = self.mover.bring(boundaries[-1:])
        for layer in reversed(range(self.first, self.depth)):
            (hidden,) = arriving.wait()
            self.mover.give_back(boundaries.pop())
            arriving = self.mover.bring(boundaries[-1:])
            d_hidden = self.down(layer, hidden, grads.pop(), batch)
            grads += [] if d_hidden is None else [d_hidden]
            del d_hidden

    def close(self) -> None:
        super().close()
        for tensor in self.embedding_alone():  # the model is whole again: all but the scores on the device
            tensor.data = tensor.data.to(self.mover.device)

    def _remedy(self) -> str:
        return f"Set memory: layerwise, or: {super()._remedy()}"


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, quantised weights among these."""
    return [*module.parameters(), *module.buffers()]
