"""mft.rewards.shared_prompts: questions are read once; states and gradients are those of each row."""

import pytest
import torch
from tiny import make_gpt2, make_llama, make_mistral

from mft.rewards.shared_prompts import states_before_answers

PROMPTS = [[5, 6, 7, 8, 9], [11], [5, 6, 7, 8, 9], [12, 13, 14], [11], [5, 6, 7, 8, 9]]
ANSWERS = [[1], [2, 3], [4, 5, 6], [7, 8, 9], [2, 3], [10, 11]]


def padded(prompts, answers):
    before, after = max(map(len, prompts)), max(map(len, answers))
    rows = [[0] * (before - len(p)) + p + a + [0] * (after - len(a)) for p, a in zip(prompts, answers)]
    seen = [
        [0] * (before - len(p)) + [1] * (len(p) + len(a)) + [0] * (after - len(a)) for p, a in zip(prompts, answers)
    ]
    return torch.tensor(rows), torch.tensor(seen), after


@pytest.mark.parametrize("make_model", [make_llama, make_mistral, lambda: make_gpt2(dropout=0.1)])
@pytest.mark.parametrize(
    ("longest", "order", "reads"),
    [
        (3, [0, 1, 2, 3, 4, 5], [(3, 5), (6, 2)]),
        (1, [0, 1, 2, 3, 4, 5], [(3, 5)]),
        (3, [0, 1, 2, 3], [(4, 8)]),  # three questions, four answers
    ],
)
def test_states_and_gradients_are_those_of_each_row_alone(make_model, longest, order, reads):
    model = make_model()
    prompts, answers = [PROMPTS[i] for i in order], [ANSWERS[i][:longest] for i in order]
    factors = [torch.randn(len(answer), 32) for answer in answers]
    alone = []
    for prompt, answer in zip(prompts, answers):
        hidden = model.base_model(torch.tensor([prompt + answer]))[0][0]
        alone.append(hidden[len(prompt) - 1 : -1])
    sum((states * each).sum() for states, each in zip(alone, factors)).backward()
    expected = {name: parameter.grad for name, parameter in model.base_model.named_parameters()}
    model.zero_grad(set_to_none=True)

    ids, seen, length = padded(prompts, answers)
    read = []
    model.get_input_embeddings().register_forward_hook(lambda _, given, made: read.append((*given[0].shape,)))
    states = states_before_answers(model, ids, seen, length)
    assert read == reads
    found = [row[: len(answer)] for row, answer in zip(states, answers)]
    sum((states * each).sum() for states, each in zip(found, factors)).backward()
    for one, other in zip(found, alone):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for name, parameter in model.base_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4)
