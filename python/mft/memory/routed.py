"""Bytes of activations that routing tokens through experts holds on the device; pure Python.

The experts run by transformers' grouped_mm, or by MaskedExperts (masks/masked_experts.py). Rows are gathered for each
token and its experts, sorted by expert, multiplied, weighted and put back. Saved for the backward pass (elements per
row; there are top_k rows per token; D hidden, F intermediate of one expert):

    gather      D if gate_up_proj is masked (a frozen product saves no input)
    gate        gate_up's 2 F, silu(gate) F; 6 F if both are clamped
    product     F if down_proj is masked
    weighing    D, the output of down_proj
    places      of rows in the sort, and each token's router probabilities in fp32

A product with quantised experts makes all of them dense, and frees them afterwards.
Each pass can peak at a few moments; _forward and _backward list them.
"""

from collections.abc import Collection
from dataclasses import dataclass

from mft.memory.mixture import DOWN, GATE_UP, Mixture

_PLACES = 40  # bytes per row: its expert, its place before and after the sort, its token, its routing weight


@dataclass(frozen=True)
class Routed:
    """The experts of one layer that run on ``tokens`` tokens.

    gate_up, down: whether each of the two is masked. coded: names of the quantised matrices. score_bytes: see Layer.
    """

    mixture: Mixture
    tokens: int
    dtype_bytes: int
    gate_up: bool
    down: bool
    coded: Collection[str] = ()
    score_bytes: int = 0

    @property
    def saved(self) -> int:
        """Bytes that autograd keeps from the forward pass for the backward pass."""
        return self._gathered + self._gate + self._product + self._hidden + self._places + self._shared_saved

    @property
    def peak(self) -> int:
        """Peak bytes of both passes, in addition to what the layer saved before."""
        return self._shared_saved + max(*self._forward, *self._backward)

    @property
    def forward_peak(self) -> int:
        """Peak bytes without autograd."""
        rows = self._hidden if self._is_ours else 2 * self._hidden
        weighing = rows + 2 * self._weighed + self._biases(self._hidden)
        gating = self._hidden + 4 * self._wide + self._biases(2 * self._wide)
        up = self._hidden + 2 * self._wide + self._dense(GATE_UP)
        down = self._hidden + self._wide + self._dense(DOWN)
        return self._tokens_wide(self.mixture.shared) + self._places + max(weighing, gating, up, down)

    # ------------------------------------------------------------------------------------------ moments

    @property
    def _forward(self) -> tuple[int, ...]:
        """Return bytes at each moment of the forward pass; frozen experts' gathered rows stay to its end."""
        base = self._places + 2 * self.tokens * self.mixture.hidden * self.dtype_bytes
        up = base + self._hidden + 2 * self._wide + self._dense(GATE_UP)
        base += self._gate
        gating = base + self._hidden + self._wide + self._biases(2 * self._wide)
        rows = self._gathered if self._is_ours else self._hidden
        down = base + rows + self._wide + self._hidden + self._dense(DOWN)
        weighing = base + rows + self._product + self._hidden + 2 * self._weighed + self._biases(self._hidden)
        return up, gating, down, weighing

    @property
    def _backward(self) -> tuple[int, ...]:
        rounded = self._hidden if self._weighed != self._hidden else 0
        unsorting = self.saved - self._shared_saved + 3 * self._weighed + rounded
        base = self._gathered + self._places
        beside = max(self._dense(DOWN), self._score_grad(DOWN, self.down))
        down = base + self._gate + self._product + self._hidden + self._wide + beside
        gating = base + self._gate + 3 * self._wide
        up = base + 2 * self._wide + self._hidden
        up += max(self._dense(GATE_UP), self._score_grad(GATE_UP, self.gate_up))
        return unsorting, down, gating, up

    # ------------------------------------------------------------------------------------------ sizes

    @property
    def _is_ours(self) -> bool:
        """Whether MaskedExperts runs the experts instead of transformers."""
        return self.gate_up or self.down or bool(self.coded)

    @property
    def _rows(self) -> int:
        return self.tokens * self.mixture.top_k

    @property
    def _hidden(self) -> int:
        """Bytes of a (rows, D) tensor."""
        return self._rows * self.mixture.hidden * self.dtype_bytes

    @property
    def _weighed(self) -> int:
        """Bytes of a (rows, D) tensor after the routing weights are applied."""
        return self._rows * self.mixture.hidden * (4 if self.mixture.weighs_in_fp32 else self.dtype_bytes)

    @property
    def _wide(self) -> int:
        """Bytes of a (rows, F) tensor."""
        return self._rows * self.mixture.intermediate * self.dtype_bytes

    @property
    def _gathered(self) -> int:
        return self._hidden if self.gate_up else 0

    @property
    def _gate(self) -> int:
        return (6 if self.mixture.is_clamped else 3) * self._wide

    @property
    def _product(self) -> int:
        return self._wide if self.down else 0

    @property
    def _places(self) -> int:
        return self._rows * _PLACES + self.tokens * self.mixture.experts * 4

    @property
    def _shared_saved(self) -> int:
        """Bytes that the shared expert saves, with its output: like a dense MLP whose linears are all masked."""
        shared, hidden = self.mixture.shared, self.mixture.hidden * self.tokens * self.dtype_bytes
        return 4 * self._tokens_wide(shared) + 2 * hidden if shared else 0

    def _biases(self, size: int) -> int:
        """Return the bytes of the biases gathered for each row; MaskedExperts frees them, so it has none."""
        return size if self.mixture.is_biased and not self._is_ours else 0

    def _dense(self, name: str) -> int:
        """Return the bytes of all experts of a product, made dense from their codes."""
        count, n, k = self.mixture.matrices[name]
        return count * n * k * self.dtype_bytes if name in self.coded else 0

    def _score_grad(self, name: str, is_masked: bool) -> int:
        count, n, k = self.mixture.matrices[name]
        return count * n * k * self.score_bytes if is_masked else 0

    def _tokens_wide(self, width: int) -> int:
        return self.tokens * width * self.dtype_bytes
