"""The model card: only facts, no path of this machine, and blocks that run."""

import dataclasses
import re

import pytest
from huggingface_hub import ModelCard
from tiny import equal, masked_llama, save_llama
from tiny_run import succeed

import mft
from mft.config_file import save_config
from mft.masks.convert import merge_model
from mft.masks.export import save_masks
from mft.models import pretrained
from mft.publishing.card import is_made, license_of, model_card
from mft.publishing.content_kinds import AdapterContents, ModelContents, read_contents
from mft.publishing.push import push_to_hub

NAME = "user/masks"


def card_of(directory, **options):
    return model_card(read_contents(directory), NAME, **options)


def test_the_metadata_are_the_hubs_terms(run):
    data = ModelCard(card_of(run, license={"license": "apache-2.0"})).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["base_model_relation"] == "adapter"
    assert (data.library_name, data.pipeline_tag, data.license) == ("mft_kernels", "text-generation", "apache-2.0")
    assert data.language is None
    assert data.datasets is None  # it is a local file
    loss, accuracy = data.eval_results
    assert (loss.metric_type, loss.metric_value, loss.dataset_name) == ("loss", 2.25, "my.jsonl")
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.375)


def test_the_text_says_setting_results_and_configuration_and_no_directory_of_this_machine(run, tmp_path):
    card = card_of(run)
    assert str(tmp_path) not in card
    assert "secret" not in card
    assert "| before | 2.5000 | 25.00 % |\n| after | 2.2500 | 37.50 % |" in card
    assert "Loss after - before: -0.2500 ± 0.0312" in card
    export = mft.masks.export_format.read_export(run / "masks")
    kept, weights = sum(m.kept for m in export.modules), sum(m.shape[0] * m.shape[1] for m in export.modules)
    for row in (
        f"| kept | {100 * kept / weights:.2f} % of {weights} weights |",
        "| `keep_ratio` | 0.9 |",
        "| `mode` | magnitude |",
        "| `layers_to_transform` | 2-3 |",
        f"| weights of the base | {export.base_hash} |",
    ):
        assert row in card
    assert "  source: my.jsonl\n" in card
    assert "license" not in card
    assert "output_dir" not in card


def test_of_several_sources_no_directory_is_told_either(run):
    config = mft.load_config(run / "config.yaml", ["data.source=stdlib"])
    own = {"mine": {"source": "/secret/chats.jsonl", "weight": 2}, "theirs": {"source": "user/chats"}}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=own))
    save_config(config, run / "config.yaml")
    card = card_of(run)
    assert "secret" not in card
    assert "source: chats.jsonl" in card
    data = ModelCard(card).data
    assert data.datasets == ["user/chats"]
    assert data.eval_results[0].dataset_name == "chats.jsonl, user/chats"


def test_the_base_is_loaded_at_the_revision_that_the_run_had(run):
    config = (run / "config.yaml").read_text().replace("revision: null", "revision: v1")
    (run / "config.yaml").write_text(config)
    assert 'mft.load_model(mft.ModelConfig("smollm2-135m", revision="v1", dtype="float32"))' in card_of(run)


def test_what_nothing_says_is_left_out(tmp_path):
    card = card_of(save_masks(masked_llama(), tmp_path / "masks"))
    data = ModelCard(card).data
    assert (data.base_model, data.license, data.eval_results) == (None, None, None)
    for absent in ("## Results", "## Training", "base_model", "| base |", "None"):
        assert absent not in card


def test_the_license_is_that_of_the_bases_card_if_it_lies_here(tmp_path):
    save_llama(tmp_path / "base")
    assert license_of(str(tmp_path / "base")) == {}
    told = {"license": "other", "license_name": "llama2", "license_link": "LICENSE"}
    head = "".join(f"{key}: {value}\n" for key, value in told.items())
    (tmp_path / "base" / "README.md").write_text(f"---\n{head}---\n# It\n")
    assert license_of(str(tmp_path / "base")) == told
    assert license_of("someone/not-here") == license_of(None) == {}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_its_blocks_run_and_give_the_merged_model(hub, run, tmp_path, monkeypatch):
    save_llama(tmp_path / "base")
    monkeypatch.setattr(pretrained, "smollm2_directory", lambda dtype: tmp_path / "base")
    monkeypatch.setenv("MFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    push_to_hub(run, NAME)
    card = hub.repositories[NAME].files()["README.md"].content.decode()
    ours, through_peft = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (merge,) = re.findall(r"```sh\nmft (.*?)\n```", card)
    expected = merge_model(masked_llama()).state_dict()
    for text in (ours, through_peft):
        names = {"mft": mft}
        exec(text, names)
        model = names["model"].merge_and_unload() if text is through_peft else names["model"]
        assert equal(model.state_dict(), expected)
    succeed(*merge.split())
    push_to_hub(tmp_path / "merged", "user/merged")
    merged = hub.repositories["user/merged"].files()["README.md"].content.decode()
    data = ModelCard(merged).data
    assert (data["base_model_relation"], data.library_name) == ("finetune", "transformers")
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "masks of" in merged
    assert "| `layers_to_transform` | 2-3 |" in merged
    (loading,) = re.findall(r"```python\n(.*?)```", merged, re.DOTALL)
    exec(loading, names)
    assert equal(names["model"].state_dict(), expected)


MARKUP = "# Trusted\n\n<img src=x onerror=alert(1)> [click](https://evil.example) `x`"
EVIL = f"a/b/c\n\n{MARKUP} | cell | \u202e\\|\n```\n---\nend"
LONG = "x" * 100_000


def lines_of(text):
    return [line.strip() for line in text.splitlines()]


@pytest.mark.parametrize("evil", [EVIL, "```\n# Trusted", "- a\n# Trusted", "\0# Trusted", LONG, EVIL + LONG])
def test_no_text_of_a_file_becomes_a_line_or_a_tag_of_the_card(run, evil):
    """Each free text, in every kind of contents."""
    config = mft.load_config(run / "config.yaml", ["data.source=stdlib"])
    own = {"mine": {"source": evil}}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=own))
    contents = read_contents(run)
    rows = {evil: {"loss": 1.0, "accuracy": 0.5}, "after": {"loss": 1.0, "accuracy": 0.5}}
    texts = dict.fromkeys(("base_model_name_or_path", "base_hash", "content_hash", "dtype", "mode"), evil)
    lists = {key: [evil] for key in ("target_modules", "modules_to_save")}
    results = dataclasses.replace(contents.facts.results, evaluations=rows)
    more = {"base_quantization": evil, "config": config, "results": results}
    facts = dataclasses.replace(contents.facts, **texts, **lists, **more)
    plain = model_card(contents, NAME)
    others = (kind(contents.directory, contents.files, facts) for kind in (AdapterContents, ModelContents))
    for one in (dataclasses.replace(contents, facts=facts), *others):
        card = model_card(one, NAME, {"license": "mit"})
        data = ModelCard(card).data  # the header is intact
        assert (data.license, data.base_model) == ("mit", None)
        body = re.sub(r"(?sm)^(`{3,})\w+\n.*?^\1$", "", card.split("\n---\n", 1)[1])  # without code blocks
        body = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", body)  # and without inline code
        assert not re.search(r"(?m)^\s*#+ Trusted|<img|\]\(https://evil|onerror", body)
        heads = [line for line in lines_of(body) if line.startswith("#")]
        assert set(heads) <= {f"# {NAME}", "## Loading", "## Masks", "## Results", "## Training"}
        assert "\u202e" not in card.split("## Training")[0]
        assert len(card) < 40 * len(plain) if LONG not in evil else len(card) < 2 * len(LONG) + 40_000
        assert is_made(card)


def test_what_a_bases_card_says_of_its_license_stays_in_the_head(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text('---\nlicense: other\nlicense_name: "x\\n---\\n# Trusted"\n---\n')
    found = license_of(str(base))
    assert found == {"license": "other", "license_name": r"x\n---\n# Trusted"}
    assert license_of(LONG) == {}
