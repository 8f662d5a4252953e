"""make architectures: what it reports as converted, wrong and refused, in its rows and their page."""

import pytest
from architectures import attempts
from architectures.attempts import attempt
from architectures.page import page
from architectures.rows import Row, read, write
from architectures.sweeps import SWEEPS

from mft.masks.convert import merge_model


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


def test_a_merge_that_changes_the_outputs_is_wrong(monkeypatch):
    def merge_and_drop(model):
        merged = merge_model(model)
        merged.bert.encoder.layer[0].output.dense.weight[0] = 0
        return merged

    monkeypatch.setattr(attempts, "merge_model", merge_and_drop)
    row = tried("encoder/bert")
    assert row.state == "wrong"
    assert "merging changed the outputs" in row.words


def test_a_mask_that_does_not_keep_all_is_wrong(monkeypatch):
    masked = attempts._masked
    monkeypatch.setattr(attempts, "_masked", lambda base, choice, keep_ratio: masked(base, choice, keep_ratio=0.7))
    assert tried("encoder/bert").words.startswith("with everything kept the outputs differ by ")


def test_scores_without_a_gradient_are_wrong(monkeypatch):
    monkeypatch.setattr(attempts, "INSTEAD", {})  # BLT's patcher decides where patches end, without autograd
    row = tried("causal/blt")
    assert row.state == "wrong"
    assert "no gradient reached model.patcher.layers.0.self_attn.q_proj" in row.words


ROWS = {
    "encoder": {
        "bert": Row("bert", "converted", "24 layers: dense", "reduction"),
        "mra": Row("mra", "not made", "a | b"),
    },
    "vision": {"bit": Row("bit", "refused", 'no "layers"', transformers="5.0"), "vit": Row("vit", "converted", "3, 4")},
}


def test_rows_are_read_as_they_were_written(tmp_path):
    write(ROWS, tmp_path / "rows.csv")
    assert read(tmp_path / "rows.csv") == ROWS


def test_the_page_has_a_table_of_each_state_with_its_rows():
    lines = page(ROWS).splitlines()
    assert "**2 converted, 1 refused, 1 not made.**" in lines
    assert "| Vision | 1 | 0 | 1 | 0 |" in lines
    for row in ("| bert | 24 layers: dense | reduction |", "| mra | a / b |"):  # a table cell cannot hold a bar
        assert lines.index("## Encoders") < lines.index(row) < lines.index("## Vision")
    assert lines.index("| vit | 3, 4 |  |") < lines.index('| bit | no "layers" |')


def test_the_page_of_the_stored_rows_has_each_in_its_section():
    rows = read()
    sections = dict(section.split("\n", 1) for section in page(rows).split("\n## ")[1:])
    assert list(rows) == [sweep.name for sweep in SWEEPS]
    assert list(sections) == [sweep.title for sweep in SWEEPS]
    for section, some in zip(sections.values(), rows.values(), strict=True):
        assert some
        assert [kind for kind in some if f"\n| {kind} | " not in section] == []
