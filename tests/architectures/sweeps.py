"""The sweeps: which model types, which transformers class makes them, and which inputs they get."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import (
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextEncoding,
    AutoModelForZeroShotImageClassification,
)
from transformers.models.auto import modeling_auto as auto

from .sizes import CLASSES, PARTS


@dataclass
class Sweep:
    """One table of the page."""

    name: str
    title: str
    # transformers' mapping from model types to class names, and the class that makes a model from a configuration
    makers: tuple[tuple[dict[str, Any], Any], ...]
    inputs: tuple[str, ...]

    def kinds(self) -> dict[str, Callable[[Any], Any]]:
        """Return each model type and the function that makes it from a configuration; the first mapping wins."""
        found: dict[str, Callable[[Any], Any]] = {}
        for mapping, maker in self.makers:
            for kind, name in mapping.items():
                own = CLASSES.get(f"{self.name}/{kind}", name if f"{self.name}/{kind}" in PARTS else None)
                if own:
                    make = getattr(transformers, own)._from_config
                elif isinstance(name, str):
                    make = maker.from_config
                else:  # if there are several classes, a checkpoint's configuration names one
                    make = getattr(transformers, name[0])._from_config
                found.setdefault(kind, make)
        return dict(sorted(found.items()))


SWEEPS = (
    Sweep(
        "causal",
        "Causal language models",
        ((auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM),),
        ("input_ids",),
    ),
    Sweep(
        "encoder",
        "Encoders",
        (
            (auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, AutoModelForMaskedLM),
            (auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, AutoModelForTextEncoding),
        ),
        ("input_ids",),
    ),
    Sweep(
        "seq2seq",
        "Sequence-to-sequence",
        ((auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),),
        ("input_features", "input_features_mask", "input_values", "input_ids", "decoder_input_ids"),
    ),
    Sweep(
        "vision",
        "Vision",
        (
            (auto.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES, AutoModelForZeroShotImageClassification),
            (auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, AutoModelForImageClassification),
            (auto.MODEL_FOR_IMAGE_MAPPING_NAMES, AutoModel),
        ),
        ("pixel_values", "input_ids"),
    ),
    Sweep(
        "speech",
        "Speech",
        (
            (auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, AutoModelForSpeechSeq2Seq),
            (auto.MODEL_FOR_CTC_MAPPING_NAMES, AutoModelForCTC),
            (auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, AutoModelForAudioClassification),
        ),
        ("input_features", "input_features_mask", "input_values", "decoder_input_ids", "input_ids"),
    ),
)
