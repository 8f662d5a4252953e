"""Tiny models, linears and rows that tests share: a random Llama with 61 words that learns to count."""

import json

import torch
from datasets import Dataset
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from mft.config import MaskConfig
from mft.evaluation.evaluate import Evaluation
from mft.masks.convert import mask_model

WORDS = 61


SIZES = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def _made(cls, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(config).eval()


def make_llama(dtype=torch.float32, **changes):
    return _made(LlamaForCausalLM, LlamaConfig(**SIZES | changes)).to(dtype)


def make_mistral(**changes):
    """Return a Mistral that sees three tokens back."""
    return _made(MistralForCausalLM, MistralConfig(**SIZES | {"num_hidden_layers": 2, "sliding_window": 3} | changes))


def make_gpt2(dropout=0.0, **changes):
    """Return a GPT-2, whose positions are absolute. dropout: of embeddings, attention and the layers' outputs."""
    sizes = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    drops = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    return _made(GPT2LMHeadModel, GPT2Config(**sizes | drops | {"bos_token_id": 0, "eos_token_id": 0} | changes))


def make_gemma2(**changes):
    """Return a Gemma 2 that caps its logits after the head, so that the head alone would give others."""
    sizes = SIZES | {"num_hidden_layers": 2, "head_dim": 8, "final_logit_softcapping": 0.05}
    return _made(Gemma2ForCausalLM, Gemma2Config(**sizes | changes))


def make_phi3(switch=16, **changes):
    """Return a Phi-3 with longrope: other frequencies beyond ``switch`` tokens, of 64 positions."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 64 / switch, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [4.0, 8.0, 16.0, 32.0], "original_max_position_embeddings": switch}
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Phi3Config(**sizes | changes, rope_parameters=rope, original_max_position_embeddings=switch)
        return Phi3ForCausalLM(config).eval()


def make_words(count=WORDS):
    """Return a tokenizer with one word per number below ``count``, and 0 as the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<end>": 0} | {str(i): i for i in range(1, count)}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")


def save_llama(directory):
    """Save the tiny Llama with save_pretrained, with a tokenizer that has one word per number."""
    make_words().save_pretrained(directory)
    make_llama().save_pretrained(directory)


def counting_lines():
    """Return 60 lines of JSON; the text of each is 20 numbers that count upwards."""
    texts = (" ".join(str(1 + (i * 7 + j) % (WORDS - 1)) for j in range(20)) for i in range(60))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def make_rows(count=8, length=12, seed=0):
    """Return rows that count upwards from a random start, so that there is something to learn."""
    start = torch.randint(0, WORDS, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = ((start + torch.arange(length)) % WORDS).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "document": [100 + i // 2 for i in range(count)]})


TOKENS = torch.tensor(make_rows(3)["input_ids"])


@torch.no_grad()
def logits(model, ids=TOKENS, **options):
    return model(input_ids=ids, **options).logits


def padded_rows():
    """Return rows of 12 tokens. Row i has 12 - i real tokens, all labelled but the first two; the rest is padding."""
    rows = make_rows(6)
    ids, labels = [], []
    for number, row in enumerate(rows["input_ids"]):
        ids.append(row[: 12 - number] + [0] * number)
        labels.append([-100, -100, *row[2 : 12 - number]] + [-100] * number)
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "document": rows["document"]})


def masked_llama(layers=(2, 3), dtype=torch.float32, **mask):
    return mask_model(make_llama(dtype), MaskConfig.paper(layers_to_transform=list(layers), **mask))


def normal(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def frozen_linear(out_features=24, in_features=40, bias=True, dtype=torch.float32):
    linear = nn.Linear(in_features, out_features, bias, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(normal(out_features, in_features))
    return linear


def evaluation(tokens, loss_sums, correct=None):
    """Return an Evaluation made by hand, with one document for each element of ``tokens``."""
    tokens = torch.tensor(tokens, dtype=torch.float64)
    correct = torch.zeros_like(tokens) if correct is None else torch.tensor(correct, dtype=torch.float64)
    return Evaluation(torch.arange(len(tokens)), tokens, torch.tensor(loss_sums, dtype=torch.float64), correct)


def equal(found, wanted):
    """Return whether two dictionaries hold the same tensors under the same names."""
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def assert_masks_agree(one, other, near):
    """Assert that two masked linears keep the same weights, but for those whose score is about ``near`` the threshold.

    near: how far their scores may differ, and so their thresholds.
    """
    values = one.scores if one.mode == "value" else one.scores.abs()
    doubtful = (values - one.current_mask().threshold).abs() <= 2 * near
    assert (doubtful | (one.mask() == other.mask())).all()


def train_by_trainer(model, directory, *callbacks, **arguments):
    """Return the model after transformers' Trainer has trained it: each step takes all four rows at a fixed rate."""
    from transformers import Trainer, TrainingArguments

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    training = TrainingArguments(str(directory), **settings, **quiet, **arguments)
    rows = make_rows(4).remove_columns("document")
    Trainer(model=model, args=training, train_dataset=rows, callbacks=list(callbacks)).train()
    return model
