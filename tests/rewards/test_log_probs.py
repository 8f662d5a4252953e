"""Log-probabilities of answers equal those of plain softmaxes, whatever comes before them, for any head."""

import torch
from torch import nn

from mft.rewards.log_probs import token_log_probs


def test_values_and_gradients_are_those_of_whole_logits():
    head = nn.Linear(16, 50)
    states, tokens = torch.randn(300, 16, requires_grad=True), torch.randint(0, 50, (300,))
    factors = torch.randn(300)
    found, entropies = token_log_probs(head, states, tokens, 0.5)
    (found * factors).sum().backward()
    grads = [states.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()]
    for tensor in (states, head.weight, head.bias):
        tensor.grad = None
    log_p = (head(states) / 0.5).log_softmax(-1)
    expected = log_p[torch.arange(300), tokens]
    (expected * factors).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(entropies, -(log_p.exp() * log_p).sum(-1))
    assert not entropies.requires_grad
    for grad, tensor in zip(grads, (states, head.weight, head.bias)):
        torch.testing.assert_close(grad, tensor.grad)


def test_no_token_is_no_value():
    found, entropies = token_log_probs(nn.Linear(4, 9), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 1.0)
    assert found.shape == entropies.shape == (0,)
