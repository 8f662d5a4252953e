"""What the units of a study share within one process: base model, data, one fine-tune, and its frozen layers' outputs.

Results must not depend on which units ran before in the same process. A matrix product may round differently in another
batch. All remembered outputs are therefore computed in the same way before a unit sees them: in order, and always the
same number of rows at once.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mft.data.batches import take_rows
from mft.data.splits import Splits, load_splits
from mft.masks.quantize import coded_shapes
from mft.models.causal_lm import FEW, decoder_layers, split_at_head
from mft.models.frozen_layers import FrozenPrefix, PrefixMemory
from mft.models.longrope import inputs_of
from mft.models.packed_rows import keep_apart
from mft.models.pretrained import load_model
from mft.quantizers import quantizer
from mft_study.arms.arm import Arm
from mft_study.arms.setting import Setting
from mft_study.arms.weights import clone_with_weights, load_weights
from mft_study.bases import Bases
from mft_study.config import VARY_DATA, StudyConfig
from mft_study.remembered_teacher import RememberedTeacher

ROWS = 8  # evaluated together
_Begun = tuple[str, tuple[Path, ...], int]  # domain, weights that lead from the base model, and the base model's seed
_EARLIER = 1 << 30  # bytes of remembered outputs that are kept for earlier starts, to which units return


class Workspace:
    """Holds the base model, and loads the rest when it is asked for. model: the frozen start of units."""

    def __init__(self, study: StudyConfig, bases: Bases) -> None:
        self.study, self._bases = study, bases
        self._loaded: dict[str, Any] = {}  # base models by name
        self.tokenizer: Any = None
        self._seed = self._varying(study.seeds[0])  # the seed that was begun
        self.base: Any = self._base_of(study.seeds[0])
        self.model: Any = self.base
        self._begun: _Begun | None = None
        self._splits: dict[tuple[str, str, int], Splits] = {}  # by section, name and the seed that draws its rows
        self._memories: dict[_Begun, dict[tuple[str | None, str, int], PrefixMemory]] = {}
        self._teacher: tuple[_Begun, RememberedTeacher] | None = None
        self._teaching: tuple[_Begun, nn.Module] | None = None
        self._layers: dict[tuple[str, str | None], tuple[list[str], int]] = {}
        for arm in study.arms.values():
            if arm.of is None:
                for setting in _first_per_config(arm.settings(study.mask)):
                    arm.targets(self.base, study.mask, setting)  # raises before anything is trained
            if arm.quantization is not None:
                quantizer(arm.quantization).check_library()
                coded_shapes(self.base)

    def splits(self, domain: str) -> Splits:
        """Return the splits of a domain; the training rows may depend on the seed that was begun."""
        return self._splits_of("domains", domain)

    def general(self, name: str) -> Splits:
        return self._splits_of("general", name)

    def questions(self, domain: str) -> Splits:
        """Return the splits whose training rows are asked as questions: the domain's own unless others are declared."""
        return self._splits_of("questions" if domain in self.study.questions else "domains", domain)

    def begin(self, domain: str, starts: tuple[Path, ...], seed: int) -> None:
        """Set model to the seed's base model with these trained weights, one file after the other."""
        begun = domain, starts, self._varying(seed)
        if self._begun == begun:
            return
        self.base, self._seed = self._base_of(seed), self._varying(seed)
        self.model = self._trained_base(starts)
        self._begun = begun
        self._memories[self._begun] = self._memories.pop(self._begun, {})  # the latest comes last
        while len(self._memories) > 1 and self._remembered_bytes() > _EARLIER:
            del self._memories[next(iter(self._memories))]

    def teaching_model(self, domain: str, ends: tuple[Path, ...]) -> nn.Module:
        """Return the base model with these trained weights, for a teacher of answers that are not known yet."""
        key = domain, ends, self._seed
        if self._teaching is None or self._teaching[0] != key:
            self._teaching = key, self._trained_base(ends)
        return self._teaching[1]

    def teacher(self, domain: str, ends: tuple[Path, ...]) -> RememberedTeacher:
        """Return the base model with these trained weights, as a teacher on the training rows."""
        key = domain, ends, self._seed
        if self._teacher is None or self._teacher[0] != key:
            self._teacher = key, RememberedTeacher(self._trained_base(ends), self.splits(domain).train, batch_size=ROWS)
        return self._teacher[1]

    def layers_of(self, arm: Arm, setting: Setting | None = None) -> tuple[list[str], int]:
        """Return the linear layers that an arm trains, and how many of the model's layers lie below all of them.

        If setting does not decide the layers, those of all settings count.
        """
        source, mask = self.study.arms[arm.of] if arm.of is not None else arm, self.study.mask
        settings = _first_per_config(source.settings(mask))
        own = [each for each in settings if setting is not None and each.config == setting.config]
        found = []
        for each in own or settings:
            key = repr(source), each.config
            if key not in self._layers:
                names = source.targets(self.base, mask, each)
                self._layers[key] = names, source.frozen_below(self.base, mask, each)
            found.append(self._layers[key])
        return list(dict.fromkeys(name for names, _ in found for name in names)), min(first for _, first in found)

    def memory(self, split: str, first: int, general: str | None = None) -> PrefixMemory | None:
        """Return the outputs of model's first layers for the rows of a split or general text; None if first is 0."""
        if first == 0:
            return None
        assert self._begun is not None
        key, memories = (general, split, first), self._memories[self._begun]
        if key not in memories:
            splits = self.splits(self._begun[0]) if general is None else self.general(general)
            memories[key] = _remembered(self.model, getattr(splits, split), first, batch_size=ROWS)
        return memories[key]

    def _varying(self, seed: int) -> int:
        """Return the seed, or 0 if all seeds share the base model and the training rows."""
        return seed if self.study.vary else 0

    def _base_of(self, seed: int) -> Any:
        """Return the frozen base model of a seed; it is loaded once."""
        config = self._bases.model_config(seed)
        if config.name not in self._loaded:
            texts = (*self.study.domains.values(), *self.study.general.values(), *self.study.questions.values())
            longest = max(data.sequence_length for data in texts)
            model, self.tokenizer = load_model(config, sequence_length=longest)
            model.requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
            self._loaded[config.name] = model
        return self._loaded[config.name]

    def _splits_of(self, section: str, name: str) -> Splits:
        """Return the splits of declared data; if seeds draw the training rows, those of the seed that was begun."""
        drawn = self._seed if VARY_DATA in self.study.vary and section != "general" else 0
        key = section, name, drawn
        if key not in self._splits:
            data = getattr(self.study, section)[name]
            self._splits[key] = load_splits(dataclasses.replace(data, seed=data.seed + drawn), self.tokenizer)
        return self._splits[key]

    def _remembered_bytes(self) -> int:
        return sum(memory.nbytes for memories in self._memories.values() for memory in memories.values())

    def _trained_base(self, trained: tuple[Path, ...]) -> nn.Module:
        """Return the base model with these trained weights, one file after the other."""
        model = self.base
        for path in trained:
            model = clone_with_weights(model, load_weights(path))
        return model


def remember_layers(
    model: nn.Module, dataset, *, batch_size: int, first: int = 0, memory: PrefixMemory | None = None
) -> dict[str, Any]:
    """Return options of evaluate with which further passes over dataset run only the head. model is in eval mode."""
    depth = len(decoder_layers(model))
    whole = _remembered(model, dataset, depth, batch_size=batch_size, first=first, memory=memory)
    return {"batch_size": batch_size, "first": depth, "memory": whole}


def _first_per_config(settings: Iterable[Setting]) -> Iterable[Setting]:
    """Return the first setting of each config, since settings with one config are on the same layers."""
    return {setting.config: setting for setting in reversed(list(settings))}.values()


def _remembered(
    model: nn.Module, dataset, depth: int, *, batch_size: int, first: int = 0, memory: PrefixMemory | None = None
) -> PrefixMemory:
    """Return the outputs of model's first ``depth`` layers for every row; memory has those of the first ``first``."""
    found, device = PrefixMemory(), next(model.parameters()).device
    few = take_rows(dataset, [0]).input_ids[:1, :FEW].to(device)
    prefix = FrozenPrefix(model, first, memory, split_at_head(model, few)[0])
    with keep_apart(model, dataset, few, batch_size):
        for start in range(0, len(dataset), batch_size):
            batch = take_rows(dataset, list(range(start, min(start + batch_size, len(dataset)))))
            ids, positions = inputs_of(batch, model, device)
            for row, state in zip(batch.rows, prefix.run_layers(depth, ids, batch.rows, positions)):
                found.remember(row, state)
    return found
