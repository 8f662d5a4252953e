"""Importance of each weight: one-shot masks keep the most important weights, and scores may start from it.

random          uniform in [0, 1)
magnitude       |w_ij|
magnitude_rows  sum over j of |w_ij|: drops whole output rows (the L1 baseline of the mask fine-tuning paper's code)
wanda           |w_ij| * ||x_j||_2 over the calibration tokens, compared within an output row (arXiv 2306.11695)
gradient        -g_ij * w_ij with g the gradient of the calibration loss: the first-order rise of the loss if w_ij is
                dropped. Weights whose removal is expected to lower the loss most are dropped first.
fisher          -g_ij * w_ij + F_ij * w_ij^2 / 2: the second-order rise. The curvature F is the mean square of a token's
                gradient, as if tokens were independent (arXiv 1801.05787, which omits g).
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mft.checks import check_one_of, check_rule
from mft.config import IMPORTANCE_METHODS
from mft.data.batches import MicroBatch, count_labels, take_rows
from mft.engines.placed import Placed
from mft.masks.convert import keep_all_weights, masked_modules
from mft.masks.masked_experts import watch_experts
from mft.models.causal_lm import FEW, evaluating, run_decoder, split_at_head
from mft.models.frozen_layers import FrozenPrefix
from mft.models.linears import Candidate, find_targets
from mft.models.longrope import inputs_of
from mft.models.packed_rows import keep_apart
from mft.models.routed_experts import expert_projections, flags
from mft.models.token_loss import backward_labelled_loss

SIGNED = ("gradient", "fisher")  # importance may be negative
_BY_DATA = ("wanda", *SIGNED)


def importance(
    model: nn.Module,
    names: Iterable[str],
    method: str,
    dataset,
    *,
    rows: int = 64,
    batch_size: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the importance of each weight of the named linear layers by ``method``. Larger values are kept first.

    Masked layers keep every weight here. requires_grad, gradients and the training mode are restored.

    Args:
        dataset: Columns input_ids, labels, document. wanda, gradient and fisher use ``rows`` rows of it, drawn by
            ``seed``. Tokens after a row's last label are padding and are not used.
    Returns: (N, K) by name, or (E, N, K) for experts in one parameter, whatever its layout; fp32, on the layer's
        device.
    Raises: ValueError if a name is not a linear layer, if no token is labelled, or if a layer's importance is not
        finite or the same for all its weights.
    """
    check_one_of("method", method, IMPORTANCE_METHODS)
    for argument, value in (("rows", rows), ("batch_size", batch_size)):
        check_rule(value >= 1, argument, "be at least 1", value)
    modules = linear_modules(model, names)
    batches = list(calibration_batches(dataset, rows, batch_size, seed)) if method in _BY_DATA else []
    found: dict[str, Tensor] = {}
    with keep_all_weights(model), evaluating(model), contextlib.ExitStack() as stack:
        if batches:
            sample = batches[0].input_ids[:1, :FEW].to(next(model.parameters()).device)
            stack.enter_context(keep_apart(model, dataset, sample, batch_size))
        if method == "wanda":
            norms = _input_norms(model, modules, batches, lambda batch: _read(model, batch))
            found = {name: matrix_of(module).abs().float() * norms.pop(name) for name, module in modules.items()}
        elif method in SIGNED:
            gradients, squares = _gradients(model, modules, batches, squares=method == "fisher")
            for name, module in modules.items():
                weight = matrix_of(module).float()
                found[name] = -gradients[name] * weight
                if squares:
                    found[name] += squares.pop(name) * weight.square() / 2
        else:
            found = {name: _BY_WEIGHT[method](matrix_of(module), seed, name) for name, module in modules.items()}
    for name, values in found.items():
        check_tells_apart(name, method, values)
    return found


def input_norms(
    placed: Placed,
    modules: dict[str, Any],
    dataset,
    *,
    rows: int = 64,
    batch_size: int = 4,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the norms ||x_j||_2 of each layer's input, for wanda: fp32 (K,), or (E, 1, K). Args: see importance."""
    model, batches = placed.model, list(calibration_batches(dataset, rows, batch_size, seed))
    with keep_all_weights(model), evaluating(model), placed.reading(dataset, batch_size) as reader:
        if reader.model is not model:  # a copy has its own modules, but reports experts under the model's names
            copied = reader.model.get_submodule
            modules = {name: m if m.weight.dim() == 3 else copied(name) for name, m in modules.items()}
        return _input_norms(reader.model, modules, batches, lambda batch: list(reader.hidden_states([batch])))


def calibration_batches(dataset, rows: int, batch_size: int, seed: int) -> Iterator[MicroBatch]:
    """Yield batches of at most ``rows`` rows in total, drawn without replacement."""
    check_rule(len(dataset) > 0, "dataset", "hold at least one row to calibrate on", len(dataset))
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
    for start in range(0, len(drawn), batch_size):
        yield take_rows(dataset, drawn[start : start + batch_size])


def content_positions(labels: Tensor) -> Tensor:
    """Return (B, T): True up to a row's last label. A row without labels is all True, as its padding is unknown."""
    labelled = (labels != -100).int()
    to_come = labelled.flip(1).cumsum(1).flip(1)
    return (to_come > 0) | (labelled.sum(1, keepdim=True) == 0)


# ---------------------------------------------------------------------------------------------- importance


def _random(weight: Tensor, seed: int, name: str) -> Tensor:
    # Seeded by name, so that a layer's mask does not depend on which other layers are masked.
    generator = torch.Generator(weight.device).manual_seed(random.Random(f"{seed} {name}").getrandbits(62))
    return torch.rand(weight.shape, generator=generator, device=weight.device)


def _magnitude_rows(weight: Tensor, seed: int, name: str) -> Tensor:
    return weight.abs().sum(-1, keepdim=True, dtype=torch.float64).float().expand(weight.shape).contiguous()


_BY_WEIGHT: dict[str, Callable[[Tensor, int, str], Tensor]] = {
    "random": _random,
    "magnitude": lambda weight, seed, name: weight.abs().float(),
    "magnitude_rows": _magnitude_rows,
}


def _input_norms(
    model: nn.Module, modules: dict[str, Any], batches: list[MicroBatch], run: Callable[[MicroBatch], object]
) -> dict[str, Tensor]:
    """Return ||x_j||_2 of each module's input over unpadded tokens, summed in fp64: (K,), or (E, 1, K) for experts."""
    sums: dict[str, Tensor] = {}
    real = torch.empty(0, dtype=torch.bool)
    experts = {name: module for name, module in modules.items() if module.weight.dim() == 3}

    def add_squares_of_experts(name: str, x: Tensor, offsets: Tensor) -> None:
        if name not in experts:
            return
        begins = [0, *offsets.tolist()]
        squares = torch.stack([x[a:b].float().square().sum(0, dtype=torch.float64) for a, b in pairwise(begins)])
        sums[name] = sums[name] + squares if name in sums else squares

    def leave_out_padding(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if len(arguments) != 3:
            raise ValueError(
                f"experts must be given hidden states, choices and weights for wanda, got {len(arguments)}"
            )
        hidden, chosen, weights = arguments
        dropped = ~real[:, None].to(chosen.device)
        return hidden, chosen.masked_fill(dropped, module.num_experts), weights  # type: ignore[arg-type]

    def add_squares(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            if len(x) != len(real):
                raise ValueError(f"{name} must see every token for wanda, got {len(x)} of {len(real)}: leave it out")
            squares = x[real.to(x.device)].float().square().sum(0, dtype=torch.float64)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in modules.items():
            if name not in experts:
                hooks.callback(module.register_forward_pre_hook(add_squares(name)).remove)
        for path in {name.rpartition(".")[0] for name in experts}:
            around = model.get_submodule(path)
            if flags(around) is None:
                raise ValueError(
                    f"{path} must pass its experts the rows of tokens for wanda, but {type(around).__name__} passes "
                    "them in its own way: leave it out"
                )
            hooks.callback(around.register_forward_pre_hook(leave_out_padding).remove)
        if experts:
            hooks.enter_context(watch_experts(model, add_squares_of_experts))
        for batch in batches:
            real = content_positions(batch.labels).flatten()
            run(batch)
    norms = {name: total.sqrt().float() for name, total in sums.items()}
    return {name: norm.unsqueeze(1) if name in experts else norm for name, norm in norms.items()}


def _read(model: nn.Module, batch: MicroBatch) -> Tensor:
    return run_decoder(model, *inputs_of(batch, model, next(model.parameters()).device))


def _gradients(
    model: nn.Module, modules: dict[str, Any], batches: list[MicroBatch], *, squares: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradients of the mean token loss with respect to each module's weight, (N, K), summed in fp32.

    With ``squares`` also return the batches' squared gradient sums divided by the number of all tokens.
    """
    tokens = sum(int(count_labels(batch.labels).sum()) for batch in batches)
    check_rule(
        tokens > 0, "dataset", "have at least one labelled token for a gradient", f"{tokens} labels in the rows drawn"
    )
    weights = {name: module.weight for name, module in modules.items()}
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    square_totals = {name: torch.zeros_like(total) for name, total in totals.items()} if squares else {}
    device = next(model.parameters()).device
    run, head = split_at_head(model, batches[0].input_ids[:1, :FEW].to(device))
    with _requiring_grad(model, weights.values()):
        prefix = FrozenPrefix(model, run=run)
        for batch in batches:
            ids, positions = inputs_of(batch, model, device)
            hidden = prefix(ids, batch.rows, positions)
            backward_labelled_loss(head, hidden, batch.labelled.to(device), 1 / tokens)
            for name, weight in weights.items():
                if weight.grad is not None:  # None if no token reached the weight, for example in an expert
                    totals[name] += weight.grad
                    if squares:  # grad is the sum divided by tokens
                        square_totals[name] += tokens * weight.grad.float().square()
                    weight.grad = None
    return _as_matrices(totals, modules), _as_matrices(square_totals, modules)


def _as_matrices(totals: dict[str, Tensor], modules: dict[str, Any]) -> dict[str, Tensor]:
    return {name: total.mT if is_transposed(modules[name]) else total for name, total in totals.items()}


@contextlib.contextmanager
def _requiring_grad(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let only the chosen parameters require grad in this context, starting without gradients."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, required, grad in before:
            parameter.requires_grad_(required)
            parameter.grad = grad


def linear_modules(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return the objects that hold the named layers' weights, masked or ordinary. Raises: as find_targets."""
    names, masked = list(names), masked_modules(model)
    targets = find_targets(model, [n for n in names if n not in masked])
    plain = {target.name: target if target.is_parameter else target.module for target in targets}
    return {name: masked[name] if name in masked else plain[name] for name in names}


def matrix_of(module: Any) -> Tensor:
    """Return the weight as (N, K) or (E, N, K)."""
    weight = module.weight.detach()
    return weight.mT if is_transposed(module) else weight


def is_transposed(module: Any) -> bool:
    """Whether the module stores its weight as (K, N), like a Conv1D, or as (E, K, N)."""
    if isinstance(module, Candidate):
        return expert_projections(module.module)[module.suffix.rpartition(".")[2]].transposed
    return isinstance(module, Conv1D) or getattr(module, "transposed", False)


def check_tells_apart(name: str, method: str, values: Tensor) -> None:
    """Raise ValueError if importance is not finite, or is the same for every weight."""
    low, high = values.min().item(), values.max().item()
    if not (abs(low) < torch.inf and abs(high) < torch.inf):  # NaN fails too
        raise ValueError(
            f"importance of {name} by {method} must be finite, got values from {low} to {high}: look for NaN or Inf in "
            "the model's weights"
        )
    if low == high and values.numel() > 1:
        raise ValueError(
            f"importance of {name} by {method} must vary, got {low} for every weight: it does not tell which weights "
            "to keep; choose another method, or leave the layer out with exclude_modules"
        )
