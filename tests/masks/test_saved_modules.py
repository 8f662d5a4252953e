"""modules_to_save: trained whole together with the masks, saved, restored and merged; refused where impossible."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import WORDS, make_llama, make_rows
from transformers import LlamaConfig, LlamaForSequenceClassification

from mft.config import MaskConfig, TrainConfig
from mft.masks.bank import load_mask_bank
from mft.masks.convert import mask_model, masked_modules, merge_model, trainable_parameters
from mft.masks.export import load_masks, save_masks
from mft.masks.export_format import CONFIG_FILE, MASK_FILE, read_export
from mft.masks.paper_masks import write_paper_masks
from mft.training.loop import train_masks

IDS = torch.randint(1, WORDS, (3, 7), generator=torch.Generator().manual_seed(1))
MASK = {"modules_to_save": ["score"], "layers_to_transform": [1], "keep_ratio": 0.5}


def classifier(labels=3):
    """Return a base as from_pretrained gives it: its head is drawn again each time."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=WORDS, num_labels=labels, pad_token_id=0, max_position_embeddings=32, **sizes)
    ).eval()
    fresh = torch.randn(labels, 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.1)
    model.score.weight.data = fresh
    return model


def trained(**changes):
    """Return a masked classifier after one step of an ordinary loop."""
    model = mask_model(classifier(), MaskConfig(**MASK | changes))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    return model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_fresh_head_is_trained_and_counted():
    model = mask_model(classifier(), MaskConfig(**MASK))
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name in learned if not name.endswith(".scores")] == ["score.weight"]
    scores = sum(module.scores.numel() for module in masked_modules(model).values())
    assert trainable_parameters(model)[0] == scores + 3 * 32
    before = model.score.weight.clone()
    model(IDS, labels=torch.tensor([0, 1, 2])).loss.backward()
    torch.optim.SGD([model.score.weight], lr=0.1).step()
    assert not torch.equal(model.score.weight, before)


@pytest.mark.parametrize("copied", [False, True])
def test_it_is_saved_with_the_masks_and_comes_back_on_a_base_with_another_head(tmp_path, copied):
    model = trained()
    model = copy.deepcopy(model) if copied else model
    save_masks(model, tmp_path / "masks")
    assert json.loads((tmp_path / "masks" / CONFIG_FILE).read_text())["modules_to_save"] == ["score"]
    loaded = load_masks(classifier(), tmp_path / "masks")
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.score.weight.requires_grad
    torch.testing.assert_close(logits(merge_model(loaded)), logits(model))
    again = mask_model(classifier(), MaskConfig(**MASK))
    assert torch.equal(logits(load_masks(again, tmp_path / "masks")), logits(model))
    assert save_masks(again, tmp_path / "again").is_dir()
    assert read_export(tmp_path / "again").modules_to_save == ["score"]


def test_after_merging_it_is_an_ordinary_module():
    merged = mask_model(merge_model(trained()), MaskConfig())
    assert not merged.score.weight.requires_grad


def test_masks_alone_are_saved_as_before(tmp_path):
    save_masks(mask_model(classifier(), MaskConfig()), tmp_path / "masks")
    assert "modules_to_save" not in json.loads((tmp_path / "masks" / CONFIG_FILE).read_text())


def test_a_saved_module_is_not_masked_too():
    model = mask_model(classifier(), MaskConfig(target_modules="all-linear", modules_to_save=["score", "1.mlp"]))
    assert not [name for name in masked_modules(model) if "score" in name or "1.mlp" in name]
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad


def test_damage_to_a_saved_tensor_is_found(tmp_path):
    save_masks(trained(), tmp_path / "masks")
    path = tmp_path / "masks" / MASK_FILE
    tensors = load_file(path)
    tensors["score.weight"][1, 7] += 1e-3
    save_file(tensors, path)
    with pytest.raises(ValueError, match="content_hash"):
        load_masks(classifier(), tmp_path / "masks")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["scores"], r"modules_to_save: 'scores' matches no module; did you mean score\?"),
        (["score.weight"], r"modules_to_save: 'score.weight' matches no module"),
        (["rotary_emb"], r"'rotary_emb' names model.rotary_emb .*, whose parameters must .* got none"),
        ([], "modules_to_save must not be empty"),
    ],
)
def test_a_name_that_trains_nothing_is_an_error(names, message):
    model = classifier()
    with pytest.raises(ValueError, match=message):
        mask_model(model, MaskConfig(modules_to_save=names))
    assert not masked_modules(model)


def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(tmp_path):
    save_masks(trained(), tmp_path / "masks")
    wider = classifier(labels=5)
    with pytest.raises(ValueError, match=r"score.weight must be of the shape .* \(3, 32\), the model's is \(5, 32\)"):
        load_masks(wider, tmp_path / "masks")
    assert not masked_modules(wider)
    with pytest.raises(ValueError, match="LlamaModel has no score|no linear layer named"):
        load_masks(classifier().model, tmp_path / "masks")


def test_who_cannot_take_it_over_says_so(tmp_path):
    model = trained()
    save_masks(model, tmp_path / "masks")
    with pytest.raises(ValueError, match=r"expected masks alone, got modules_to_save too \(score\): .* not for a bank"):
        load_mask_bank(classifier(), {"task": tmp_path / "masks"})
    with pytest.raises(ValueError, match=r"masks alone for the paper's format, got modules_to_save too \(score\)"):
        write_paper_masks(model, tmp_path / "masks.pt")


# ---------------------------------------------------------------------------------------------- the recipe


def masked_llama(dtype=torch.float32):
    return mask_model(make_llama(dtype), MaskConfig(layers_to_transform=[3], modules_to_save=["model.norm", "lm_head"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_recipe_trains_it_beside_the_scores(dtype):
    model = masked_llama(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_masks(model, make_rows(), TrainConfig(steps=3, lr=1e-2, warmup_ratio=0.0))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if "scores" not in name} == {"model.norm.weight", "lm_head.weight"}
    assert len(changed) == 2 + len(masked_modules(model))
