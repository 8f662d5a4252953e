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


def test_swins_patch_merging_is_neither_attention_nor_mlp():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[2, 2], window_size=2)
    with pytest.warns(UserWarning, match=r"neither by name or shape: reduction \("):
        assert left(SwinForImageClassification(config)) == ["swin.encoder.layers.0.downsample.reduction", "classifier"]


HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
DECODER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **HEADS}
WHISPER = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
WHISPER |= {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "pad_token_id": 0}
CONVOLUTIONS = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 2, 1]}


def layers(count, *parts):
    return {**LAYER, "num_hidden_layers": count} | dict(*parts)


def clip():
    """Return a model of two towers, of which one is deeper."""
    return CLIPModel(CLIPConfig(text_config=layers(2, TOKENS), vision_config=layers(3, IMAGE), projection_dim=16))


def berts():
    encoder, decoder = (BertConfig(**layers(depth, TOKENS)) for depth in (2, 3))
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder))


HEADS_OF_BERTS = ["decoder.cls.predictions.transform.dense", "decoder.cls.predictions.decoder"]
LEFT = {
    "clip": (clip, ["visual_projection", "text_projection"]),
    "encoder and decoder": (berts, ["encoder.pooler.dense", *HEADS_OF_BERTS]),
    "whisper": (lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)), ["proj_out"]),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**layers(2, IMAGE))), ["classifier"]),
    "convnext": (lambda: ConvNextModel(ConvNextConfig(**CONVOLUTIONS)), []),
    "dinov3": (lambda: DINOv3ConvNextModel(DINOv3ConvNextConfig(**CONVOLUTIONS)), []),
    "q-former": (lambda: Blip2QFormerModel(Blip2QFormerConfig(**layers(2), encoder_hidden_size=32)), []),
}


@pytest.mark.parametrize("kind", LEFT)
def test_the_default_masks_all_layers_of_each_tower_but_no_head(kind):
    make, expected = LEFT[kind]
    assert left(make()) == expected


def moonshine():
    """Return a model whose encoder has a configuration of its own."""
    config = MoonshineStreamingConfig(**DECODER, vocab_size=64, encoder_config=DECODER | {"num_hidden_layers": 2})
    return MoonshineStreamingForConditionalGeneration(config)


def git():
    """Return a decoder that contains a vision tower, which its depth tells apart."""
    return GitForCausalLM(GitConfig(**layers(3, TOKENS), vision_config=layers(2, IMAGE)))


def funnel():
    config = FunnelConfig(vocab_size=64, block_sizes=[1, 1, 1], num_decoder_layers=2, d_model=32, n_head=4, d_head=8)
    return FunnelForMaskedLM(config)


@pytest.mark.parametrize(
    ("make", "stacks"),
    [
        (moonshine, ["model.encoder.layers", "model.decoder.layers"]),
        (git, ["git.encoder.layer"]),
        (funnel, ["funnel.encoder.blocks", "funnel.decoder.layers"]),
    ],
)
def test_stacks_of_layers_are_known_by_the_depths_of_their_configurations(make, stacks):
    assert list(layer_stacks(make())) == stacks
