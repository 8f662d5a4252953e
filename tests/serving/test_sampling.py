"""Each option of sampling has its formula, and rows that choose the likeliest token share one look at the logits."""

from types import SimpleNamespace

import pytest
import torch
from torch import nan, tensor

from mft.serving.batch.generation import Generation, advance_all
from mft.serving.batch.sampling import Sampling, SamplingOptions

LOGITS = tensor([1.0, 3.0, 2.5, -1.0, 2.0])
CASES = [  # options, prompt, generated, the greedy choice or the tokens that remain
    ({"presence_penalty": 1.0}, [1], [], 1),  # of generated tokens alone
    ({"presence_penalty": 1.0}, [], [1, 1, 1], 2),  # 3 - 1 < 2.5
    ({"presence_penalty": 0.4}, [], [1, 1, 1], 1),
    ({"frequency_penalty": 0.4}, [], [1], 1),
    ({"frequency_penalty": 0.4}, [], [1, 1], 2),  # 3 - 0.8 < 2.5
    ({"frequency_penalty": -0.4}, [], [4, 4, 4], 4),
    ({"repetition_penalty": 1.3}, [1], [], 2),  # 3 / 1.3 < 2.5
    ({"repetition_penalty": 1.3}, [1], [2], 1),  # 2.5 / 1.3 < 3 / 1.3
    ({"top_k": 2, "temperature": 2.0}, [], [], {1, 2}),
    ({"top_k": -1, "temperature": 2.0}, [], [], {0, 1, 2, 3, 4}),
    ({"min_p": 0.4, "temperature": 1.0}, [], [], {1, 2}),  # exp(-0.5) = 0.61, exp(-1) = 0.37
]


@pytest.mark.parametrize(("changes", "prompt", "generated", "expected"), CASES)
def test_an_option_changes_what_is_chosen_as_its_formula_says(changes, prompt, generated, expected):
    sampling = Sampling(prompt, SamplingOptions(**{"temperature": 0.0, "seed": 3} | changes))
    found = {sampling.choose(LOGITS, generated) for _ in range(300 if isinstance(expected, set) else 1)}
    assert found == (expected if isinstance(expected, set) else {expected})


def test_a_row_with_a_nan_ends_alone_and_log_probabilities_are_those_before_the_options():
    plain = SamplingOptions(temperature=0)
    generations, pieces = [], [[], [], []]
    for made, options in zip(pieces, [plain, plain, SamplingOptions(temperature=0, frequency_penalty=2)], strict=True):
        text = SimpleNamespace(add=str, stopped=False)
        generations.append(Generation(None, [1], 9, Sampling([1], options), text, [], made.append, logprobs=1))
    generations[2].chosen += [1]
    advance_all(generations, torch.stack([LOGITS, tensor([0.0, nan, 9.0, 0.0, 0.0]), LOGITS]))
    assert [each.chosen for each in generations] == [[1], [], [1, 2]]
    assert pieces[1][0].refused.message == "the model's logits must be numbers, got NaN"
    expected = LOGITS.log_softmax(-1)
    (told,) = pieces[2][0].logprobs
    assert (told.token, told.logprob) == (2, pytest.approx(expected[2].item()))
    assert told.top == [(1, pytest.approx(expected[1].item()))]


def test_a_prompt_has_its_log_probabilities_once_however_it_is_read(monkeypatch):
    monkeypatch.setattr("mft.serving.batch.logprobs._AT_ONCE", 2)
    prompt, logits = [3, 1, 4, 0, 2, 2], torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    expected = [None, *(pytest.approx(logits.log_softmax(-1)[i, prompt[i + 1]].item()) for i in range(5))]
    for pieces in ([(0, 6)], [(0, 1), (1, 6)], [(0, 4), (0, 3), (3, 6), (0, 6)]):  # with a prompt that is read again
        made, text = [], SimpleNamespace(rest=str)
        sampling = Sampling(prompt, SamplingOptions(temperature=0))
        generation = Generation(None, prompt, 0, sampling, text, [], made.append, logprobs=0, reads_prompt=True)
        for start, end in pieces:
            generation.see_prompt(start, logits[start:end])
        advance_all([generation], logits[-1:])
        assert [each.token for each in made[0].logprobs] == prompt
        assert [each.logprob for each in made[0].logprobs] == expected
