"""make architectures: what it reports as converted, wrong and refused, in its rows and their page."""

import pytest
from architectures.attempts import attempt
from architectures.sweeps import SWEEPS


def tried(name):
    sweep_name, kind = name.split("/")
    sweep = next(sweep for sweep in SWEEPS if sweep.name == sweep_name)
    return attempt(sweep, kind, sweep.kinds()[kind])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder/bert", "24 layers: dense, key, query, value"),
        ("seq2seq/t5", "54 layers: k, o, q, v, wi, wo"),
        ("vision/clip", "42 layers: fc1, fc2, k_proj, out_proj, q_proj, v_proj"),
        ("speech/whisper", "58 layers: fc1, fc2, k_proj, out_proj, q_proj, v_proj"),
        ("causal/mamba", "4 layers: in_proj, with target_modules=['in_proj']"),
    ],
)
def test_an_architecture_of_each_sweep_is_converted(name, words):
    row = tried(name)
    assert (row.state, row.words) == ("converted", words)


def test_a_causal_one_takes_a_step_of_training_or_it_says_why_not():
    assert tried("causal/llama4_text").left == ""
    assert tried("causal/bert").left.startswith("not trained by the recipe: model.name must be a causal language model")


def test_what_mask_model_refuses_is_told_in_its_words_without_the_remedy():
    row = tried("encoder/ibert")
    assert row.state == "refused"
    assert row.words.startswith("cannot mask ibert.encoder.layer.0.attention.self.query: it is a ")
    assert "exclude_modules" not in row.words
