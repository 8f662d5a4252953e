"""Training step of a masked model, layer by layer: the base class of resident.py and layerwise.py.

    up      h1 = layer 0 (h0), ... without autograd. From the first masked layer on, each layer's input (its boundary)
            is kept in host memory.
    loss    computed from the last layer's output, with the head applied to a chunk of tokens at a time; gives the
            gradient d (see objectives/).
    down    each layer runs again from its boundary, now with autograd, and takes d from its output to its input.
            Masked layers add grad.T @ x into their buffers.

Nothing else of the forward pass is kept. In the backward pass only one layer's activations exist at once. If the
objective needs the base model, the way up also runs the layers with all weights kept, from the first masked layer on.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from mft.config import TrainConfig
from mft.data.batches import MicroBatch
from mft.engines.layer_calls import Call, LayerCalls
from mft.engines.offload import Mover
from mft.engines.placed import Placed
from mft.engines.score_states import HeldMask, ScoreStates, grad_dtype, score_groups, score_optimizer
from mft.engines.step import Runner, naming_lack_of_memory
from mft.masks.base_pass import use_whole_weights
from mft.masks.budget import budget_of
from mft.models.longrope import inputs_of


class LayerEngine(Runner):
    """Runs steps of a masked causal LM.

    Args: placed: its memory caches the outputs of the layers below the first masked one; calls, head: see LayerCalls
        and causal_lm.split_at_head; train: None for evaluation only.
    """

    states: ScoreStates

    def __init__(
        self,
        placed: Placed,
        calls: LayerCalls,
        head: nn.Module,
        masks: Sequence[HeldMask],
        mover: Mover,
        train: TrainConfig | None = None,
    ) -> None:
        self.model, self.calls, self.head, self.mover = placed.model, calls, head, mover
        self.objective, self._mode = placed.objective, placed.mode
        calls.device = mover.device
        self.memory = None if train is None else placed.memory
        self.grad_dtype = None if train is None else grad_dtype(train)
        self.at_once = None if train is None else train.batches_at_once  # for layerwise
        self.trains = train is not None
        if train is not None:
            optimizer = score_optimizer(score_groups(mask.module for mask in masks), train)
            of_model = (placed.processes, placed.surrogate, budget_of(placed.model))
            self.states = ScoreStates(masks, optimizer, mover, *of_model)
        for mask in masks:
            mask.threshold = mask.threshold.to(mover.device)
        self.masks_of_layer = [
            [mask for mask in masks if mask.module in modules]
            for modules in (set(layer.modules()) for layer in calls.layers)
        ]
        elsewhere = [mask.name for mask in masks if mask not in self.masks]
        if elsewhere:
            raise ValueError(
                f"memory must be plain if a masked layer lies outside the decoder layers, got {self._mode.name} and "
                f"{elsewhere[0]}: leave it out with mask.exclude_modules"
            )
        numbers = [i for i, masks in enumerate(self.masks_of_layer) if masks]
        self.first = min(numbers, default=len(calls.layers))
        self._calls_of_shape: dict[torch.Size, list[Call]] = {}
        self._calls_of_batch: WeakKeyDictionary[MicroBatch, list[Call]] = WeakKeyDictionary()  # if it has position_ids

    @property
    def depth(self) -> int:
        return len(self.calls.layers)

    @property
    def masks(self) -> list[HeldMask]:
        return [mask for masks in self.masks_of_layer for mask in masks]

    def close(self) -> None:
        """Let the layers compute with their scores again. The scores can then be read."""
        self.mover.finish()
        if self.trains:
            self.states.close()
        for mask in self.masks:
            mask.module.release()

    # ------------------------------------------------------------------------------------------ for both subclasses

    def enter(self, batch: MicroBatch) -> Tensor:
        """Return the input of layer 0 (B, T, D)."""
        ids, positions = inputs_of(batch, self.calls.model, self.mover.device)
        hidden, calls = self.calls.enter(ids, positions)
        if positions is None:
            self._calls_of_shape.setdefault(batch.input_ids.shape, calls)
        else:
            self._calls_of_batch[batch] = calls
        return hidden

    def _calls_of(self, batch: MicroBatch) -> list[Call] | None:
        """Return the layers' arguments for this batch, or None if neither it nor a batch with the same ones entered."""
        if batch in self._calls_of_batch:
            return self._calls_of_batch[batch]
        return self._calls_of_shape.get(batch.input_ids.shape) if batch.position_ids is None else None

    def _run(self, layer: int, hidden: Tensor, batch: MicroBatch) -> Tensor:
        calls = self._calls_of(batch)
        assert calls is not None, "a batch enters before it runs"
        return self.calls.run(layer, hidden, calls)

    def forward_layer(self, layer: int, hidden: Tensor, batch: MicroBatch) -> Tensor:
        with torch.no_grad(), self._name_place(f"layer {layer}, forward"):
            return self._run(layer, hidden, batch)

    def forward_base_layer(self, layer: int, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Run the layer like forward_layer, but with every weight kept."""
        with use_whole_weights(self.calls.layers[layer]):
            return self.forward_layer(layer, hidden, batch)

    def loss(
        self, batch: MicroBatch, hidden: Tensor, scale: float, base: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the sum of losses and d(scale * sum) / d(hidden). base: as hidden, if the objective needs it."""
        with self._name_place("the loss"):
            reference = None if base is None else self._head_input(batch, base)
            leaf = hidden.detach().requires_grad_()
            final = self.calls.leave(batch.input_ids.to(self.mover.device), leaf)
            total = self.objective.backward(self.head, final, batch, scale, reference)
            return total, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def remember_base(self, batch: MicroBatch, base: Tensor) -> None:
        """Remember the base's results for a batch that was trained on before the run was resumed."""
        with self._name_place("the base's loss"):
            self.objective.remember(self.head, self._head_input(batch, base), batch)

    def _head_input(self, batch: MicroBatch, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return self.calls.leave(batch.input_ids.to(self.mover.device), hidden)

    def backward_layer(self, layer: int, hidden: Tensor, grad: Tensor, batch: MicroBatch) -> Tensor | None:
        """Return the gradient with respect to the layer's input, or None for the first masked layer."""
        with self._name_place(f"layer {layer}, backward"):
            hidden = hidden.detach().requires_grad_(layer > self.first)
            output = self._run(layer, hidden, batch)
            edge = get_gradient_edge(output)
            del output  # only its place in the graph is needed
            torch.autograd.backward((edge,), (grad,))
            return hidden.grad

    def embedding_alone(self) -> list[Tensor]:
        """Return the tensors that only the input embedding holds. They stay on the host, since few rows are read."""
        embedding = self.calls.embedding
        others = [m for m in self.calls.model.modules() if not any(m is part for part in embedding.modules())]
        shared = {id(t) for m in others for t in (*m._parameters.values(), *m._buffers.values())}
        return [t for t in tensors_of(embedding) if id(t) not in shared]

    def remembered(self, batch: MicroBatch) -> Tensor | None:
        """Return the frozen layers' cached output for the batch, or None if a row has none. Its calls must be known."""
        if not self._is_cached(batch):
            return None
        assert self.memory is not None
        return torch.stack([self.memory.states[row].to(self.mover.device) for row in batch.rows])

    def _is_cached(self, batch: MicroBatch) -> bool:
        return self.memory is not None and all(row in self.memory.states for row in batch.rows)

    def batches_without_calls(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Return the batches whose rows are all cached but whose layer arguments are unknown: they have to enter."""
        return [batch for batch in batches if self._is_cached(batch) and self._calls_of(batch) is None]

    def remember(self, batch: MicroBatch, hidden: Tensor) -> None:
        """Cache hidden, the input of the first masked layer, for the rows of the batch."""
        if self.memory is not None:
            for row, state in zip(batch.rows, hidden):
                self.memory.remember(row, state)

    def _name_place(self, place: str) -> AbstractContextManager:
        return naming_lack_of_memory(place, lambda: f"{self._live()}. {self._remedy()}")

    def _live(self) -> str:
        scores = {id(mask.module.scores) for mask in self.masks}
        tensors = [t for t in tensors_of(self.calls.model) if id(t) not in scores]
        here = sum(t.nbytes for t in tensors if t.device.type == self.mover.device.type)
        grads = sum(mask.grad.nbytes for mask in self.masks if mask.grad is not None)
        sizes = [f"weights {here / 1e9:.2f} GB", f"gradient buffers {grads / 1e9:.2f} GB"]
        if self.mover.device.type == "cuda":
            sizes.append(f"all tensors {torch.cuda.memory_allocated(self.mover.device) / 1e9:.2f} GB")
        return f"live on {self.mover.device} under memory: {self._mode.name}: {', '.join(sizes)}"

    def _remedy(self) -> str:
        return "Set train.batch_size or data.sequence_length lower; `mft estimate` tells what fits"


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return the module's parameters and buffers. Quantised weights are buffers."""
    return [*module.parameters(), *module.buffers()]
