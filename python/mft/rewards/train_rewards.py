"""Train a model on its own answers with TRL's GRPOTrainer: by verified answers, or by a teacher's distributions."""

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mft.checks import check_rule, install_command
from mft.engines.plain import make_stepper, replace_gradients
from mft.engines.randomness import seeded
from mft.engines.step import NonFiniteLoss
from mft.masks.convert import masked_modules
from mft.masks.trainer_callbacks import BudgetCallback
from mft.models.next_tokens import check_next_tokens
from mft.rewards.config import RewardsConfig
from mft.rewards.on_policy_teacher import OnPolicyTeacher, Teaching
from mft.rewards.optimizer import SteppedOptimizer, make_scheduler
from mft.rewards.questions import questions_of
from mft.training.loop import checked_surrogate, training_mode


@dataclass(frozen=True)
class RewardReport:
    """One optimiser step, counted from 1.

    reward, length: means of the step's answers. differing: share of questions whose answers are neither all correct nor
    all wrong. kl: to the initial model; None if beta is 0. entropy: nats per token. tokens: of prompts and answers.
    seconds: since the first step began. divergence: from the teacher in nats per token; None without one.
    """

    step: int
    steps: int
    reward: float
    differing: float
    length: float
    kl: float | None
    entropy: float
    lr: float
    tokens: int
    seconds: float
    divergence: float | None = None


def train_rewards(
    model: Any,
    tokenizer: Any,
    dataset,
    config: RewardsConfig,
    *,
    start: nn.Module | None = None,
    teacher: OnPolicyTeacher | None = None,
    before_update: Callable[[int, int], None] | None = None,
    on_step: Callable[[RewardReport], None] | None = None,
) -> list[RewardReport]:
    """Train what requires grad (scores, weights, adapters) by GRPO or from a teacher; the model ends in eval mode.

    With a teacher the loss is config.divergence from the teacher's whole distribution at each token of the sampled
    answers, averaged over the step's tokens (on-policy distillation, arXiv 2306.13649). Rewards are then only reported.
    Randomness is seeded by config.seed: on a CPU the same call gives the same bits. Weights in 16 bits are trained on
    fp32 masters. Scores are trained by MaskAdamW if they are not fp32, and with the mask's sharpness and
    deletion_penalty, as in train_masks. Nothing is written, logged or sent anywhere.

    Args:
        model: A model that can generate, with masked layers or adapters, on the device that computes; or a PeftModel.
        dataset: Rows with one prompt and one completion each, as load_splits makes them, packed or not.
        start: The model to which config.beta's KL is measured; None: the model as it is now, with a copy of the trained
            parameters.
        teacher: A teacher on the device that computes.
        before_update: Called with (step, steps) when a step's gradients are complete and not yet clipped or applied.
        on_step: Called with each step's report. It may evaluate the model.
    Raises: ValueError if nothing requires grad, or if rows are not such questions; with a teacher also if its
        vocabulary is too small, or if config.beta is not 0 or config.loss_type is not dapo. RuntimeError without trl,
        or in a run of several processes. NonFiniteLoss, which names the step; the step's gradients are not applied.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise RuntimeError("training by rewards must run in one process, got several: leave torchrun out")
    model = _unwrap(model)
    _check_trainable(model)
    if teacher is not None:
        rule = "be 0 with a teacher, because only its words are learned"
        check_rule(config.beta == 0, "config.beta", rule, config.beta)
        rule = "be dapo with a teacher: the mean over a step's tokens"
        check_rule(config.loss_type == "dapo", "config.loss_type", rule, config.loss_type)
    surrogate = checked_surrogate(model)
    questions = questions_of(dataset, tokenizer, config)
    longest = max(len(question.prompt) for question in questions) + config.max_completion_tokens
    check_next_tokens(model.config, type(model).__name__, longest)
    trainer_module = _import_trainer()
    if config.beta and start is None:
        start = _frozen_copy(model)
    teaching = None
    if teacher is not None:
        other = _unwrap(teacher.model)
        rule = "be another model than the one that learns, or left out"
        check_rule(other is not model, "teacher.model", rule, "the same")
        teaching = Teaching(
            _frozen_copy(model) if other is None else other.requires_grad_(False).eval(),
            teacher.prompts(questions, tokenizer),
        )
        words, own = (each.get_input_embeddings().weight.shape[0] for each in (teaching.model, model))
        rule = f"have at least the {min(len(tokenizer), own)} words of the model's tokenizer"
        check_rule(words >= min(len(tokenizer), own), "teacher.model", rule, f"one of {words}")
        reads = max(map(len, teaching.prompts)) + config.max_completion_tokens
        check_next_tokens(teaching.model.config, type(teaching.model).__name__, reads)
    train, reports = config.train, list[RewardReport]()
    with (
        seeded(config.seed),
        trainer_module.undoing_changes(model, tokenizer) as directory,
        training_mode(model, checkpointed=config.gradient_checkpointing),
        make_stepper(model, train) as stepper,
    ):

        def complete() -> None:
            """Finish the step's gradients, before they are clipped and applied."""
            if surrogate is not None:
                surrogate.sharpen(len(reports) + 1, config.steps)
                replace_gradients(model, stepper, surrogate)
            if before_update is not None:
                before_update(len(reports) + 1, config.steps)

        optimizer = SteppedOptimizer(stepper, train, complete)
        optimizers = (optimizer, make_scheduler(optimizer, train))
        trainer = trainer_module.Trainer(
            *(model, tokenizer, questions, config, directory, optimizers),
            start if config.beta else None,
            teaching,
        )
        begin = time.perf_counter()

        def report(step: int, logs: dict[str, float]) -> None:
            sampled = trainer.sampled
            reports.append(
                RewardReport(
                    step,
                    config.steps,
                    sampled.reward,
                    sampled.differing,
                    sampled.length,
                    logs["kl"] if config.beta else None,
                    logs["entropy"],
                    logs["learning_rate"],
                    sampled.tokens,
                    time.perf_counter() - begin,
                    None if teaching is None else logs["divergence"],
                )
            )
            if on_step is not None:
                on_step(reports[-1])

        trainer.add_callback(BudgetCallback())
        trainer.add_callback(trainer_module.Reporting(report))
        with warnings.catch_warnings():
            # TODO: drop when the Trainer and TRL use the new names
            warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
            trainer.train()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            raise NonFiniteLoss(f"{name} must stay finite, got NaN or Inf after the last step: lower rewards.lr")
    return reports


def check_installed() -> None:
    """Raise RuntimeError if the packages for training by rewards are not installed."""
    _import_trainer()


def _check_trainable(model: nn.Module) -> None:
    for name, module in masked_modules(model).items():
        if not module.scores.is_floating_point():
            raise ValueError(
                "mask.scores_dtype must not be int16 for training by rewards, because autograd computes its "
                f"gradient, got {name}: take float32 or bfloat16"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "model must have something that requires grad, got none: set scores.requires_grad_() of the masked layers, "
            "or that of weights"
        )


def _unwrap(model: Any) -> Any:
    """Return the model inside a PeftModel, with its adapters; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _frozen_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy in eval mode. Trained parameters are copied; all others are shared."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def _import_trainer() -> Any:
    try:
        from mft.rewards import trainer
    except ImportError as error:
        if error.name not in ("trl", "accelerate"):
            raise
        raise RuntimeError(
            f"training by rewards needs {error.name}, which is not installed: {install_command('trl')}"
        ) from None
    return trainer
