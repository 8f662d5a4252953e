"""Several examples in one row, each computed as if it were alone: position_ids restart where an example starts.

transformers derives the limits of attention from position_ids. sdpa, eager and flex attention use a block mask (for
sdpa on a CPU see block_attention.py). Flash attention uses the lengths of the parts, for a batch of one row only. A
model that takes no position_ids, or carries a state from token to token, cannot keep examples apart. Neither can a
model whose frequencies depend on the longest example, unless it runs inside by_own_length (longrope.py). A few tokens
are run through the model to find out.
"""

import contextlib
import inspect
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mft.data.batches import holds_packed_rows, row_length
from mft.models.block_attention import attention_in_blocks
from mft.models.causal_lm import Run, decoder_of, evaluating, run_decoder
from mft.models.longrope import by_own_length, switch_length
from mft.models.weight_files import weight_files

_LEAK = 1e-2  # relative to the change without position_ids; another order of sums changes bits only
_ROUNDING = 1e-3  # relative to the largest state: room for the same sums in another order


@contextlib.contextmanager
def keep_apart(model: nn.Module, dataset, few: Tensor, batch_size: int) -> Iterator[None]:
    """Prepare model for rows of dataset in batches of batch_size. If rows are packed: check it, and attend in blocks.

    few: some tokens (1, T), T >= 2, on the model's device. Raises: as check_kept_apart. A model whose weights are in
    files is not checked: call check_apart with what runs it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(by_own_length(model))
        if holds_packed_rows(dataset):
            stack.enter_context(attention_in_blocks(model))
        if weight_files(model) is None:
            check_apart(model, dataset, few, batch_size)
        yield


def check_apart(model: nn.Module, dataset, few: Tensor, batch_size: int, run: Run = run_decoder) -> None:
    """Raise ValueError if the model cannot keep the examples of dataset's rows apart; see keep_apart."""
    longest, switch = row_length(dataset), switch_length(model)
    if holds_packed_rows(dataset):
        check_kept_apart(model, few, batch_size, longest, run)
    elif switch is not None and longest > switch:
        check_lengths_apart(model, few, longest, run)


@torch.no_grad()
def check_kept_apart(model: nn.Module, few: Tensor, batch_size: int, longest: int = 0, run: Run = run_decoder) -> None:
    """Raise ValueError if an example depends on an earlier one in its row, or on the length of that one.

    Args: few: some tokens (1, T), T >= 2, on the model's device. longest: tokens of the longest of the rows to come.
    """
    half = few.shape[1] // 2
    rows = few.expand(min(batch_size, 2), -1)
    others = rows.clone()
    others[:, :half] = (rows[:, :half] == 0).to(rows.dtype)  # another token everywhere: 1 for 0, else 0
    positions = torch.cat([torch.arange(half), torch.arange(few.shape[1] - half)]).to(few.device).expand_as(rows)
    name = type(model).__name__
    if not takes_positions(decoder_of(model)):
        raise ValueError(f"data.packing must be false for {name}, which takes no position_ids: examples see each other")
    with evaluating(model):
        together, apart = (_hidden_difference(run, model, rows, others, half, where) for where in (None, positions))
    if not apart <= _LEAK * together:
        raise ValueError(
            f"data.packing must be false for {name}, because its examples see other examples of their row: an "
            f"earlier one changes an example by {apart:.3g} if position_ids begin again, and by {together:.3g} if "
            f"not; tried with {len(rows)} rows per batch (flash attention separates the examples of a single row: "
            "set train.batch_size: 1)"
        )
    check_lengths_apart(model, few, longest, run)


@torch.no_grad()
def check_lengths_apart(model: nn.Module, few: Tensor, longest: int, run: Run = run_decoder) -> None:
    """Raise ValueError if an example changes after one of ``longest`` tokens. Positions stand for the length."""
    half = few.shape[1] // 2
    short, second = torch.arange(half), torch.arange(few.shape[1] - half)
    with evaluating(model):
        one, other = (
            run(model, few, torch.cat([first, second])[None].to(few.device))[:, half:].float().nan_to_num()
            for first in (short, short + max(longest - half, 0))
        )
    moved = (one - other).abs().max()
    if not moved <= _ROUNDING * one.abs().max():
        switch = switch_length(model)
        rule = "data.packing must be false" if switch is None else f"data.sequence_length must be at most {switch}"
        raise ValueError(
            f"{rule} for {type(model).__name__}, because its short examples change next to one of {longest} tokens, "
            f"got a change of {moved:.3g}: follow the rule, or run the model inside "
            "mft.models.longrope.by_own_length(model)"
        )


def takes_positions(decoder: nn.Module) -> bool:
    """Return whether the decoder's forward takes position_ids."""
    parameters = inspect.signature(decoder.forward).parameters
    return "position_ids" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def positions_of(decoder: nn.Module, seen: Tensor) -> Tensor | None:
    """Return positions (B, T) as generate counts them: padding (0 in seen (B, T)) adds none. None: it takes none."""
    return (seen.cumsum(-1) - 1).clamp(min=0) if takes_positions(decoder) else None


def _hidden_difference(
    run: Run, model: nn.Module, rows: Tensor, others: Tensor, half: int, positions: Tensor | None
) -> float:
    """Return how much the second half's hidden states differ between two first halves. NaN counts as no difference."""
    one, other = (run(model, ids, positions)[:, half:].float() for ids in (rows, others))
    return (one - other).nan_to_num().abs().max().item()
