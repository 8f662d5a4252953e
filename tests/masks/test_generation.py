"""model.generate on a masked model: with every cache, it gives the merged model's tokens."""

import copy

import pytest
import torch
from tiny import WORDS, make_llama, masked_llama
from tiny_mixtures import mixture

from mft.config import MaskConfig
from mft.masks.convert import mask_model, merge_model
from mft.masks.quantize import quantize_model

NEW = 12


def greedy(model, **options):
    """Generate for two prompts; the second is shorter and padded on its left."""
    ids = torch.randint(3, WORDS, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[1, :3] = mask[1, :3] = 0
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **options)[
        :, ids.shape[1] :
    ]


BASES = {"llama": make_llama, "mixture": lambda: mixture("Qwen3Moe", initializer_range=0.3)}


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}],
    ids=["no cache", "dynamic cache", "static cache"],
)
@pytest.mark.parametrize("make", BASES.values(), ids=BASES)
def test_a_masked_model_generates_what_the_merged_one_does(make, options):
    masked = mask_model(make(), MaskConfig.paper(keep_ratio=0.5))
    tokens = greedy(masked, **options)
    assert torch.equal(tokens, greedy(merge_model(copy.deepcopy(masked)), use_cache=False))
    assert not torch.equal(tokens, greedy(make(), use_cache=False))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_cache_changes_no_token_on_a_quantised_base(kind):
    masked = quantize_model(masked_llama(keep_ratio=0.5), kind, masked=True)
    assert torch.equal(greedy(masked, use_cache=True), greedy(masked, use_cache=False))
