"""Run a decoder layer by layer, with the arguments that the model's own forward would pass to each layer.

    enter(ids)            embeddings -> the input of layer 0, and each layer's other arguments (rotations, masks)
    run(i, hidden, calls) one layer
    leave(ids, hidden)    the output of the last layer -> the input of the head

The model's own forward is not rewritten: enter and leave run it as it is, with its layers replaced.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from mft.models.causal_lm import Run, decoder_layers, replace_forwards

Call = tuple[tuple[Any, ...], dict[str, Any]]  # one layer's arguments besides the hidden states, unnamed and named


class LayerCalls:
    """Runs the layers of ``model`` one by one. run(model, input_ids): the head's input; see causal_lm.split_at_head."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self._run = model, run
        self.layers = decoder_layers(model)
        self.embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self.device: torch.device | None = None  # where the embedding's output goes; None: it stays with the embedding
        self._returns_tuple = False

    def check(self, input_ids: Tensor) -> None:
        """Raise ValueError if layer by layer and the model's own forward differ on these few tokens (1, T).

        In some architectures later layers read more from earlier layers than the hidden states.
        """
        outputs: list = []
        handle = self.layers[0].register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            with torch.no_grad():
                whole = self._run(self.model, input_ids)
        finally:
            handle.remove()
        self._returns_tuple = isinstance(outputs[0], tuple)
        with torch.no_grad():
            hidden, calls = self.enter(input_ids)
            _, others = self.enter(input_ids.flip(-1))
            for i in range(len(self.layers)):
                hidden = self.run(i, hidden, calls)
            ours = self.leave(input_ids, hidden)
        # Not compared exactly: a kernel's order of sums may differ between calls. The loss is checked for NaN later.
        tolerance = 0.01 * whole.nan_to_num().abs().max().item()
        same = torch.isclose(ours, whole, rtol=0, atol=tolerance, equal_nan=True).all()
        if not same or not all(map(_equal, calls, others)):
            raise ValueError(
                f"memory must be plain for {type(self.model).__name__}: its layers pass on more than hidden states, "
                f"or read the tokens (run one by one, they change the output by {(ours - whole).abs().max():.3g})"
            )

    @torch.no_grad()
    def enter(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, list[Call]]:
        """Return the hidden states (B, T, D) that layer 0 reads, and each layer's call."""
        entered: list[Tensor] = []
        calls: list[Call] = []

        def note(hidden: Tensor, *args, **kwargs):
            entered.append(hidden)
            calls.append((args, kwargs))
            return self._returned(hidden)

        with self._embedding_anywhere(), replace_forwards(self.layers, lambda layer: note):
            self._run(self.model, input_ids, position_ids)
        return entered[0], calls

    def run(self, index: int, hidden: Tensor, calls: list[Call]) -> Tensor:
        """Return the output of layer ``index`` for hidden (B, T, D)."""
        args, kwargs = calls[index]
        output = self.layers[index](hidden, *args, **kwargs)
        return output[0] if self._returns_tuple else output

    def leave(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the input of the head for the output of the last layer; differentiable in hidden."""
        returned = self._returned(hidden)
        with self._embedding_anywhere(), replace_forwards(self.layers, lambda layer: lambda *args, **kwargs: returned):
            return self._run(self.model, input_ids)

    def _embedding_anywhere(self) -> AbstractContextManager[None]:
        """Return a context in which the embedding looks its rows up on its own device and moves them to self.device."""
        look_up = self.embedding.forward

        def forward(input_ids: Tensor) -> Tensor:
            rows = look_up(input_ids.to(next(self.embedding.parameters()).device))
            return rows if self.device is None else rows.to(self.device)

        return replace_forwards([self.embedding], lambda embedding: forward)

    def _returned(self, hidden: Tensor) -> Tensor | tuple[Tensor]:
        return (hidden,) if self._returns_tuple else hidden


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return a is b or a == b
