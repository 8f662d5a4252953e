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

from benchmarks.mask_variants_rules import Rule
from mft.clones import clone_with_own_weights
from mft.config import DataConfig, MaskConfig, ModelConfig, TrainConfig
from mft.convert import mask_model, masked_modules
from mft.data import load_splits
from mft.evaluate import Evaluation, evaluate
from mft.inspection import flip_share, initial_masks
from mft.models import load_model
from mft.prefix import PrefixMemory
from mft.recipe import count_steps, finetune, train_masks, train_weights
from mft.surface import weights_of
from mft.targets import select_targets

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
    modules: tuple[str, ...] | None = None

    @property
    def mask(self) -> MaskConfig:
        layers = None if self.layers is None else list(self.layers)
        modules = None if self.modules is None else list(self.modules)
        return MaskConfig(layers_to_transform=layers, target_modules=modules, init="magnitude")


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
        start: nn.Module | None = None,
        *,
        train: Callable[[TrainConfig], TrainConfig] = lambda train: train,
        part: int = 0,
    ) -> tuple[nn.Module, Tried]:
        """The control: the weights of the same layers trained on; part numbers runs with other orders of the rows."""
        begin = time.perf_counter()
        model = clone_with_own_weights(self.model if start is None else start, self.names)
        config = train(self._train(lr, epochs, part))
        train_weights(model, self.names, self.splits.train, config, memory=self.memories["train"])
        return model, self._record(variant, model, lr, epochs, None, begin)

    def masks(
        self,
        variant: str,
        lr: float,
        epochs: float,
        keep_ratio: float,
        rules: Sequence[Rule] = (),
        *,
        init: str = "magnitude",
        start: nn.Module | None = None,
        train: Callable[[TrainConfig], TrainConfig] = lambda train: train,
        also_keep: Sequence[float] = (),
        part: int = 0,
    ) -> tuple[nn.Module, Tried]:
        """A mask trained under rules; also_keep: evaluated with these keep ratios too, as variants of their own."""
        begin = time.perf_counter()
        model = clone_with_own_weights(self.model if start is None else start)
        mask_model(model, replace(self.situation.mask, keep_ratio=keep_ratio, init=init, seed=self.seed))
        config = train(self._train(lr, epochs, part))
        steps = count_steps(config, len(self.splits.train))
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
        run = self._record(variant, model, lr, epochs, keep_ratio, begin, flip_share(model, initial))
        for other in also_keep:
            self._keep(model, other)
            self._record(f"{variant}, evaluated at {other:g}", model, lr, epochs, keep_ratio, time.perf_counter())
        self._keep(model, keep_ratio)
        return model, run

    def average(
        self, variant: str, runs: Sequence[nn.Module], lr: float, epochs: float, keep_ratio: float | None
    ) -> Tried:
        """The mean weights of trained models, masks applied: no mask any more where they disagree."""
        begin = time.perf_counter()
        model = clone_with_own_weights(self.model, self.names)
        weights = [weights_of(run, self.names) for run in runs]
        with torch.no_grad():
            for name in self.names:
                model.get_submodule(name).weight.copy_(torch.stack([each[name] for each in weights]).mean(0))
        return self._record(variant, model, lr, epochs, keep_ratio, begin)

    def untrained(self, variant: str, keep_ratio: float, model: nn.Module) -> Tried:
        """A model that nobody trained, for instance with a one-shot mask."""
        return self._record(variant, model, None, None, keep_ratio, time.perf_counter())

    def _keep(self, model: nn.Module, keep_ratio: float) -> None:
        for module in masked_modules(model).values():
            module.keep_ratio = keep_ratio

    def _train(self, lr: float, epochs: float, part: int) -> TrainConfig:
        # Another order of the rows than the fine-tune's.
        return replace(self.situation.full, lr=lr, epochs=epochs, seed=self.seed + 1000 * (part + 1))

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
