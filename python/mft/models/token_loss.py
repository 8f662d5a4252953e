"""Cross entropy of labelled tokens, a chunk of logits at a time: the logits of a batch never exist together.

On a CPU the fp32 softmax of a chunk goes through the cache a few rows at a time and its gradient is written in the
logits' dtype, so that nothing of a chunk's size exists in fp32. 1,020 tokens of SmolLM2-135M's head (49,152 x 576,
bf16, one Zen 4 core, torch 2.13) forward and backward: F.cross_entropy 0.97 s, this 0.77 s, its two products alone
0.63 s. F.linear_cross_entropy is slower than the former: 0.26 s against 0.16 s on 512 tokens unchunked (2 cores),
1.39 s chunked, and the chunked sum, taken in bf16, is 3.6 % off.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mft.data.batches import Labelled, find_labelled

CHUNK = 128  # tokens; bf16 logits of 49,152 words are then 12.6 MB
_GROUP = 256  # words, of whose logits the largest is found first
_BLOCK = 400_000  # fp32 logits of a few rows: 1.6 MB, of the order of a core's cache


def backward_token_loss(head: nn.Module, hidden: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Backpropagate scale * (sum of the tokens' losses) into whatever requires grad; returns the plain sum, fp32.

    A chunk's logits are dropped before the next chunk's are made, then the decoder's backward runs once.
    """
    return backward_labelled_loss(head, hidden, find_labelled(labels), scale)


def backward_labelled_loss(head: nn.Module, hidden: Tensor, labelled: Labelled, scale: float) -> Tensor:
    """backward_token_loss of labels that have been looked up."""
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
    """Loss, whether the likeliest next token is the label, and the loss of logits / temperature, in fp32.

    Each (B, T - 1), 0 where there is no label.
    """
    targets = labels[:, 1:]
    losses = torch.zeros(targets.shape, device=hidden.device)
    correct = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device)
    tempered = torch.zeros_like(losses)
    scored = targets != -100
    where = find_labelled(labels)
    states = hidden.flatten(0, 1).index_select(0, where.positions)
    found = list(_losses_of_chunks(head, states, where.targets, temperature))
    for values, parts in zip((losses, correct, tempered), zip(*found)):
        values[scored] = torch.cat(parts)
    return losses, correct, tempered


@torch.no_grad()
def temperature_slopes(head: nn.Module, hidden: Tensor, labels: Tensor, inverse: float) -> tuple[Tensor, Tensor]:
    """First and second derivative of the summed loss of ``inverse`` * logits by ``inverse`` (1 / temperature), fp64.

    With p = softmax(inverse * z) and label y: sum over tokens of E_p[z] - z_y, and of the variance of z under p.
    """
    where = find_labelled(labels)
    states = hidden.flatten(0, 1).index_select(0, where.positions)
    first = torch.zeros((), dtype=torch.float64, device=hidden.device)
    second = torch.zeros_like(first)
    for chunk, wanted in zip(states.split(CHUNK), where.targets.split(CHUNK)):
        logits = head(chunk)
        rows = rows_at_once(logits)
        for block, labels in zip(logits.split(rows), wanted.split(rows)):
            values = block.float()
            shares = (values * inverse).softmax(-1)
            centred = values - (shares * values).sum(-1, keepdim=True)
            first -= centred.gather(-1, labels[:, None]).sum(dtype=torch.float64)
            second += (shares * centred.square_()).sum(dtype=torch.float64)
    return first, second


def _losses_of_chunks(
    head: nn.Module, states: Tensor, targets: Tensor, temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for chunk, wanted in zip(states.split(CHUNK), targets.split(CHUNK)):
        logits = head(chunk)
        rows = rows_at_once(logits)
        for block, labels in zip(logits.split(rows), wanted.split(rows)):
            loss = _loss(block, labels)
            tempered = loss if temperature == 1 else _loss(block.float() / temperature, labels)
            yield loss, likeliest(block) == labels, tempered


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(M,), fp32."""
    return F.nll_loss(F.log_softmax(logits, -1, dtype=torch.float32), targets, reduction="none")


def likeliest(logits: Tensor) -> Tensor:
    """logits.argmax(-1) of logits (M, V), the first of equals.

    torch's argmax is not vectorised on a CPU, amax is: half the time, by the largest of each group of words.
    """
    if logits.shape[-1] % _GROUP:
        return logits.argmax(-1)
    groups = logits.unflatten(-1, (-1, _GROUP))
    group = groups.amax(-1).argmax(-1)
    inside = groups[torch.arange(len(groups), device=logits.device), group]
    return group * _GROUP + inside.argmax(-1)


@torch.no_grad()
def _sum_of_losses(logits: Tensor, targets: Tensor, scale: float, d_logits: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[target], fp32; writes its gradient, scale * (softmax - one hot), into d_logits.

    One exponential a word: log(sum of exp) is the largest logit less the log of its share, which is 1 / V or more.
    """
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
    """A GPU has no use for small kernels: there a chunk is one block."""
    return max(1, _BLOCK // logits.shape[-1]) if logits.device.type == "cpu" else len(logits)
