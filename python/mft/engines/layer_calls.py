"""A decoder run layer by layer by hand: what its own forward would hand each layer, captured once.

    enter(ids)            embeddings -> what layer 0 reads, and each layer's further arguments (rotations, masks)
    run(i, hidden, calls) one layer
    leave(ids, hidden)    what the last layer returned -> what the head reads

Nothing of the model's own forward is rewritten: in enter and leave it runs as it is, with its layers replaced.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mft.models.causal_lm import Run, decoder_layers, replaced_forwards


@dataclass(frozen=True)
class Call:
    """What one layer is called with besides the hidden states."""

    args: tuple
    kwargs: dict[str, Any]


class LayerCalls:
    """Runs the layers of ``model`` one by one.

    Args: run: run(model, input_ids) is what the head reads; see causal_lm.split_at_head.
    """

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self._run = model, run
        self.layers = decoder_layers(model)
        self.embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self.device: torch.device | None = None  # of what the embedding gives, wherever it lies; None: where it lies
        self._returns_tuple = False

    def check(self, input_ids: Tensor) -> None:
        """Raise ValueError unless layer by layer gives what the model gives, on these few tokens (1, T).

        In some architectures later layers read more of earlier ones than their hidden states.
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
        # Not exactly equal: a kernel may sum in another order from call to call. NaN is a matter for the loss.
        tolerance = 0.01 * whole.nan_to_num().abs().max().item()
        same = torch.isclose(ours, whole, rtol=0, atol=tolerance, equal_nan=True).all()
        if not same or not all(map(_equal, calls, others)):
            raise ValueError(
                f"memory must be plain for {type(self.model).__name__}: its layers hand on more than hidden states, or "
                f"are told of the tokens (run one by one they move the output by {(ours - whole).abs().max():.3g})"
            )

    @torch.no_grad()
    def enter(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, list[Call]]:
        """(hidden (B, T, D) that layer 0 reads, each layer's call)."""
        entered: list[Tensor] = []
        calls: list[Call] = []

        def note(hidden: Tensor, *args, **kwargs):
            entered.append(hidden)
            calls.append(Call(args, kwargs))
            return self._returned(hidden)

        with self._embedding_anywhere(), replaced_forwards(self.layers, lambda layer: note):
            self._run(self.model, input_ids, position_ids)
        return entered[0], calls

    def run(self, index: int, hidden: Tensor, calls: list[Call]) -> Tensor:
        """What layer ``index`` makes of hidden (B, T, D)."""
        call = calls[index]
        output = self.layers[index](hidden, *call.args, **call.kwargs)
        return output[0] if self._returns_tuple else output

    def leave(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """What the head reads, from what the last layer returned; differentiable in hidden."""
        returned = self._returned(hidden)
        with self._embedding_anywhere(), replaced_forwards(self.layers, lambda layer: lambda *args, **kwargs: returned):
            return self._run(self.model, input_ids)

    def _embedding_anywhere(self) -> AbstractContextManager[None]:
        """Its rows are looked up where its weight lies, and go to self.device."""
        look_up = self.embedding.forward

        def forward(input_ids: Tensor) -> Tensor:
            rows = look_up(input_ids.to(next(self.embedding.parameters()).device))
            return rows if self.device is None else rows.to(self.device)

        return replaced_forwards([self.embedding], lambda embedding: forward)

    def _returned(self, hidden: Tensor) -> Tensor | tuple[Tensor]:
        return (hidden,) if self._returns_tuple else hidden


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Call):
        return _equal(a.args, b.args) and _equal(a.kwargs, b.kwargs)
    return a is b or a == b
