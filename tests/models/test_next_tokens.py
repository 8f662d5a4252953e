"""Whether a model predicts next tokens, and how long its rows may be: known before a weight is loaded."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import WORDS, make_llama, make_rows
from tiny_study import make_study
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mft.config import MaskConfig, TrainConfig
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import mask_model
from mft.models.next_tokens import check_next_tokens, longest_row
from mft.training.loop import train_masks
from mft_study.bases import Bases
from mft_study.workspace import Workspace

SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 64}


def make_bert(**changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(BertConfig(**BERT | changes)).eval()


@torch.no_grad()
def sees_ahead(model):
    """Return whether an early token's logits depend on a late token."""
    ids = torch.arange(1, 9).unsqueeze(0)
    other = ids.clone()
    other[0, -1] = 40
    return not torch.equal(model(ids).logits[0, :-1], model(other).logits[0, :-1])


def test_what_is_refused_sees_the_tokens_to_predict_and_what_is_accepted_does_not():
    encoder, decoder = make_bert(), make_bert(is_decoder=True)
    assert sees_ahead(encoder)
    with pytest.raises(ValueError, match="got 'mine': a model of type bert with is_decoder false sees the tokens that"):
        check_next_tokens(encoder.config, "mine")
    assert not sees_ahead(decoder)
    check_next_tokens(decoder.config, "mine")


def test_every_architecture_that_asks_to_be_told_that_it_is_a_decoder_is_known():
    """transformers makes each of them all the same, with a warning whose sentence is in its source."""
    sources = {path.stem: path for path in Path(find_spec("transformers").origin).parent.glob("models/*/modeling_*.py")}
    kinds = {f"modeling_{kind.replace('-', '_')}": kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    asks = re.compile(r"(add|sure that) `is_decoder=True")
    asking = [kinds[name] for name in kinds.keys() & sources.keys() if asks.search(sources[name].read_text("utf-8"))]
    assert {"bert", "xlm-roberta", "reformer"} <= set(asking)
    for kind in asking:
        with pytest.raises(ValueError, match=f"a model of type {kind} with is_decoder false"):
            check_next_tokens(AutoConfig.for_model(kind), "mine")


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (GPT2Config(n_positions=64), 64),
        (LlamaConfig(max_position_embeddings=64), 64),
        (LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "linear", "factor": 4.0}), 256),
        (
            Qwen2Config(
                max_position_embeddings=64,
                rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            ),
            128,
        ),
        (FalconConfig(alibi=True), None),
    ],
    ids=["learned", "rotary", "linear", "yarn", "alibi"],
)
def test_the_longest_row_is_as_long_as_positions_reach(config, longest):
    assert longest_row(config) == longest
    check_next_tokens(config, "mine", longest or 1 << 20)
    if longest is not None:
        with pytest.raises(ValueError, match=rf"must be at most {longest}, .* 'mine' has .*, got {longest + 1}"):
            check_next_tokens(config, "mine", longest + 1)


@pytest.mark.parametrize("way", ["plain", "resident", "layerwise"])
def test_rows_beyond_the_positions_are_refused_in_every_way(way):
    rows, refused = make_rows(4, length=40), "data.sequence_length must be at most 32, .*, got 40"
    model = mask_model(make_llama(max_position_embeddings=32), MaskConfig())
    with pytest.raises(ValueError, match=refused):
        train_masks(model, rows, TrainConfig(steps=1), way=way)
    with pytest.raises(ValueError, match=refused):
        evaluate(model, rows, way=way)


@pytest.mark.parametrize("verb", ["train", "finetune", "evaluate"])
def test_the_command_line_refuses_before_it_reads_a_weight(cli, tmp_path, verb):
    name = tmp_path / "without-weights"
    for config, told in (
        (
            GPT2Config(n_positions=64),
            f"data.sequence_length must be at most 64, as many positions as '{name}' has",
        ),
        (BertConfig(**BERT), f"got '{name}': a model of type bert with is_decoder false sees the tokens that"),
    ):
        config.save_pretrained(name)
        output = cli.refused(verb, f"model.name={name}", "data.sequence_length=128")
        assert told in output
        assert not (tmp_path / "run").exists()


def test_a_study_refuses_before_it_reads_a_weight(tmp_path):
    make_llama().config.save_pretrained(tmp_path / "model")
    longer = {"sequence_length": 4096, "max_train_tokens": 8192, "max_eval_tokens": 4096}
    study = make_study(tmp_path, overrides=[f"domains.count.{key}={tokens}" for key, tokens in longer.items()])
    with pytest.raises(ValueError, match="must be at most 2048, .* got 4096"):
        Workspace(study, Bases(study, tmp_path))
