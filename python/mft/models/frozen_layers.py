"""Run layers below the first trainable one without autograd, and only once for each row, however often it is seen.

    embeddings -> layer 0 ... layer first-1 | layer first ... -> norm
                  frozen: no graph, output     trained
                  cached per row

The model's own forward is not rewritten. If cached states are used, the forward of the frozen layers returns them. The
model still prepares its own masks, positions and rotations for its layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mft.models.causal_lm import Run, decoder_layers, first_trainable_layer, replace_forwards, run_decoder


@dataclass
class PrefixMemory:
    """Row -> (T, D) in host memory: the frozen layers' output for a row, for one data set and one set of weights."""

    max_bytes: int = 2 << 30  # a row of 512 tokens of SmolLM2-135M is 0.6 MB, one of 4096 of LLaMA2-7B 34 MB
    states: dict[int, Tensor] = field(default_factory=dict)
    nbytes: int = 0

    def remember(self, row: int, state: Tensor) -> None:
        """Keep state if there is room; otherwise it is computed again when needed."""
        if row in self.states:
            self.nbytes -= self.states.pop(row).nbytes
        if self.nbytes + state.nbytes <= self.max_bytes:
            self.states[row] = state.cpu()
            self.nbytes += state.nbytes


class FrozenPrefix:
    """Runs the decoder: the leading frozen layers without autograd, and only for rows that are not in memory.

    Args:
        first: number of leading frozen layers; None finds it (see first_trainable_layer).
        memory: may be shared by models whose frozen layers are equal. None caches nothing, which is required if those
            layers draw random numbers (see randomness.py).
        run: the function to call, by default the decoder (see causal_lm.split_at_head).
    """

    def __init__(
        self,
        model: nn.Module,
        first: int | None = None,
        memory: PrefixMemory | None = None,
        run: Run = run_decoder,
    ) -> None:
        self.model = model
        self.run = run
        self.first = first_trainable_layer(model) if first is None else first
        self.memory = memory if self.first > 0 else None
        self._layers = decoder_layers(model)
        self._returns_tuple: bool | None = None  # whether a layer returns (hidden, ...); None: not known yet

    def __call__(self, input_ids: Tensor, rows: list[int], position_ids: Tensor | None = None) -> Tensor:
        """Return hidden states (B, T, D), or whatever run returns, for the rows with these numbers in the data set."""
        if self.memory is None:
            with replace_forwards(self._layers[: self.first], lambda layer: torch.no_grad()(layer.forward)):
                return self.run(self.model, input_ids, position_ids)
        missing = self.recall(input_ids, rows, position_ids)
        hidden = torch.stack(
            [missing[row] if row in missing else self.memory.states[row].to(input_ids.device) for row in rows]
        )
        if self._returns_tuple is None:
            first = None if position_ids is None else position_ids[:1]
            self._check_that_layers_pass_hidden_states_only(input_ids[:1], hidden[:1], first)
        return self._run_from(input_ids, hidden, position_ids)

    def recall(self, input_ids: Tensor, rows: list[int], position_ids: Tensor | None = None) -> dict[int, Tensor]:
        """Cache these rows, as a call would. Return the states (T, D) of the rows that were not in memory."""
        if self.memory is None:
            return {}
        missing = [i for i, row in enumerate(rows) if row not in self.memory.states]
        if not missing:
            return {}
        positions = None if position_ids is None else position_ids[missing]
        states = self._output_of(self.first, lambda: self.run(self.model, input_ids[missing], positions))
        found = dict(zip((rows[i] for i in missing), states))
        for row, state in found.items():
            self.memory.remember(row, state)
        return found

    def run_layers(self, depth: int, input_ids: Tensor, rows: list[int], position_ids: Tensor | None = None) -> Tensor:
        """Return the output (B, T, D) of the first ``depth`` layers, at least the frozen ones, for these rows."""
        return self._output_of(depth, lambda: self(input_ids, rows, position_ids))

    @torch.no_grad()
    def _output_of(self, depth: int, run: Callable[[], object]) -> Tensor:
        """Return the last output (B, T, D) of the first ``depth`` layers in run(). Later layers are skipped."""
        outputs: list = []
        handle = self._layers[depth - 1].register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            with replace_forwards(self._layers[depth:], lambda layer: _first_argument):
                run()
        finally:
            handle.remove()
        return outputs[-1][0] if isinstance(outputs[-1], tuple) else outputs[-1]

    def _run_from(self, input_ids: Tensor, hidden: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Return run's result with hidden (B, T, D) in place of the frozen layers' output."""
        returned = (hidden,) if self._returns_tuple else hidden
        with replace_forwards(self._layers[: self.first], lambda layer: lambda *args, **kwargs: returned):
            return self.run(self.model, input_ids, position_ids)

    @torch.no_grad()
    def _check_that_layers_pass_hidden_states_only(
        self, input_ids: Tensor, hidden: Tensor, position_ids: Tensor | None
    ) -> None:
        """Raise ValueError if later layers read more of earlier ones, such as keys and values in some architectures."""
        outputs: list = []
        handle = self._layers[0].register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            whole = self.run(self.model, input_ids, position_ids)
        finally:
            handle.remove()
        self._returns_tuple = isinstance(outputs[0], tuple)
        error = (self._run_from(input_ids, hidden, position_ids) - whole).abs().max()
        if not error <= 0.05 * whole.abs().max():
            self._returns_tuple = None
            raise ValueError(
                f"the first {self.first} layers of {type(self.model).__name__} must pass on hidden states only to be "
                f"remembered, but skipping them changes the output by {error.item():.3g}: pass remember=False"
            )


def _first_argument(hidden_states: Tensor, *args, **kwargs) -> Tensor:
    return hidden_states
