"""Train a small Llama or Qwen3-MoE from scratch on one source: tokenizer and weights, reproducibly.

One machine and one thread give the same bits every time: merges, initial weights and row order follow from seeds.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from mft.data.sources import form_of, open_source
from mft.data.splits import load_splits
from mft.models.pretrained import save_model
from mft.training.loop import StepReport, finetune
from mft_study.config import ScratchConfig

EOS = "<|endoftext|>"
BYTES = 256  # tokens of a byte-level vocabulary before any merge
CONTEXT = 1024  # positions that the saved model admits; RoPE has no weights for them

# Standard deviation of the initial weights: between transformers' 0.02, made for wide layers, and
# 1 / sqrt(hidden_size) = 0.09. Not tuned.
INITIALIZER_RANGE = 0.06


def train_from_scratch(
    config: ScratchConfig, directory: Path, *, progress: Callable[[StepReport], None] | None = None
) -> Path:
    """Train tokenizer and fp32 model on config.data's training files; write both into directory, whole or not at all.

    Raises: ValueError if config.data is not plain text, or has too little text for the vocabulary.
    """
    tokenizer = train_tokenizer(_training_texts(config), config.vocab_size)
    splits = load_splits(config.data, tokenizer)
    model = make_model(config, tokenizer)
    finetune(model, splits.train, config.train, on_step=progress)
    return save_model(model, tokenizer, directory)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly vocab_size tokens, in which each digit is a token of its own."""
    if vocab_size <= BYTES:
        raise ValueError(f"vocab_size must exceed the {BYTES} bytes and end of text, got {vocab_size}: take 2048")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size must be reached by the text's merges, got {vocab_size} wanted and "
            f"{bpe.get_vocab_size()} found: give more text, or a smaller vocabulary"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(config: ScratchConfig, tokenizer: Any) -> PreTrainedModel:
    """Return an untrained fp32 Llama or Qwen3-MoE with tied embeddings, without a loss that balances experts."""
    settings = model_config(config, len(tokenizer), tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        return Qwen3MoeForCausalLM(settings) if isinstance(settings, Qwen3MoeConfig) else LlamaForCausalLM(settings)


def model_config(
    config: ScratchConfig, words: int | None = None, eos: int | None = None
) -> LlamaConfig | Qwen3MoeConfig:
    """Return the config of make_model's model. words: the tokenizer's size; None: config.vocab_size."""
    sizes: dict[str, Any] = {
        "vocab_size": words or config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "max_position_embeddings": max(CONTEXT, config.data.sequence_length),
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": eos,
    }
    if not config.experts:
        return LlamaConfig(**sizes, intermediate_size=config.intermediate_size)
    sizes |= {
        "head_dim": config.hidden_size // config.heads,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": True,
    }
    return Qwen3MoeConfig(**sizes)


def _training_texts(config: ScratchConfig) -> list[str]:
    records = open_source(config.data).load()["train"]
    if form_of(records) != "text":
        raise ValueError(f"data.source must be plain text to train a model on, got {config.data.source!r}: take stdlib")
    return [row["text"] for row in records.rows]
