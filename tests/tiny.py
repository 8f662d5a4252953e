"""Tiny models, linears and rows that tests share: a random Llama with 61 words that learns to count."""

import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from mft.config import MaskConfig
from mft.evaluation.evaluate import Evaluation
from mft.masks.convert import mask_model

WORDS = 61


def make_llama(dtype=torch.float32, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {
            "vocab_size": WORDS,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        }
        return LlamaForCausalLM(LlamaConfig(**sizes | changes)).to(dtype).eval()


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


def save_llama(directory):
    """Save the tiny Llama with save_pretrained, with a tokenizer that has one word per number."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<end>": 0} | {str(i): i for i in range(1, WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>").save_pretrained(directory)
    make_llama().save_pretrained(directory)


def make_rows(count=8, length=12, seed=0):
    """Return rows that count upwards from a random start, so that there is something to learn."""
    start = torch.randint(0, WORDS, (count, 1), generator=torch.Generator().manual_seed(seed))
    ids = ((start + torch.arange(length)) % WORDS).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "document": [100 + i // 2 for i in range(count)]})


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
