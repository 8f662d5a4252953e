"""Prune or round linear layers one after the other, where later weights of a row make up for the error of earlier ones.

SparseGPT (arXiv 2301.00774) and GPTQ (arXiv 2210.17323), on calibration rows, decoder layer by decoder layer:

    inputs X of the layer's matrices, as the layers before, already changed, give them
    U with U^T U = inverse of (X^T X + 1 % of its mean diagonal), upper triangular
    for each column j of a matrix W: W_j becomes q_j, and later columns W_k lose (W_j - q_j) / U_jj * U_jk
"""

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mft.checks import check_rule
from mft.data.batches import MicroBatch
from mft.importance.importance import calibration_batches, content_positions, linear_modules, matrix_of
from mft.models.causal_lm import FEW, decoder_layers, evaluating
from mft.models.frozen_layers import FrozenPrefix, PrefixMemory
from mft.models.longrope import inputs_of
from mft.models.packed_rows import keep_apart

GROUP = 64  # weights of a row that share a scale and a smallest value
_PRUNED = 128  # columns whose weights SparseGPT compares with each other
_DAMPING = 0.01
_SHRUNK = torch.linspace(1.0, 0.5, 21).tolist()  # shares of a group's range that are tried

# From (columns (N, B), their diagonal of U (B,)) to a function from (a column (N,), its number) to what it becomes.
Begin = Callable[[Tensor, Tensor], Callable[[Tensor, int], Tensor]]


def compensate(
    model: nn.Module,
    names: Iterable[str],
    change: Callable[[Tensor, Tensor], Tensor],
    dataset,
    *,
    rows: int = 64,
    batch_size: int = 4,
    seed: int = 0,
) -> dict[str, nn.Parameter]:
    """Change the named linear layers' weights in place, from the first decoder layer to the last.

    Args:
        change: from a weight (N, K) and the matrix X^T X of its inputs (K, K), both fp32, to the new weight (N, K).
        dataset: as for importance, with ``rows`` rows drawn by ``seed``.
    Returns: the layers' parameters, by the layers' names.
    Raises: ValueError if a name is not a linear layer of the decoder layers, or belongs to experts.
    """
    modules = linear_modules(model, names)
    for name, module in modules.items():
        check_rule(module.weight.dim() == 2, name, "be a linear layer, not experts: leave it out", module.weight.shape)
    batches = list(calibration_batches(dataset, rows, batch_size, seed))
    sample = batches[0].input_ids[:1, :FEW].to(next(model.parameters()).device)
    memory = PrefixMemory()
    with torch.no_grad(), evaluating(model), keep_apart(model, dataset, sample, batch_size):
        for depth, layer in enumerate(decoder_layers(model)):
            inside = set(map(id, layer.modules()))
            chosen = {name: module for name, module in modules.items() if id(module) in inside}
            prefix = FrozenPrefix(model, depth, memory)
            for name, gram in _grams(prefix, chosen, batches).items():
                weight = matrix_of(chosen[name])
                weight.copy_(change(weight.float(), gram))
                del modules[name]
            memory = _outputs(prefix, batches)
    check_rule(not modules, "names", "be linear layers of the decoder layers", list(modules))
    return {name: module.weight for name, module in linear_modules(model, names).items()}


def pruned(weight: Tensor, gram: Tensor, keep_ratio: float, pattern: str = "matrix") -> Tensor:
    """Return the weight (N, K) with a share of it 0, by SparseGPT.

    pattern "matrix": equally many of each 128 columns, over all rows; "row": of each row's 128 columns; "N:M": of each
    row's M columns.
    """

    def begin(columns: Tensor, spread: Tensor) -> Callable[[Tensor, int], Tensor]:
        importance = (columns / spread).abs()
        groups = importance.reshape(1, -1) if pattern == "matrix" else importance
        order = groups.argsort(stable=True)[:, : int((1 - keep_ratio) * groups.shape[1])]
        kept = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False).view_as(columns)
        return lambda column, number: column * kept[:, number]

    return _column_by_column(weight, gram, int(pattern[2:]) if ":" in pattern else _PRUNED, begin)


def rounded(weight: Tensor, gram: Tensor, bits: int, *, gptq: bool) -> Tensor:
    """Return the weight (N, K) rounded to codes: 2^bits equal steps for each GROUP of a row, from its smallest value.

    Step and smallest value are fp16 numbers, of those tried the ones with the least squared error of the products.
    gptq: later weights make up for the errors of earlier ones; False: each is rounded to the nearest step.
    """
    squares = gram.diagonal()
    if not gptq:
        groups = zip(weight.split(GROUP, 1), squares.split(GROUP))
        return torch.cat([_steps(group, each, bits)(group) for group, each in groups], 1)
    number_of_group = iter(squares.split(GROUP))

    def begin(columns: Tensor, spread: Tensor) -> Callable[[Tensor, int], Tensor]:
        to_steps = _steps(columns, next(number_of_group), bits)
        return lambda column, number: to_steps(column[:, None])[:, 0]

    return _column_by_column(weight, gram, GROUP, begin)


def rounded_bytes(shape: torch.Size, bits: int) -> int:
    """Return the bytes of a weight (N, K) in such codes: the codes, and two fp16 numbers for each group."""
    return math.ceil(shape.numel() * bits / 8) + 4 * shape[0] * math.ceil(shape[1] / GROUP)


def _column_by_column(weight: Tensor, gram: Tensor, block: int, begin: Begin) -> Tensor:
    """Change the columns from the first to the last, and begin a block of columns when those before have changed."""
    weight, unused = weight.clone(), gram.diagonal() == 0
    weight[:, unused] = 0
    gram = gram + torch.diag(unused.float() + _DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram.double()))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    for first in range(0, weight.shape[1], block):
        columns, inner = weight[:, first : first + block], upper[first : first + block, first : first + block]
        errors, change = torch.empty_like(columns), begin(columns, inner.diagonal())
        for number in range(columns.shape[1]):
            changed = change(columns[:, number], number)
            errors[:, number] = (columns[:, number] - changed) / inner[number, number]
            columns[:, number + 1 :] -= errors[:, number, None] * inner[number, number + 1 :]
            columns[:, number] = changed
        last = first + columns.shape[1]
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight


def _steps(group: Tensor, squares: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """Return a function that rounds values (N, any) to each row's steps, chosen for group (N, B). squares: (B,)."""
    low, high = group.aminmax(dim=1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    step, smallest = torch.ones_like(low), low

    def to_steps(values: Tensor, step: Tensor, smallest: Tensor) -> Tensor:
        return ((values - smallest) / step).round().clamp(0, 2**bits - 1) * step + smallest

    for share in _SHRUNK:
        cut = (1 - share) / 2 * (high - low)
        tried_smallest = (low + cut).half().float()
        tried = ((high - cut - tried_smallest) / (2**bits - 1)).half().float().clamp(min=2**-24)
        error = ((to_steps(group, tried, tried_smallest) - group).square() * squares).sum(1, keepdim=True)
        better = error < best
        best = error.where(better, best)
        step, smallest = tried.where(better, step), tried_smallest.where(better, smallest)
    return lambda values: to_steps(values, step, smallest)


def _grams(prefix: FrozenPrefix, modules: dict[str, Any], batches: list[MicroBatch]) -> dict[str, Tensor]:
    """Return X^T X (K, K) of the inputs of modules in the layer after the prefix, over tokens that are not padding."""
    grams: dict[str, Tensor] = {}
    real = torch.empty(0, dtype=torch.bool)

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            rule = "see every token, in order, to be made up for: leave it out"
            check_rule(len(x) == len(real), name, rule, f"{len(x)} of {len(real)} tokens")
            x = x[real.to(x.device)].float()
            grams[name] = grams[name].addmm_(x.t(), x) if name in grams else x.t() @ x

        return hook

    _run_layer(prefix, batches[0])  # the first time, the prefix runs the model more than once to check it
    with contextlib.ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_pre_hook(add(name)).remove)
        for batch in batches:
            real = content_positions(batch.labels).flatten()
            _run_layer(prefix, batch)
    return grams


def _outputs(prefix: FrozenPrefix, batches: list[MicroBatch]) -> PrefixMemory:
    """Return what the layer after the prefix makes of each row, in host memory."""
    memory = PrefixMemory()
    for batch in batches:
        for row, state in zip(batch.rows, _run_layer(prefix, batch)):
            memory.remember(row, state)
    return memory


def _run_layer(prefix: FrozenPrefix, batch: MicroBatch) -> Tensor:
    device = next(prefix.model.parameters()).device
    ids, positions = inputs_of(batch, prefix.model, device)
    return prefix.run_layers(prefix.first + 1, ids, batch.rows, positions)
