"""The objective that a configuration names, with its teacher loaded."""

import json
from typing import Any

from torch import nn

from mft.config import OBJECTIVES, ModelConfig, RunConfig
from mft.masks.export import base_hash
from mft.models.pretrained import load_model, load_tokenizer
from mft.objectives.cross_entropy import CrossEntropy
from mft.objectives.distillation import Distillation
from mft.objectives.dpo import DPO
from mft.objectives.kl import KL
from mft.objectives.objective import Objective
from mft.training.model_teacher import ModelTeacher

CLASSES: dict[str, type[Objective]] = {kind.name: kind for kind in (CrossEntropy, KL, Distillation, DPO)}


def make_objective(config: RunConfig) -> Objective:
    """Make the objective of config.objective. Raises: ValueError if the teacher has another tokenizer."""
    asked = config.objective
    given = {key: getattr(asked, key) for key in OBJECTIVES[asked.name].keys if getattr(asked, key) is not None}
    given.pop("teacher_memory", None)
    if "teacher" in given:
        given["teacher"] = _teacher(config)
    return CLASSES[asked.name](**given)


def facts_of(objective: Objective) -> dict[str, str]:
    """Return what must be unchanged in a resumed run, besides its configuration: a hash of the teacher's weights."""
    if not isinstance(objective, Distillation) or not isinstance(objective.teacher, ModelTeacher):
        return {}
    model = objective.teacher.model
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {"teacher": base_hash(model, linears)}


def _teacher(config: RunConfig) -> ModelTeacher:
    asked = config.objective
    assert asked.teacher is not None, "the configuration asks for one"
    named = ModelConfig(asked.teacher, dtype=config.model.dtype)
    ours, theirs = (
        load_tokenizer(model, sequence_length=config.data.sequence_length) for model in (config.model, named)
    )
    if _words(ours) != _words(theirs):
        raise ValueError(
            f"objective.teacher must have the vocabulary of {config.model.name}, got {asked.teacher} with another "
            f"tokenizer, of {len(theirs)} words for {len(ours)}: their logits stand for different words; choose a "
            "teacher of the same model family"
        )
    model, _ = load_model(named)
    return ModelTeacher(model, asked.teacher_memory or "plain")


def _words(tokenizer: Any) -> str:
    return json.dumps(sorted(tokenizer.get_vocab().items()))
