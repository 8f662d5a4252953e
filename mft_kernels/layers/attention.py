"""MaskedMultiheadAttention: nn.MultiheadAttention that calls its projections, so that each may be a masked layer.

torch's own class multiplies by in_proj_weight and out_proj.weight itself, so a masked layer there would not be called.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .maskable import other_than, why_lost
from .shells import copy_without, filled, linear_on

_SETTINGS = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn")
_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_PARAMETERS = (*_WEIGHTS, "in_proj_bias", "bias_k", "bias_v")


class MaskedMultiheadAttention(nn.Module):
    """nn.MultiheadAttention with projections that are layers, each of which may be masked.

        attention = MaskedMultiheadAttention.from_attention(attention)
        attention.in_proj = MaskedLinear.from_linear(attention.in_proj)

    It takes the same arguments as nn.MultiheadAttention and gives the same results, except for rounding. In eval mode,
    too, it computes as torch's slow path does.

    The layers are in_proj (3 * embed_dim, embed_dim) for queries, keys and values, or q_proj, k_proj and v_proj if kdim
    or vdim differ from embed_dim; and out_proj. In cross-attention, in_proj makes all three projections of the queries
    and of the keys, and only the needed part of each is used. bias_k and bias_v stay parameters.
    """

    masks_weight = True  # see maskable.py

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self._adopt(nn.MultiheadAttention(*args, **kwargs))

    @classmethod
    def from_attention(cls, attention: nn.MultiheadAttention) -> "MaskedMultiheadAttention":
        """Make one on the parameters of ``attention``, in its training mode. Its projections are not masked yet.

        Raises: TypeError if it is no nn.MultiheadAttention; ValueError if it does more than nn.MultiheadAttention.
        """
        if not isinstance(attention, nn.MultiheadAttention):
            raise TypeError(f"attention must be an nn.MultiheadAttention, got {type(attention).__name__}")
        why = why_not_split(attention)
        if why is not None:
            raise ValueError(f"attention cannot be masked: {why}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._adopt(attention)
        return self.train(attention.training)

    def _adopt(self, attention: Any) -> None:
        for name in _SETTINGS:
            setattr(self, name, getattr(attention, name))
        self._qkv_same_embed_dim = attention.in_proj_weight is not None
        self._shell = (copy_without(attention, *_PARAMETERS, "out_proj"),)  # in a tuple, or it would be a child
        for name, projection in projections(attention).items():
            setattr(self, name, projection)
        self.register_parameter("bias_k", attention.bias_k)
        self.register_parameter("bias_v", attention.bias_v)

    def to_attention(self) -> nn.MultiheadAttention:
        """Return an attention of the class that from_attention was given, with the projections' current parameters.

        Raises: ValueError if a projection is no nn.Linear, such as a masked one before its ``merge()``.
        """
        for name, child in self.named_children():
            if not isinstance(child, nn.Linear):
                raise ValueError(f"{name} must be an nn.Linear, got {type(child).__name__}: merge() it first")
        parts: dict[str, Any] = {name: getattr(self, name) for name in (*_WEIGHTS, "bias_k", "bias_v", "out_proj")}
        parts["in_proj_bias"] = self.in_proj_bias
        attention: Any = filled(self._shell[0], **parts)
        attention.dropout, attention.batch_first = self.dropout, self.batch_first  # may have been changed
        return attention.train(self.training)

    # nn.TransformerEncoder and its layers read these to choose between fast and slow path. They are without masks.

    @property
    def in_proj_weight(self) -> nn.Parameter | None:
        """The weight (3 * embed_dim, embed_dim) without a mask; None if there are q_proj, k_proj and v_proj instead."""
        return self.in_proj.weight if self._qkv_same_embed_dim else None

    @property
    def q_proj_weight(self) -> nn.Parameter | None:
        return None if self._qkv_same_embed_dim else self.q_proj.weight

    @property
    def k_proj_weight(self) -> nn.Parameter | None:
        return None if self._qkv_same_embed_dim else self.k_proj.weight

    @property
    def v_proj_weight(self) -> nn.Parameter | None:
        return None if self._qkv_same_embed_dim else self.v_proj.weight

    @property
    def in_proj_bias(self) -> nn.Parameter | None:
        """The bias (3 * embed_dim,). If there are q_proj, k_proj and v_proj instead, each access makes a new one."""
        if self._qkv_same_embed_dim:
            return self.in_proj.bias
        biases = [layer.bias for layer in (self.q_proj, self.k_proj, self.v_proj)]
        return None if biases[0] is None else nn.Parameter(torch.cat(biases).detach(), biases[0].requires_grad)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention with the arguments and results of nn.MultiheadAttention.forward.

        Raises: ValueError for masks of other shapes, and for nested tensors in cases that torch does not take either.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            alone = query is key is value and key_padding_mask is None and attn_mask is None
            if not alone or need_weights or not self.batch_first:
                raise ValueError(
                    "nested tensors must be used for self-attention with batch_first, need_weights=False and no "
                    "masks, got another call"
                )
            return self._forward_nested(query), None
        padding = F._canonical_mask(
            key_padding_mask, "key_padding_mask", F._none_or_dtype(attn_mask), "attn_mask", query.dtype
        )
        attn_mask = F._canonical_mask(attn_mask, "attn_mask", None, "", query.dtype, check_other=False)
        is_batched = F._mha_shape_check(  # type: ignore[attr-defined]
            query, key, value, padding, attn_mask, self.num_heads
        )
        if is_causal and attn_mask is None:
            raise ValueError(
                "attn_mask must be given with is_causal, which only says that this mask is causal, got None"
            )
        # (rows, tokens, width), which a layer with one mask per row needs. Arguments that are one tensor stay one.
        if not is_batched:
            query, key, value = _each(lambda x: x.unsqueeze(0), query, key, value)
            padding = None if padding is None else padding.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _each(lambda x: x.transpose(0, 1), query, key, value)
        if is_causal and padding is None and not need_weights:
            attn_mask = None  # the hint is enough
        else:
            is_causal = False
        mask = self._mask(attn_mask, padding, len(query), query.shape[1], key.shape[1])
        y, weights = self._attend(*self._project(query, key, value), mask, need_weights, is_causal)
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not is_batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1), weights

    # ------------------------------------------------------------------------------------------ private

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, rows: int, queries: int, keys: int) -> Any:
        """Return what is added to the products, or None.

        Shape (rows or 1, num_heads or 1, queries or 1, keys + those that bias_k and add_zero_attn add).
        """
        mask = None
        if attn_mask is not None:
            shape = (queries, keys) if attn_mask.dim() == 2 else (rows * self.num_heads, queries, keys)
            if attn_mask.shape != shape:
                raise ValueError(f"attn_mask must be {shape}, got {tuple(attn_mask.shape)}")
            mask = (
                attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(rows, self.num_heads, queries, keys)
            )
        if padding is not None:
            if padding.shape != (rows, keys):
                raise ValueError(f"key_padding_mask must be {(rows, keys)}, got {tuple(padding.shape)}")
            mask = padding[:, None, None] if mask is None else mask + padding[:, None, None]
        return mask if mask is None else F.pad(mask, (0, (self.bias_k is not None) + bool(self.add_zero_attn)))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the projected queries, keys and values, each (rows, tokens, embed_dim)."""
        if not self._qkv_same_embed_dim:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key is value:
            return self.in_proj(query).chunk(3, dim=-1)
        projected = [self.in_proj(query), self.in_proj(key)]
        projected.append(projected[1] if key is value else self.in_proj(value))
        return tuple(packed.chunk(3, dim=-1)[part] for part, packed in enumerate(projected))  # type: ignore[return-value]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, is_causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return y (rows, queries, embed_dim), and the weights (rows, num_heads, queries, keys) if they are needed."""
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([x, more.expand(len(x), 1, -1)], dim=1) for x, more in ((k, self.bias_k), (v, self.bias_v))
            )
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scaled, transposed = (q * math.sqrt(1.0 / self.head_dim)).flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
            if mask is None:
                products = torch.bmm(scaled, transposed)
            else:
                products = torch.baddbmm(mask.expand(*q.shape[:2], -1, -1).flatten(0, 1), scaled, transposed)
            weights = F.softmax(products, dim=-1)
            if dropout > 0:
                weights = F.dropout(weights, p=dropout)
            y = torch.bmm(weights, v.flatten(0, 1)).view(q.shape)
            weights = weights.view(*q.shape[:-1], -1)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        return self.out_proj(y.transpose(1, 2).flatten(2)), weights

    def _forward_nested(self, x: Tensor) -> Tensor:
        """Compute rows of several lengths, which nn.TransformerEncoder makes from a padded batch."""
        rows = x.unbind()
        lengths = [len(row) for row in rows]
        padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        ends = torch.tensor(lengths, device=x.device)
        padding = torch.arange(padded.shape[1], device=x.device) >= ends[:, None]
        y = self.forward(padded, padded, padded, padding, need_weights=False)[0]
        return torch.nested.as_nested_tensor([y[i, :n] for i, n in enumerate(lengths)], layout=x.layout)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def why_not_split(attention: nn.MultiheadAttention) -> str | None:
    """Return why attention cannot become a MaskedMultiheadAttention; None if it can."""
    other = other_than(nn.MultiheadAttention, attention)
    if other is not None:
        return f"it lies in {other}: it has its own forward"
    held = {**attention._parameters, **attention._buffers, **attention._modules}
    more = [name for name, part in held.items() if part is not None and name not in (*_PARAMETERS, "out_proj")]
    if more:
        return f"it lies in an nn.MultiheadAttention that also holds {more[0]}"
    return why_lost(attention)


def projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """Return the projections as layers on its parameters: in_proj, or q_proj, k_proj and v_proj; and out_proj."""
    bias = attention.in_proj_bias
    if attention.in_proj_weight is not None:
        packed = {"in_proj": linear_on(attention.in_proj_weight, bias)}
    else:
        parts: Any = [None] * 3
        if bias is not None:
            parts = [nn.Parameter(part, bias.requires_grad) for part in bias.detach().chunk(3)]
        names = [f"{which}_proj" for which in "qkv"]
        packed = {name: linear_on(getattr(attention, f"{name}_weight"), part) for name, part in zip(names, parts)}
    return {name: layer.train(attention.training) for name, layer in packed.items()} | {"out_proj": attention.out_proj}


def _each(change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Return change of each tensor. A tensor that is given twice is changed once."""
    k = change(key)
    return k if query is key else change(query), k, k if value is key else change(value)
