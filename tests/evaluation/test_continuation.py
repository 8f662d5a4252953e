"""mft.evaluation.continuation: a prompt that occurs several times is read once, and continued as usual."""

import pytest
import torch
from architectures.small import small_model
from architectures.sweeps import SWEEPS
from tiny import WORDS, make_gpt2, make_llama, make_mistral
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from mft.evaluation.continuation import continue_prompts, generating
from mft.models.key_value_cache import can_extend_cache

DISTINCT = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
ORDER = [0, 0, 2, 1, 0, 1, 2]


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2)).eval()


def settings(**changes):
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
    return GenerationConfig(**options | changes)


class Reads:
    """Records rows and tokens of the calls of a model's embedding."""

    def __init__(self, model):
        self.shapes = []
        model.get_input_embeddings().register_forward_hook(
            lambda _, given, made: self.shapes.append((*given[0].shape,))
        )


@pytest.mark.parametrize("make_model", [make_llama, make_mistral, make_gpt2, mamba])
def test_a_prompt_given_several_times_is_continued_as_alone(make_model):
    model = make_model()
    with torch.no_grad(), generating(model, settings()):
        alone = [continue_prompts([prompt], model, 0)[0] for prompt in DISTINCT]
        together = continue_prompts([DISTINCT[i] for i in ORDER], model, 0)
    if make_model is mamba:  # its state depends on the padding too
        alone[1:] = [together[ORDER.index(i)] for i in (1, 2)]
    assert together == [alone[i] for i in ORDER]
    assert len({*map(tuple, alone)}) > 1


@pytest.mark.parametrize(
    ("make_model", "first"),
    [(make_llama, [(3, 5), (7, 1)]), (make_mistral, [(3, 5), (7, 1)]), (mamba, [(7, 6), (7, 1)])],
)
def test_and_read_once_where_keys_and_values_are_all_that_is_remembered(make_model, first):
    model = make_model()
    reads = Reads(model)
    with torch.no_grad(), generating(model, settings()):
        continue_prompts([DISTINCT[i] for i in ORDER], model, 0)
    assert reads.shapes[:2] == first


@pytest.mark.parametrize("kind", ["openai-gpt", "bloom", "rwkv"])
def test_an_attention_or_a_state_of_a_model_s_own_reads_every_prompt(kind):
    model = small_model(kind, SWEEPS[0].name, SWEEPS[0].kinds()[kind]).eval()
    assert not can_extend_cache(model)
    with torch.no_grad(), generating(model, settings()):
        first, again = continue_prompts([DISTINCT[0]] * 2, model, 0)
    assert first == again


def test_samples_of_one_prompt_differ_and_their_distribution_is_the_model_s():
    model = make_llama()
    torch.manual_seed(0)
    with torch.no_grad(), generating(model, settings(max_new_tokens=1, min_new_tokens=1, do_sample=True, top_k=0)):
        found = [tokens[0] for tokens in continue_prompts([DISTINCT[0]] * 4000, model, 0)]
        wanted = model(torch.tensor([DISTINCT[0]])).logits[0, -1]
    wanted[1] = -torch.inf  # eos, which min_new_tokens forbids
    shares = torch.bincount(torch.tensor(found), minlength=61) / 4000
    torch.testing.assert_close(shares, wanted.softmax(0), atol=0.01, rtol=0)
