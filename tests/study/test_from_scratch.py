"""mft_study.from_scratch, and the two parts of the stdlib corpus that it keeps apart."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mft.config import DataConfig, ModelConfig, TrainConfig
from mft.data.sources import open_source
from mft.models.pretrained import load_model
from mft_study.config import ScratchConfig
from mft_study.from_scratch import EOS, make_model, train_from_scratch, train_tokenizer

TEXTS = [f"def add_{i}(first, second):\n    return first + second + {i}\n\n" for i in range(60)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Return a configuration with a single file as source, and a model of some 12,000 weights."""
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ScratchConfig(
        vocab_size=280,
        hidden_size=16,
        intermediate_size=32,
        layers=2,
        heads=2,
        data=DataConfig(str(source), sequence_length=32),
        train=TrainConfig(lr=1e-2, steps=6, batch_size=2),
    )


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_the_same_configuration_gives_the_same_bits(config, tmp_path):
    torch.manual_seed(5)  # neither this seed nor the next one may change the result
    one = weights(train_from_scratch(config, tmp_path / "one"))
    state = torch.random.get_rng_state()
    make_model(config, train_tokenizer(TEXTS, 280))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    two = weights(train_from_scratch(config, tmp_path / "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_a_mixture_is_a_qwen3_moe_whose_experts_and_router_learn(config, tmp_path):
    config.experts, config.intermediate_size, config.experts_per_token = 3, 8, 2
    config.train.steps = 2
    before = make_model(config, train_tokenizer(TEXTS, config.vocab_size)).state_dict()
    model = AutoModelForCausalLM.from_pretrained(train_from_scratch(config, tmp_path / "moe"))
    assert model.config.model_type == "qwen3_moe"
    assert tuple(model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").shape) == (3, 16, 16)
    for part in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
        name = f"model.layers.0.mlp.{part}"
        assert not torch.equal(model.state_dict()[name], before[name]), name
    with pytest.raises(ValueError, match="experts_per_token must be at most experts = 3, got 4"):
        ScratchConfig(experts=3, experts_per_token=4)


def test_the_directory_is_an_ordinary_model(config, tmp_path):
    steps = []
    directory = train_from_scratch(config, tmp_path / "base", progress=steps.append)
    assert [report.step for report in steps] == list(range(1, 7))
    assert steps[-1].loss < steps[0].loss
    model, tokenizer = load_model(ModelConfig(str(directory), dtype="float32"))
    assert len(tokenizer) == model.config.vocab_size == 280
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids(EOS)
    plain = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.encode(TEXTS[0]) == plain.encode(TEXTS[0])


def test_the_tokenizer_gives_every_text_back_and_splits_digits():
    tokenizer = train_tokenizer([*TEXTS, "year 2024 " * 500], 280)
    for text in ("naïve\t日本 🙂\r\n  x", " leading", TEXTS[7]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("2468013579")) == 10
    assert all(len(token) == 1 for token in tokenizer.get_vocab() if any(c.isdigit() for c in token))


def test_the_tokenizer_knows_training_files_alone(config, tmp_path):
    """A word in every text of validation and test, but in no text of train, does not become a token."""
    splits = {"train": TEXTS, "validation": ["zyzzyva zyzzyva"] * 40, "test": ["zyzzyva zyzzyva"] * 40}
    folder = tmp_path / "data"
    folder.mkdir()
    for split, texts in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config.data = DataConfig(str(folder), sequence_length=32)
    tokenizer = AutoTokenizer.from_pretrained(train_from_scratch(config, tmp_path / "base"))
    assert len(tokenizer.tokenize("zyzzyva")) == 7


def test_too_little_text_for_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be reached by the text's merges, got 500 wanted and"):
        train_tokenizer(["def f"], 500)
    with pytest.raises(ValueError, match="vocab_size must exceed the 256 bytes"):
        train_tokenizer(TEXTS, 256)


def test_only_plain_text_is_trained_on(config, tmp_path):
    config.data = DataConfig("problems", sequence_length=32)
    with pytest.raises(ValueError, match="data.source must be plain text to train a model on, got 'problems'"):
        train_from_scratch(config, tmp_path / "base")
    assert not (tmp_path / "base").exists()


# Parts of the stdlib corpus


def test_pretrain_and_finetune_divide_the_training_files():
    loaded = {subset: open_source(DataConfig(subset=subset)).load() for subset in (None, "pretrain", "finetune")}
    numbers = {subset: set(splits["train"].numbers) for subset, splits in loaded.items()}
    assert numbers["pretrain"] | numbers["finetune"] == numbers[None]
    assert not numbers["pretrain"] & numbers["finetune"]
    assert 0.5 < len(numbers["pretrain"]) / len(numbers[None]) < 0.7
    for split in ("validation", "test"):
        assert loaded["pretrain"][split].numbers == loaded["finetune"][split].numbers == loaded[None][split].numbers
