"""Which layers the default masks: both towers of a model with two, but only a language model's decoder."""

import warnings

import pytest
from tiny_architectures import SIZES, TOKENS, names
from torch import nn
from transformers import (
    BertConfig,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    FunnelConfig,
    FunnelForMaskedLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    MoonshineStreamingConfig,
    MoonshineStreamingForConditionalGeneration,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from mft.config import MaskConfig
from mft.masks.convert import mask_model
from mft.models.causal_lm import decoder_layers
from mft.models.linears import layer_stacks

LAYER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
IMAGE = {"image_size": 16, "patch_size": 8}


def left(model):
    """Return the linear layers that the default leaves out without a warning."""
    mask_model(model, MaskConfig())
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def gemma3(vision_layers):
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config={**SIZES, "head_dim": 8},
            vision_config={**LAYER, **IMAGE, "num_hidden_layers": vision_layers},
            mm_tokens_per_image=4,
        )
    )


def test_both_towers_of_clip_are_masked_though_one_is_deeper():
    text = {**TOKENS, **LAYER, "num_hidden_layers": 2}
    vision = {**LAYER, **IMAGE, "num_hidden_layers": 3}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    assert left(model) == ["visual_projection", "text_projection"]
    assert len(names(model)) == 6 * (2 + 3)


@pytest.mark.parametrize("vision_layers", [2, 3])
def test_a_model_that_makes_text_has_its_decoder_masked_and_its_vision_tower_named(vision_layers):
    """Also if both are equally deep: rows of text only would train no score of the tower."""
    model = gemma3(vision_layers)
    with pytest.warns(UserWarning, match=r"leaves out those of model.vision_tower.encoder.layers\. Name") as told:
        masked = names(mask_model(model, MaskConfig()))
    assert len(told) == 1
    assert {name.partition(".layers.")[0] for name in masked} == {"model.language_model"}
    assert decoder_layers(model) is model.model.language_model.layers


def test_a_tower_is_masked_by_name_and_left_out_without_a_word_where_it_is_excluded():
    masked = names(mask_model(gemma3(2), MaskConfig(target_modules=["q_proj"])))
    assert {name.split(".")[1] for name in masked} == {"vision_tower", "language_model"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked = names(mask_model(gemma3(2), MaskConfig(exclude_modules=["vision_tower"])))
    assert not [name for name in masked if "vision" in name]


def test_encoder_and_decoder_made_of_two_models_are_both_masked():
    encoder, decoder = (BertConfig(**TOKENS, **LAYER, num_hidden_layers=depth) for depth in (2, 3))
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))
    heads = ["decoder.cls.predictions.transform.dense", "decoder.cls.predictions.decoder"]
    assert left(model) == ["encoder.pooler.dense", *heads]


def test_whispers_encoder_and_decoder_are_masked_but_no_head():
    layers = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0}
    assert left(WhisperForConditionalGeneration(WhisperConfig(**layers, **sizes))) == ["proj_out"]


def test_an_encoder_with_a_configuration_of_its_own_counts_beside_the_decoders():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    decoder = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **heads}
    encoder = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **heads}
    model = MoonshineStreamingForConditionalGeneration(MoonshineStreamingConfig(**decoder, encoder_config=encoder))
    assert list(layer_stacks(model)) == ["model.encoder.layers", "model.decoder.layers"]


def test_a_vision_tower_within_the_decoder_is_known_by_its_depth():
    config = GitConfig(**TOKENS, **LAYER, num_hidden_layers=3, vision_config={**LAYER, **IMAGE, "num_hidden_layers": 2})
    assert list(layer_stacks(GitForCausalLM(config))) == ["git.encoder.layer"]


def test_funnels_encoder_counts_as_layers_beside_its_shorter_decoder():
    config = FunnelConfig(vocab_size=64, block_sizes=[1, 1, 1], num_decoder_layers=2, d_model=32, n_head=4, d_head=8)
    assert list(layer_stacks(FunnelForMaskedLM(config))) == ["funnel.encoder.blocks", "funnel.decoder.layers"]


def test_of_vision_transformers_all_but_the_classifier_is_masked():
    assert left(ViTForImageClassification(ViTConfig(**LAYER, **IMAGE, num_hidden_layers=2))) == ["classifier"]


def test_swins_patch_merging_is_neither_attention_nor_mlp():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=2)
    with pytest.warns(UserWarning, match=r"neither by name or shape: reduction \("):
        assert left(SwinForImageClassification(config)) == ["swin.encoder.layers.0.downsample.reduction", "classifier"]


@pytest.mark.parametrize(
    ("kind", "config"), [(ConvNextModel, ConvNextConfig), (DINOv3ConvNextModel, DINOv3ConvNextConfig)]
)
def test_convnexts_pointwise_convolutions_are_its_mlps(kind, config):
    assert left(kind(config(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 2, 1]))) == []


def test_the_mlp_of_a_q_formers_queries_is_masked():
    assert left(Blip2QFormerModel(Blip2QFormerConfig(**LAYER, num_hidden_layers=2, encoder_hidden_size=32))) == []
