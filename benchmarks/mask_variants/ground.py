"""Where every variant starts: one full fine-tune per seed, annealed, its rows, and a log of all that was tried on it.

Nothing here opens the test split: what wins on validation is confirmed elsewhere, by `mft compare`.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.mask_variants.rules import Rule
from mft.config import DataConfig, MaskConfig, ModelConfig, TrainConfig
from mft.data.splits import load_splits
from mft.evaluation.evaluate import Evaluation, evaluate
from mft.masks.convert import mask_model
from mft.masks.inspection import flip_share, initial_masks
from mft.masks.targets import select_targets
from mft.models.causal_lm import clone_with_own_weights
from mft.models.frozen_layers import PrefixMemory
from mft.models.pretrained import load_model
from mft.training.loop import finetune, train_masks, train_weights

EVALUATION_BATCH = 16


@dataclass(frozen=True)
class Situation:
    """Base model, fine-tune data, and the layers that masks and control may change."""

    name: str
    base: str
    data: DataConfig
    layers: tuple[int, ...] | None
    full: TrainConfig
    epochs: float  # of what comes after the fine-tune

    @property
    def mask(self) -> MaskConfig:
        layers = None if self.layers is None else list(self.layers)
        return MaskConfig.paper(layers_to_transform=layers)


@dataclass
class Tried:
    """One training run as validation saw it; sums a document, so that any two can be paired."""

    situation: str
    variant: str
    seed: int
    lr: float | None
    epochs: float | None
    keep_ratio: float | None
    loss: float
    loss_sums: list[float]
    tokens: list[float]
    flips: float | None = None  # share of the mask's bits that differ from the first mask
    kept: float | None = None
    seconds: float = 0.0

    def evaluation(self) -> Evaluation:
        """For paired_difference."""
        sums, tokens = (torch.tensor(v, dtype=torch.float64) for v in (self.loss_sums, self.tokens))
        return Evaluation(torch.arange(len(sums)), tokens, sums, torch.zeros_like(sums))


class Log:
    """Runs in a JSONL file, one a line; a run that stands there is not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.runs = [Tried(**json.loads(line)) for line in lines]

    def find(self, **wanted) -> list[Tried]:
        return [run for run in self.runs if all(getattr(run, key) == value for key, value in wanted.items())]

    def add(self, run: Tried) -> Tried:
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        return run


class Ground:
    """A situation with one seed: the fine-tuned model, and what can be tried from there."""

    def __init__(self, situation: Situation, seed: int, log: Log, models: Path) -> None:
        self.situation, self.seed, self.log = situation, seed, log
        base, tokenizer = load_model(ModelConfig(name=situation.base, dtype="float32"))
        self.splits = load_splits(situation.data, tokenizer)
        self.model = self._full_finetune(base, models / f"{_key(situation)}-{seed}.safetensors")
        self.names = select_targets(self.model, situation.mask)
        self.first = 0 if situation.layers is None else min(situation.layers)
        self.memories = {split: PrefixMemory() for split in ("train", "validation")}
        if not log.find(situation=situation.name, variant="fine-tune", seed=seed):
            self._record("fine-tune", self.model, None, None, None, time.perf_counter())

    def weights(
        self,
        variant: str,
        lr: float,
        epochs: float,
        train: Callable[[TrainConfig], TrainConfig],
    ) -> Tried:
        """The control: the weights of the same layers trained on."""
        begin = time.perf_counter()
        model = clone_with_own_weights(self.model, self.names)
        config = train(self._train(lr, epochs))
        train_weights(model, self.names, self.splits.train, config, memory=self.memories["train"])
        return self._record(variant, model, lr, epochs, None, begin)

    def masks(
        self,
        variant: str,
        lr: float,
        epochs: float,
        keep_ratio: float,
        rules: Sequence[Rule],
        *,
        init: str,
        train: Callable[[TrainConfig], TrainConfig],
    ) -> Tried:
        """A mask trained under rules."""
        begin = time.perf_counter()
        model = clone_with_own_weights(self.model)
        mask_model(model, replace(self.situation.mask, keep_ratio=keep_ratio, init=init, seed=self.seed))
        config = train(self._train(lr, epochs))
        steps = config.steps_for(len(self.splits.train))
        for rule in rules:
            rule.begin(model, steps)
        initial = initial_masks(model)
        train_masks(
            model,
            self.splits.train,
            config,
            memory=self.memories["train"],
            before_update=lambda step, steps: [rule.before_update(step, steps) for rule in rules],
            on_step=lambda report: [rule.after_update(report.step, report.steps) for rule in rules],
        )
        for rule in rules:
            rule.end()
        return self._record(variant, model, lr, epochs, keep_ratio, begin, flip_share(model, initial))

    def _train(self, lr: float, epochs: float) -> TrainConfig:
        # Another order of the rows than the fine-tune's.
        return replace(self.situation.full, lr=lr, epochs=epochs, seed=self.seed + 1000)

    def _full_finetune(self, model: nn.Module, path: Path) -> nn.Module:
        if not path.exists():
            finetune(model, self.splits.train, replace(self.situation.full, seed=self.seed))
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, path)
        weights = load_file(path)
        for name, parameter in model.named_parameters():  # a head tied to the embedding is no parameter of its own
            parameter.data.copy_(weights.pop(name))
        assert not weights, f"{path} holds more than the model: {', '.join(weights)}"
        return model.requires_grad_(False).eval()

    def _record(self, variant, model, lr, epochs, keep_ratio, begin: float, flips: float | None = None) -> Tried:
        seen = evaluate(
            model,
            self.splits.validation,
            batch_size=EVALUATION_BATCH,
            first=self.first,
            memory=self.memories["validation"],
        )
        masks = initial_masks(model).values()
        kept = sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks) if masks else None
        return self.log.add(
            Tried(
                self.situation.name,
                variant,
                self.seed,
                lr,
                epochs,
                keep_ratio,
                seen.loss,
                seen.loss_sums.tolist(),
                seen.tokens.tolist(),
                flips,
                kept,
                time.perf_counter() - begin,
            )
        )


def _key(situation: Situation) -> str:
    """One name for the same fine-tune: base, data and training."""
    parts = [str(Path(situation.base).resolve()), asdict(situation.data), asdict(situation.full)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
