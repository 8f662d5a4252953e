"""The inputs of a small model, made from its forward's arguments and its configuration, and its output."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .small import AUDIO, IMAGE
from .sweeps import Sweep

ROWS, TOKENS, DECODED, FRAMES, SAMPLES = 2, 12, 5, 40, 4000
ANSWERS = (
    "logits",
    "logits_per_image",
    "logits_per_video",
    "predicted_depth",
    "last_hidden_state",
)  # the first of these that a model returns is compared
BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
# Whisper and its relatives take features as (rows, bins, frames), others as (rows, frames, bins).
BINS_FIRST = {
    *("whisper", "audioflamingo3", "glmasr", "musicflamingo", "qwen2_audio", "qwen3_asr", "voxtral"),
    *("voxtral_realtime", "moss_transcribe_diarize"),
}
# For these the features' mask belongs to the vectors made from the features.
NOT_GIVEN = {("granite_speech", "input_features_mask"), ("granite_speech_plus", "input_features_mask")}
FRAMES_OF = {"qwen3_asr": 100}
CHANNELS = {"omniasr", "omniasr_ctc", "vibevoice", "vibevoice_asr"}  # (rows, 1, samples)


def model_inputs(model: nn.Module, kind: str, sweep: Sweep) -> dict[str, Any]:
    """Return those of the sweep's inputs that the model's forward takes, in the shapes of its configuration."""
    torch.manual_seed(0)
    own = OWN.get(kind) if sweep.name != "causal" or kind.endswith("_assistant") else None
    if own:
        return own(model.config)
    taken = inspect.signature(model.forward).parameters
    made: dict[str, Any] = {}
    for name in sweep.inputs:
        if (
            name in taken
            and (kind, name) not in NOT_GIVEN
            and not ("input_features" in made and name == "input_values")
        ):
            made[name] = _input(name, model, kind, made)
    return made


def answer(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """Return the model's main output; random draws (Reformer's hashes) are the same each time."""
    torch.manual_seed(0)
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(**inputs, **cache)
    found = [value for name in ANSWERS if (value := getattr(output, name, None)) is not None]
    if not found:
        raise ValueError(f"its output has none of {', '.join(ANSWERS)}, but {', '.join(output)}")
    return found[0]


def first(config: Any, names: tuple[str, ...], otherwise: Any) -> Any:
    """Return the first of these names that the configuration, or one inside it, has a value for."""
    found = [vars(part)[n] for n in names for part in _configs(config) if vars(part).get(n) is not None]
    return found[0] if found else otherwise


def _input(name: str, model: Any, kind: str, made: dict[str, Any]) -> Tensor:
    config, frames = model.config, FRAMES_OF.get(kind, FRAMES)
    if name == "input_ids":
        return _tokens(model, made)
    if name == "decoder_input_ids":
        return torch.randint(3, IMAGE, (ROWS, DECODED))
    if name == "pixel_values":
        size = first(config, ("image_size",), 32)
        height, width = (size, size) if isinstance(size, int) else size
        return torch.randn(ROWS, first(config, ("num_channels",), 3), height, width)
    if name == "input_values":
        return torch.randn(ROWS, 1, SAMPLES) if kind in CHANNELS else torch.randn(ROWS, SAMPLES)
    if name == "input_features":
        bins = first(config, BINS, 16)
        return torch.randn(ROWS, bins, frames) if kind in BINS_FIRST else torch.randn(ROWS, frames, bins)
    if name == "input_features_mask":
        return torch.ones(ROWS, frames, dtype=torch.long)
    raise ValueError(f"no rule makes {name}")


def _tokens(model: Any, made: dict[str, Any]) -> Tensor:
    """Return ids (ROWS, TOKENS), plus one sound or image token for each vector that the tower makes."""
    ids = torch.randint(3, IMAGE, (ROWS, TOKENS))
    for word, names, asked in (
        (AUDIO, ("audio_token_id", "audio_token_index"), "get_audio_features"),
        (IMAGE, ("image_token_id", "image_token_index"), "get_image_features"),
    ):
        if made and first(model.config, names, None) == word and hasattr(model, asked):
            ask = getattr(model, asked)
            with torch.no_grad():
                vectors = _vectors(ask(**made))
            place = torch.full((ROWS, vectors // ROWS), word)
            ids = torch.cat([ids[:, :4], place, ids[:, 4:]], 1)
    return ids


def _vectors(features: Any) -> int:
    """Count the vectors in a tower's output: a tensor, a list of tensors, or an object that holds one."""
    names = ("pooler_output", "last_hidden_state")
    features = next((f for name in names if (f := getattr(features, name, None)) is not None), features)
    if isinstance(features, list | tuple):
        return sum(map(_vectors, features))
    return features.numel() // features.shape[-1]


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        if vars(config).get(name) is not None:
            yield from _configs(vars(config)[name])


# ---------------------------------------------------------------------------------------------- of single model types


def _gemma4_assistant(config: Any) -> dict[str, Any]:
    """Return what the assisted model passes for one token: hidden states, and its last layers' keys and values."""
    text = config.get_text_config()
    layers = {kind: text.per_layer_config[i] for i, kind in enumerate(text.layer_types)}
    shapes = {kind: (ROWS, h.num_key_value_heads, TOKENS, h.head_dim) for kind, h in layers.items()}
    return {
        "inputs_embeds": torch.randn(ROWS, 1, 2 * config.backbone_hidden_size),
        "shared_kv_states": {kind: (torch.randn(shape), torch.randn(shape)) for kind, shape in shapes.items()},
    }


def _frames(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda config: {name: torch.randn(ROWS, 4, 3, 32, 32)}


def _siglip2(config: Any) -> dict[str, Any]:
    """Return images of 4 by 4 patches, each patch as one row."""
    return {
        "input_ids": torch.randint(3, IMAGE, (ROWS, TOKENS)),
        "pixel_values": torch.randn(ROWS, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
    }


def _sound(*masks: str) -> Callable[[Any], dict[str, Any]]:
    """Return features, bins first, and one sound token for every fourth frame."""

    def make(config: Any) -> dict[str, Any]:
        place = torch.full((ROWS, FRAMES // 4), AUDIO)
        return {
            "input_ids": torch.cat([torch.randint(3, IMAGE, (ROWS, 4)), place, torch.randint(3, IMAGE, (ROWS, 4))], 1),
            "input_features": torch.randn(ROWS, first(config, BINS, 16), FRAMES),
            **{name: torch.ones(ROWS, FRAMES, dtype=torch.long) for name in masks},
        }

    return make


def _mllama(config: Any) -> dict[str, Any]:
    """Return one image of one tile per row."""
    return {
        "input_ids": torch.randint(3, IMAGE, (ROWS, TOKENS)),
        "cross_attention_mask": torch.ones(ROWS, TOKENS, 1, 4, dtype=torch.long),
        "pixel_values": torch.randn(ROWS, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(ROWS, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(ROWS, 1, 4, dtype=torch.long),
    }


# Model types whose inputs are not their sweep's.
OWN: dict[str, Callable[[Any], dict[str, Any]]] = {
    "audio-spectrogram-transformer": lambda config: {"input_values": torch.randn(ROWS, FRAMES, config.num_mel_bins)},
    "depth_pro": lambda config: {"pixel_values": torch.randn(1, 3, 128, 128)},
    "dia": lambda config: {
        "input_ids": torch.randint(3, IMAGE, (ROWS, TOKENS)),
        "decoder_input_ids": torch.randint(3, IMAGE, (ROWS, DECODED, config.decoder_config.num_channels)),
    },
    "fun_asr_nano": lambda config: {
        "input_ids": torch.cat([torch.full((ROWS, FRAMES), AUDIO), torch.randint(3, IMAGE, (ROWS, TOKENS))], 1),
        "input_features": torch.randn(ROWS, FRAMES, 112),
        "input_features_mask": torch.ones(ROWS, FRAMES, dtype=torch.long),
    },
    "gemma4_assistant": _gemma4_assistant,
    "gemma4_unified_assistant": _gemma4_assistant,
    "granite_speech5_ctc": lambda config: {  # with differences, two frames next to each other
        "input_features": torch.randn(ROWS, FRAMES, 4 * config.encoder_config.num_mel_bins)
    },
    "kyutai_speech_to_text": lambda config: {
        "input_ids": torch.randint(3, 90, (ROWS, TOKENS, config.num_codebooks + 1)),
    },
    "mllama": _mllama,
    "moss_transcribe_diarize": lambda config: {"input_ids": torch.randint(3, IMAGE, (ROWS, TOKENS))},
    "musicflamingo": _sound("input_features_mask"),
    "qwen2_audio": _sound("feature_attention_mask"),
    "shieldgemma2": lambda config: {
        "input_ids": torch.cat([torch.full((ROWS, 4), IMAGE), torch.randint(3, IMAGE, (ROWS, TOKENS))], 1),
        "pixel_values": torch.randn(ROWS, 3, 32, 32),
    },
    "voxtral_realtime": lambda config: {
        "input_ids": torch.randint(3, IMAGE, (ROWS, 5)),
        "input_features": torch.randn(ROWS, first(config, BINS, 16), FRAMES),
    },
    "pop2piano": lambda config: {
        "input_features": torch.randn(ROWS, FRAMES, config.d_model),
        "decoder_input_ids": torch.randint(3, IMAGE, (ROWS, DECODED)),
    },
    "siglip2": _siglip2,
    "speech-encoder-decoder": lambda config: {
        "input_values": torch.randn(ROWS, SAMPLES),
        "decoder_input_ids": torch.randint(3, IMAGE, (ROWS, DECODED)),
    },
    "timesformer": _frames("pixel_values"),
    "videomae": _frames("pixel_values"),
    "vibevoice": lambda config: {
        "input_ids": torch.cat([torch.full((ROWS, 1), AUDIO), torch.randint(3, IMAGE, (ROWS, TOKENS))], 1),
        "input_values": torch.randn(ROWS, 1, SAMPLES),
        "padding_mask": torch.ones(ROWS, SAMPLES, dtype=torch.bool),
    },
    "videoprism": lambda config: {
        "input_ids": torch.randint(3, IMAGE, (ROWS, TOKENS)),
        **_frames("pixel_values_videos")(config),
    },
    "videoprism_vision_model": _frames("pixel_values_videos"),
    "vivit": _frames("pixel_values"),
}
