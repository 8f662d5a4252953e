"""Bytes of activations that one decoder layer, or the head and loss, holds on the device; pure Python.

Saved for the backward pass of a layer with hidden states x of t tokens (elements per token; D hidden, F intermediate):

    norm        D in fp32 (the copy that it computes with; 16-bit models)
    q, k, v     their common input D if one of them is masked (a frozen linear saves no input)
    attention   q, k, v, output, and 4 bytes of log-sum-exp per head
    norm        D in fp32
    gate, up    their common input D if one of them is masked
    SwiGLU      gate, silu(gate), up: 3 F; and their product F if down is masked

The backward pass peaks in one of three places:

- in SwiGLU, where the gradient of the product becomes the gradients of silu(gate) and up (3 F at once);
- in wide models with a narrow MLP, in the norm between attention and MLP (five fp32 copies of D);
- in attention.

Eager attention keeps its T x T probabilities per head, and each pass has three tensors of that size at once.
In a mixture, experts replace gate, up and down: see routed.py.
"""

from collections.abc import Collection
from dataclasses import dataclass

from mft.memory.mixture import DOWN, GATE_UP
from mft.memory.routed import Routed
from mft.memory.shapes import ModelShape

CHUNK = 128  # tokens whose logits exist together; token_loss.CHUNK
ROWS = 32  # tokens whose logits exist in fp32 together, for objectives other than cross entropy; chunks.ROWS
_NORM_COPIES = 5  # fp32 tensors that the norm's backward pass holds at its peak


@dataclass(frozen=True)
class _ChunkOfLogits:
    """Number of tensors that an objective holds for a chunk: in the model's dtype, and in fp32 for at most ``rows``."""

    tensors: int
    fp32: int
    rows: int = ROWS


# Cross entropy: logits, their gradient, and their softmax in fp32 (on a CPU only a few rows of it: see token_loss.py).
# The others run autograd over fp32 copies of a few rows; kl and distill also hold the logits of the base or teacher.
_LOGITS = {
    "cross_entropy": _ChunkOfLogits(2, 1, rows=CHUNK),
    "kl": _ChunkOfLogits(3, 7),
    "distill": _ChunkOfLogits(3, 10),
    "dpo": _ChunkOfLogits(2, 4),
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer that runs on ``tokens`` tokens.

    masked: names of its masked linears and experts. rows: number of equally long rows. input_grad: whether its input's
    gradient is needed. dense: bytes of the largest weight decoded for a product, or 0. coded: names of quantised
    experts. score_bytes: bytes per score of a gradient that autograd returns before it is added (plain), or 0. flash:
    whether attention is flash attention on a GPU, whose backward pass sums dq in fp32.
    """

    shape: ModelShape
    tokens: int
    masked: Collection[str]
    rows: int = 1
    input_grad: bool = True
    dense: int = 0
    coded: Collection[str] = ()
    score_bytes: int = 0
    flash: bool = False

    @property
    def hidden(self) -> int:
        """Bytes of a boundary: (B, T, D) in the model's dtype."""
        return self.tokens * self.shape.hidden * self.shape.dtype_bytes

    @property
    def saved(self) -> int:
        """Bytes that autograd keeps from the forward pass for the backward pass."""
        return self._saved_attention + (self._saved_mlp if self._routed is None else self._routed.saved)

    @property
    def peak(self) -> int:
        """Peak bytes of the recomputed forward and the backward pass, with the layer's input and output gradient."""
        routed = self._routed
        mlp = self._saved_attention + (self._saved_mlp + self.transient if routed is None else routed.peak)
        norm = self._saved_attention + _NORM_COPIES * self._norm
        ends = 2 * self.hidden  # input, and gradient of the output
        return ends + max(mlp, norm, self._attention_peak)

    @property
    def forward_peak(self) -> int:
        """Peak bytes without autograd: four tensors of hidden size, and SwiGLU's three or the experts' rows."""
        mlp = 3 * self._width(self.shape.intermediate) if self._routed is None else self._routed.forward_peak
        return 4 * self.hidden + max(mlp, 3 * self._probabilities + 3 * self._width(self._q))

    @property
    def transient(self) -> int:
        """Bytes that the backward pass adds to ``saved`` at its peak in the MLP."""
        product = self._width(self.shape.intermediate)
        scores = [n * k for name, (n, k) in self.shape.linears.items() if name in self.masked]
        down = product + max(
            self.dense, max(scores, default=0) * self.score_bytes
        )  # d_x of down, together with the dense weight or the new d_scores
        swiglu = 3 * product - (product if self._is_masked("down_proj") else 0)
        return max(down, swiglu)

    def _width(self, width: int) -> int:
        return self.tokens * width * self.shape.dtype_bytes

    def _is_masked(self, *names: str) -> bool:
        return any(name.endswith(names) for name in self.masked)

    @property
    def _norm(self) -> int:
        """Bytes of the norm's fp32 copy; in an fp32 model the norm keeps its input instead."""
        return self.tokens * self.shape.hidden * 4

    @property
    def _routed(self) -> Routed | None:
        mixture = self.shape.mixture
        if mixture is None:
            return None
        gate_up, down = (name in self.masked for name in (GATE_UP, DOWN))
        return Routed(mixture, self.tokens, self.shape.dtype_bytes, gate_up, down, self.coded, self.score_bytes)

    @property
    def _q(self) -> int:
        return self.shape.heads * self.shape.head_dim

    @property
    def _probabilities(self) -> int:
        """Bytes of eager attention's probabilities: T x (T + 1) per head, with the sink's column."""
        if not self.shape.has_sinks:
            return 0
        return self.tokens * self.shape.heads * (self.tokens // self.rows + 1) * self.shape.dtype_bytes

    @property
    def _saved_attention(self) -> int:
        shape = self.shape
        q, kv = self._q, shape.kv_heads * shape.head_dim
        saved = self._norm  # of the norm before the MLP
        if self.input_grad and shape.dtype_bytes != 4:
            saved += self._norm
        if self._is_masked("q_proj", "k_proj", "v_proj"):
            saved += self.hidden
        if shape.qk_norms:
            saved += self.tokens * (q + kv) * 4
        if shape.has_sinks:  # q; k and v, repeated for each head of q; the index of the largest logit
            heads = 8 * self.tokens * shape.heads
            return saved + self._probabilities + self._width(4 * q if self._is_masked("o_proj") else 3 * q) + heads
        return saved + self._width(2 * q + 2 * kv) + 4 * self.tokens * shape.heads

    @property
    def _saved_mlp(self) -> int:
        saved = self._width(3 * self.shape.intermediate)
        if self._is_masked("gate_proj", "up_proj"):
            saved += self.hidden
        if self._is_masked("down_proj"):
            saved += self._width(self.shape.intermediate)
        return saved

    @property
    def _attention_peak(self) -> int:
        shape = self.shape
        q, kv = self._q, shape.kv_heads * shape.head_dim
        if shape.has_sinks:
            inputs = self.hidden if self._is_masked("q_proj", "k_proj", "v_proj") else 0
            return 3 * self._probabilities + self._width(3 * q) + self._norm + inputs + self.hidden
        gradients = self._width(2 * q + 2 * kv)  # of the output, q, k, v
        if self.flash:
            gradients += 4 * self.tokens * q
            if kv != q:
                gradients += self._width(2 * q)  # of k and v, one for each head of q before they are summed
        return self._saved_attention + gradients


def loss_peak(shape: ModelShape, tokens: int, objective: str = "cross_entropy") -> int:
    """Return the peak bytes of final norm, head and loss: with the last layer's output, without the head's weight."""
    hidden = tokens * shape.hidden * shape.dtype_bytes
    norm = tokens * shape.hidden * 4 if shape.dtype_bytes != 4 else 0
    held, few = _LOGITS[objective], min(tokens, CHUNK)
    logits = shape.vocabulary * (held.tensors * few * shape.dtype_bytes + held.fp32 * min(few, held.rows) * 4)
    # Hidden states before and after the norm, those of the scored tokens, and their gradients chunk by chunk.
    chunks = 4 * hidden + norm + logits
    # The gradients chunk by chunk, the same in one tensor, and the gradient of the norm's output.
    backward = 4 * hidden + norm + 4 * tokens * shape.hidden * _NORM_COPIES
    return max(chunks, backward)
