"""Several masks on one base under PEFT, switched, merged, unmerged and deleted.

They follow the tests that PEFT runs on its own methods (huggingface/peft, tests/testing_common.py, Apache 2.0), by
subject and in our words. test_peft_suite.py runs the originals, if a checkout of PEFT is given.
"""

import contextlib
import copy

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model, save_as_lora
from peft_masks import STILL_CALLED, TWO, UP, assert_same, config, layers, two_masks, with_masks
from tiny import TOKENS, logits, make_llama
from tiny_architectures import state
from torch import nn

from mft import MaskConfig, mask_model, merge_model, merged_weights

pytestmark = STILL_CALLED


# ---------------------------------------------------------------------------------------------- several masks


@pytest.mark.parametrize(("kind", "keep_ratio"), [("llama", 0.5), ("llama", 0.0), ("experts", 0.5)])
def test_masks_are_switched_and_deleted_on_weights_that_are_shared(kind, keep_ratio):
    make, first, second = TWO[kind]
    base, second = make(), second | {"keep_ratio": keep_ratio}
    addresses = {p.data_ptr() for p in base.parameters()}
    model = get_peft_model(base, config(**first)).eval()
    masked = logits(model)
    model.add_adapter("other", config(**second))
    assert torch.equal(logits(model), masked)
    model.set_adapter("other")
    alone = mask_model(make(), MaskConfig.paper(**second))
    assert torch.equal(logits(model), logits(alone))
    assert_same(dict(merged_weights(model)), state(merge_model(alone)))
    assert all(".mft_scores.other" in name for name, p in model.named_parameters() if p.requires_grad)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make()))
    model.set_adapter("default")
    assert torch.equal(logits(model), masked)
    assert addresses == {p.data_ptr() for name, p in model.named_parameters() if "mft_scores" not in name}
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] == model.active_adapters
    assert not any("other" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), masked)
    with pytest.raises(ValueError, match="Adapter other does not exist"):
        model.delete_adapter("other")
    unloaded = model.unload()
    assert_same(state(unloaded), state(make()))
    assert [type(module) for module in unloaded.modules()] == [type(module) for module in make().modules()]


def test_without_any_mask_it_is_the_base():
    model = with_masks()
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model), logits(make_llama()))


def test_disable_adapter_gives_the_output_of_the_base_bit_for_bit():
    model, base = two_masks(), logits(make_llama())
    masked = logits(model)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), masked)  # a merged mask is unmerged first, as elsewhere in PEFT
    assert not torch.equal(masked, base)


def test_several_active_masks_are_refused():
    model = two_masks()
    with pytest.raises(ValueError, match=r"one mask at a time can be active, got \['default', 'other'\]"):
        model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("kind", TWO)
def test_each_row_of_a_batch_takes_the_mask_that_it_names(kind):
    model, names = two_masks(kind), ["other", "__base__", "default"]
    alone = []
    for row, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            alone.append(logits(model, TOKENS[row : row + 1])[0])
    found = logits(model, adapter_names=names)
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert (found - logits(model)).abs().amax((1, 2)).gt(1e-3).tolist() == [True, True, False]
    hooked = [name for name, module in model.named_modules() if module._forward_pre_hooks]
    assert hooked == ["base_model.model.lm_head"]  # the hook of models/head_input.py
    with torch.no_grad():
        for layer in (m for m in model.modules() if "default" in getattr(m, "mft_scores", ())):
            for scores in layer.scores_of("default").values():
                scores.copy_(scores.flip(0))  # the write takes effect
    assert not torch.equal(logits(model, adapter_names=names)[2], found[2])
    with model.disable_adapter():
        assert torch.equal(logits(model, adapter_names=names), logits(TWO[kind][0]()))
    with pytest.raises(ValueError, match="adapter_names must have one entry per row .*, got 2 of them and an input"):
        logits(model, adapter_names=names[:2])
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match=r"no mask merged into them, got 'other' in .*: unmerge_adapter\(\) first"):
        logits(model, adapter_names=["default"] * 3)


def test_rows_with_masks_of_their_own_generate_what_each_alone_does():
    model, options = two_masks(), {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}  # different masks may give equal tokens
    for beams in (1, 2):
        found = model.generate(input_ids=TOKENS[:2], num_beams=beams, adapter_names=["other", "default"], **options)
        for row, name in enumerate(["other", "default"]):
            model.set_adapter(name)
            alone = model.generate(input_ids=TOKENS[row : row + 1], num_beams=beams, **options)
            assert found.sequences[row].tolist() == alone.sequences[0].tolist()
            mine = found.logits[0][row * beams : (row + 1) * beams]
            torch.testing.assert_close(mine, alone.logits[0], rtol=1e-5, atol=1e-6)


def test_rows_name_masks_that_there_are_of_a_model_that_infers():
    model, names = two_masks(), ["default", "other", "othre"]
    with pytest.raises(ValueError, match="among default, other, __base__, got 'othre'; did you mean other"):
        model(input_ids=TOKENS, adapter_names=names)
    with pytest.raises(
        TypeError, match="adapter_names must be a list with one name per row of the batch, got 'default'"
    ):
        model(input_ids=TOKENS, adapter_names="default")
    with pytest.raises(ValueError, match=r"got a model in training mode: model.eval\(\)"):
        model.train()(input_ids=TOKENS, adapter_names=["default"] * 3)


def test_deleting_the_active_mask_activates_another():
    model = with_masks()
    model.add_adapter("other", config(seed=1))
    model.set_adapter("other")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("other")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), logits(with_masks()))


# ---------------------------------------------------------------------------------------------- merging


def test_unmerging_restores_every_bit_of_the_weights():
    base = make_llama()
    with torch.no_grad():
        base.get_submodule(UP).weight.view(-1)[:6] = torch.tensor([float("nan"), float("-inf"), -0.0, 0.0, -1.0, 2.0])
    for kind in (torch.float32, torch.bfloat16):
        model = with_masks(copy.deepcopy(base).to(kind))
        before = state(model)
        model.merge_adapter()
        assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        model.unmerge_adapter()
        assert_same(state(model), before)


def test_merging_leaves_a_model_that_shares_the_weights_alone():
    base = make_llama()
    shared = copy.deepcopy(base, {id(p): nn.Parameter(p.data) for p in base.parameters()})
    with_masks(base).merge_and_unload()
    assert_same(state(shared), state(make_llama()))


def test_a_merged_model_computes_what_it_did_and_merges_once():
    model = with_masks()
    masked = logits(model)
    model.merge_adapter()
    merged = logits(model)
    assert (merged - masked).abs().max() < 1e-5
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(logits(model), merged)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        assert torch.equal(logits(model.merge_and_unload()), merged)


def test_a_named_mask_is_merged_whichever_is_active():
    merged = two_masks().merge_and_unload(adapter_names=["other"])
    model = two_masks()
    model.set_adapter("other")
    assert_same(state(merged), state(model.merge_and_unload()))


def test_two_masks_are_not_merged_into_one_weight():
    model = two_masks()
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"merged into model.layers.2.self_attn.q_proj, got \['default', 'other'\]"
        ):
            merge(adapter_names=["default", "other"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"got \['default', 'other'\]: unmerge_adapter\(\) first"):
        model.merge_adapter(adapter_names=["other"])
    with pytest.warns(UserWarning, match="Already unmerged"):  # PEFT's warning for the layers of the other mask
        model.unmerge_adapter()
    assert_same(state(model), before)


def test_a_mask_added_to_a_merged_model_is_drawn_from_the_whole_weights():
    model = with_masks()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="unmerging it first"):
        model.add_adapter("other", config(init="magnitude"))
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(with_masks(init="magnitude")))


@pytest.mark.parametrize("safe_merge", [True, False])
def test_scores_that_are_not_finite_leave_every_weight_as_it_was(safe_merge):
    model = with_masks()
    with torch.no_grad():
        layers(model)[-1].mft_scores["default"][0, 0] = float("nan")
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match="The adapter default seems to be broken: scores of module 'model.layers.3"
        ):
            merge(safe_merge=safe_merge)
    assert_same(state(model), before)
    with pytest.raises(ValueError, match="scores of module 'model.layers.3.mlp.down_proj' must be finite"):
        logits(model)


def test_safe_merge_refuses_a_kept_infinity_and_takes_a_dropped_one():
    model = with_masks(target_modules=["up_proj"], layers_to_transform=2)
    (layer,) = layers(model)
    with torch.no_grad():
        layer.weight[0, 0] = float("inf")
        layer.mft_scores["default"][0, 0] = 1.0
    before = state(model)
    with pytest.raises(ValueError, match=f"it keeps weights of {UP} that are NaN or Inf"):
        model.merge_and_unload(safe_merge=True)
    assert_same(state(model), before)
    with torch.no_grad():
        layer.mft_scores["default"][0, 0] = 1e-9
    assert model.merge_and_unload(safe_merge=True).get_submodule(UP).weight[0, 0] == 0


# ---------------------------------------------------------------------------------------------- TRL's reference


def test_a_reference_by_the_configuration_of_a_mask_begins_as_its_copy():
    """TRL calls add_adapter("ref", model.peft_config["default"])."""
    model = with_masks()
    with torch.no_grad():
        for layer in layers(model):
            layer.mft_scores["default"].add_(1)  # as if trained
    model.add_adapter("ref", model.peft_config["default"])
    model.add_adapter("fresh", model.peft_config["default"])
    for layer in layers(model):
        trained, reference, fresh = (layer.mft_scores[name] for name in ("default", "ref", "fresh"))
        assert torch.equal(reference, trained)
        assert reference.data_ptr() != trained.data_ptr()
        assert torch.equal(fresh + 1, trained)
        assert (trained.requires_grad, reference.requires_grad) == (True, False)
    model.delete_adapter("ref")
    model.add_adapter("ref", copy.copy(model.peft_config["default"]))  # equal, but not the configuration of a mask
    assert all(torch.equal(layer.mft_scores["ref"], layer.mft_scores["fresh"]) for layer in layers(model))


# ---------------------------------------------------------------------------------------------- combined masks


def kept(model, name):
    """Return what the mask of this name keeps, by module; everything if it has no scores there."""
    return {layer.module_name: layer.keep(name, "weight", layer.base_layer.weight.shape) for layer in layers(model)}


@pytest.mark.parametrize(
    ("how", "weights", "expected"),
    [
        ("union", None, lambda a, b, c: a | b | c),
        ("intersection", [1, 1, 1], lambda a, b, c: a & b & c),
        ("vote", None, lambda a, b, c: (a & b) | (a & c) | (b & c)),
        ("vote", [1, 1, 2], lambda a, b, c: c | (a & b)),  # a tie keeps
    ],
)
def test_adapters_are_combined_into_a_frozen_mask(how, weights, expected):
    model = two_masks()
    model.add_adapter("third", config(layers_to_transform=[1, 2], keep_ratio=0.5, seed=2))
    names = ["default", "other", "third"]
    model.add_weighted_adapter(names, weights, "combined", how)
    masks = [kept(model, name) for name in names]
    found = kept(model, "combined")
    assert all(torch.equal(found[layer], expected(*(mask[layer] for mask in masks))) for layer in found)
    assert not all(keep.all() for keep in found.values())
    model.set_adapter("combined")
    merged = model.merge_and_unload()
    weight = make_llama().get_submodule(UP).weight
    assert torch.equal(merged.get_submodule(UP).weight, torch.where(found[UP], weight, 0))


def test_a_combined_mask_is_saved_and_loaded(tmp_path):
    model = two_masks()
    model.add_weighted_adapter(["default", "other"], None, "both", "intersection")
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    assert torch.equal(logits(PeftModel.from_pretrained(make_llama(), tmp_path / "both").eval()), logits(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "othre"],), "adapters must be among default, other, got 'othre'; did you mean other"),
        (([],), "adapters must name at least one adapter"),
        ((["default"], None, "other"), "adapter_name must be a new name, got 'other'"),
        ((["default", "other"], [1]), "weights must have one number per adapter, 2 of them"),
        ((["default", "other"], [1, -1]), "weights must be positive and finite"),
        ((["default", "other"], [1, 2], "new", "union"), "weights must be equal for union, where they have no effect"),
        ((["default", "other"], None, "new", "svd"), "combination_type must be one of union, intersection, vote"),
    ],
)
def test_a_wrong_combination_leaves_the_model_as_it_is(arguments, message):
    model = two_masks()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default", "other"]
    assert torch.equal(logits(model), before)


# ---------------------------------------------------------------------------------------------- as a sum


def test_the_delta_added_to_the_weight_is_the_merged_weight():
    model = with_masks()
    layer = model.get_submodule(f"base_model.model.{UP}")
    total = layer.base_layer.weight + layer.get_delta_weight("default")
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, total)
    model.unmerge_adapter()
    layer.base_layer.weight.data[~layer.keep("default", "weight", total.shape)] = torch.inf
    with pytest.raises(ValueError, match=f"the dropped weights must be finite for get_delta_weight, got .* in {UP}"):
        layer.get_delta_weight("default")


def test_a_mask_becomes_lora_of_full_rank_and_a_warning_says_that_less_is_a_part_of_it(tmp_path):
    model = with_masks(target_modules=["up_proj"], layers_to_transform=None)
    expected, base = logits(model), logits(make_llama())
    errors = []
    for rank in (1, 8, min(model.get_submodule(f"base_model.model.{UP}").base_layer.weight.shape)):
        with pytest.warns(UserWarning, match="A LoRA approximates a mask: .* mft.save_masks keeps the mask itself"):
            save_as_lora(tmp_path / str(rank), model, rank=rank)
        found = logits(PeftModel.from_pretrained(make_llama(), tmp_path / str(rank)).eval())
        errors.append((found - expected).norm() / (base - expected).norm())
    assert errors[0] > errors[1] > 0.1
    assert errors[2] < 1e-4
    with pytest.raises(ValueError, match="target_modules must be given to convert a mask to LoRA, got null"):
        convert_to_lora(with_masks(), rank=1)
