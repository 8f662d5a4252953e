"""Cross entropy of labelled tokens, one chunk of logits at a time: the logits of a batch never exist together.

On a CPU, the fp32 softmax of a chunk is computed a few rows at a time in the cache, and its gradient is written in the
logits' dtype. So nothing of a chunk's size exists in fp32. Seconds for forward and backward of 1,020 tokens through
SmolLM2-135M's head (49,152 x 576, bf16, one Zen 4 core, torch 2.13):

    F.cross_entropy             0.97
    this file                   0.77
    its two products alone      0.63

F.linear_cross_entropy is slower than F.cross_entropy: on 512 tokens (2 cores) 0.26 s against 0.16 s unchunked, and
1.39 s chunked. Its chunked sum is taken in bf16 and is 3.6 % off.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mft.data.batches import Labelled, find_labelled

CHUNK = 128  # tokens; bf16 logits of 49,152 words are then 12.6 MB
_GROUP = 256  # words per group in likeliest, which finds each group's largest logit first
_BLOCK = 400_000  # fp32 logits of a few rows: 1.6 MB, about the size of a core's cache


def backward_labelled_loss(head: nn.Module, hidden: Tensor, labelled: Labelled, scale: float) -> Tensor:
    """Backpropagate scale * (sum of losses) into all that requires grad, chunk by chunk. Return the sum, fp32."""
    states, targets = hidden.flatten(0, 1).index_select(0, labelled.positions), labelled.targets
    total = torch.zeros((), device=hidden.device)
    grads = []
    for chunk, wanted in zip(states.detach().split(CHUNK), targets.split(CHUNK)):
        leaf = chunk.requires_grad_()
        logits = head(leaf)
        d_logits = torch.empty_like(logits)
        total += _sum_of_losses(logits.detach(), wanted, scale, d_logits)
        logits.backward(d_logits)
        grads.append(leaf.grad)
    if grads and states.requires_grad:
        states.backward(torch.cat(grads))
    return total


@torch.no_grad()
def token_losses(
    head: nn.Module, hidden: Tensor, labels: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return per token (B, T - 1) the loss, whether the likeliest is right, and the loss of logits / temperature."""
    targets = labels[:, 1:]
    losses = torch.zeros(targets.shape, device=hidden.device)
    correct = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device)
    tempered = torch.zeros_like(losses)
    scored = targets != -100
    found = []
    for block, wanted in _blocks(head, hidden, labels):
        loss = _loss(block, wanted)
        warm = loss if temperature == 1 else _loss(block.float() / temperature, wanted)
        found.append((loss, likeliest(block) == wanted, warm))
    for values, parts in zip((losses, correct, tempered), zip(*found)):
        values[scored] = torch.cat(parts)
    return losses, correct, tempered


@torch.no_grad()
def temperature_slopes(head: nn.Module, hidden: Tensor, labels: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    """Return the first and second derivative of the summed loss of ``inverse`` * logits by ``inverse``, fp64.

    inverse is 1 / temperature. With p = softmax(inverse * z) and label y, the first derivative is the sum over tokens
    of E_p[z] - z_y, and the second is the sum of the variance of z under p.
    """
    first = torch.zeros((), dtype=torch.float64, device=hidden.device)
    second = torch.zeros_like(first)
    for block, wanted in _blocks(head, hidden, labels):
        values = block.float()
        shares = (values * inverse).softmax(-1)
        centred = values - (shares * values).sum(-1, keepdim=True)
        first -= centred.gather(-1, wanted[:, None]).sum(dtype=torch.float64)
        second += (shares * centred.square_()).sum(dtype=torch.float64)
    return first, second


def _blocks(head: nn.Module, hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits of a few labelled tokens at a time, and the tokens that follow them."""
    where = find_labelled(labels)
    states = hidden.flatten(0, 1).index_select(0, where.positions)
    for chunk, wanted in zip(states.split(CHUNK), where.targets.split(CHUNK)):
        logits = head(chunk)
        rows = rows_at_once(logits)
        yield from zip(logits.split(rows), wanted.split(rows))


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss per token, (M,), fp32."""
    return F.nll_loss(F.log_softmax(logits, -1, dtype=torch.float32), targets, reduction="none")


def likeliest(logits: Tensor) -> Tensor:
    """Return logits.argmax(-1) for logits (M, V). On a CPU amax per group of words takes half the time of argmax."""
    if logits.shape[-1] % _GROUP:
        return logits.argmax(-1)
    groups = logits.unflatten(-1, (-1, _GROUP))
    group = groups.amax(-1).argmax(-1)
    inside = groups[torch.arange(len(groups), device=logits.device), group]
    return group * _GROUP + inside.argmax(-1)


@torch.no_grad()
def _sum_of_losses(logits: Tensor, targets: Tensor, scale: float, d_logits: Tensor) -> Tensor:
    """Return the sum of -log softmax(logits)[target], fp32. Write scale * (softmax - one_hot) into d_logits."""
    total = torch.zeros((), device=logits.device)
    rows = rows_at_once(logits)
    for block, labels, out in zip(logits.split(rows), targets.split(rows), d_logits.split(rows)):
        p, places = F.softmax(block, -1, dtype=torch.float32), labels.unsqueeze(-1)
        log_sums = block.amax(-1).float() - p.amax(-1).log()
        total += (log_sums - block.gather(1, places).squeeze(-1).float()).sum()
        p.scatter_add_(1, places, torch.full_like(places, -1, dtype=p.dtype))
        out.copy_(p.mul_(scale))
    return total


def rows_at_once(logits: Tensor) -> int:
    """Return the rows per block: a few on a CPU, all on a GPU, where small kernels do not help."""
    return max(1, _BLOCK // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
