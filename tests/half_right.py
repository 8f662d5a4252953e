"""A small Llama that answers some questions right, and the questions as rows."""

from datasets import Dataset
from tiny import make_llama

from mft.config import MaskConfig, TrainConfig
from mft.masks.convert import mask_model, masked_modules
from mft.rewards.config import RewardsConfig
from mft.training.loop import finetune
from mft_study.from_scratch import train_tokenizer

NAMES = ("Al", "Bert", "Christopher", "Dee", "Evangeline", "Fay")
LENGTH = 24
SMALL = {"max_completion_tokens": 4, "questions": 4, "num_generations": 4, "steps": 2, "lr": 1e-2}


def config(**changes):
    return RewardsConfig(**SMALL | changes)


def make_tokenizer():
    texts = [f"{name} has {i}{j} and" for name in NAMES for i in range(10) for j in range(10)]
    return train_tokenizer(texts, 270)


def make_rows(pairs, tokenizer):
    """Return rows as load_splits makes them, from (prompt, completion), or (prompt, completion, document)."""
    columns = {"input_ids": [], "labels": [], "document": []}
    for number, (prompt, completion, *document) in enumerate(pairs):
        head, tail = tokenizer.encode(prompt), [*tokenizer.encode(completion), tokenizer.eos_token_id]
        padding = LENGTH - len(head) - len(tail)
        columns["input_ids"].append(head + tail + [tokenizer.eos_token_id] * padding)
        columns["labels"].append([-100] * len(head) + tail + [-100] * padding)
        columns["document"].append(*document or [number])
    return Dataset.from_dict(columns)


def questions(count):
    return [(f"{NAMES[i % 6]} has {i}:", f" {i % 7}") for i in range(count)]


def make_model(tokenizer, steps=120):
    eos = tokenizer.eos_token_id
    words = {"vocab_size": len(tokenizer), "eos_token_id": eos, "pad_token_id": eos, "bos_token_id": None}
    model = make_llama(num_hidden_layers=2, **words).train()
    finetune(model, make_rows(questions(24), tokenizer), TrainConfig.of_weights(lr=3e-3, steps=steps, batch_size=8))
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_near(found, expected):
    """Assert that gradients of the same parameters agree, each within 1e-4 of its norm."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm(), name


def masked(model, **options):
    """Mask the model, with scores that learn."""
    mask_model(model, MaskConfig(**({} if "budget" in options else {"keep_ratio": 0.98}) | options))
    model.requires_grad_(False)
    for module in masked_modules(model).values():
        module.scores.requires_grad_()
    return model
