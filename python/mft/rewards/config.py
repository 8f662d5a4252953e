"""The configuration of training by rewards: how answers are sampled, verified and learned from."""

from dataclasses import dataclass
from typing import Annotated

from mft.checks import BETA, POSITIVE, POSITIVE_OR_NULL, SEED, SHARE, at_least, check_rule, coerce_fields, one_of
from mft.config import MOMENTS, SCHEDULES, TrainConfig
from mft.evaluation.verifiers import VERIFIERS

# TRL's loss types: how the token losses are combined. dapo: mean over all tokens of a step. grpo: mean over each
# completion's tokens, then over completions. dr_grpo: sum divided by a constant. bnpo: like dapo, per micro-batch.
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")
# Divergences from a teacher at each token of an answer. reverse_kl: KL(model || teacher), which avoids what the teacher
# would not say. forward_kl: KL(teacher || model), which covers all that the teacher would say. jsd: the mean of the KLs
# from both to the average of their probabilities.
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


@dataclass
class RewardsConfig:
    """GRPO (arXiv 2402.03300) on questions with verifiable answers. The reward is 1 for a correct answer, else 0.

    Each step samples num_generations answers to each of its questions. An answer's advantage is its reward minus the
    mean reward of the question's answers, divided by their standard deviation. So nothing is learned from a question
    whose answers are all correct or all wrong.
    """

    lr: Annotated[float, POSITIVE] = 3e-4  # Learning rate for masks; weights need a smaller one
    steps: Annotated[int, at_least(1)] = 100  # Optimiser steps
    questions: Annotated[int, at_least(1)] = 8  # Questions per step
    num_generations: Annotated[int, at_least(2)] = 8  # Sampled answers per question
    max_completion_tokens: Annotated[int, at_least(1)] = 32  # Most tokens of an answer, with its eos
    temperature: Annotated[float, POSITIVE] = 1.0
    verifier: Annotated[str, one_of(tuple(VERIFIERS))] = "exact"
    beta: Annotated[float, at_least(0)] = 0.0  # Weight of the KL to the initial model, estimated on sampled answers
    epsilon: Annotated[float, POSITIVE] = 0.2  # The probability ratio to the sampling model is clipped to 1 -+ epsilon
    iterations: Annotated[int, at_least(1)] = 1  # Steps on the same answers; at 1 no ratio is ever clipped
    loss_type: Annotated[str, one_of(LOSSES)] = "dapo"  # How token losses are combined (TRL's names and default)
    divergence: Annotated[str, one_of(DIVERGENCES)] = "reverse_kl"  # From the teacher, if any; replaces the rewards
    micro_batch: Annotated[int | None, at_least(1)] = None  # Answers that are backpropagated together (null: all)
    betas: Annotated[tuple[float, float], BETA] = (0.9, 0.999)  # Betas of AdamW
    schedule: Annotated[str, one_of(SCHEDULES)] = "constant"
    warmup_ratio: Annotated[float, SHARE] = 0.03
    weight_decay: Annotated[float, at_least(0)] = 0.0
    max_grad_norm: Annotated[float | None, POSITIVE_OR_NULL] = None
    moments: Annotated[str, one_of(MOMENTS)] = "float32"  # Format of the moments of the scores' optimiser
    gradient_checkpointing: bool = False
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        coerce_fields(self)
        rule = f"divide the {self.answers} answers of a step (questions * num_generations)"
        check_rule(self.answers % (self.micro_batch or 1) == 0, "micro_batch", rule, self.micro_batch)

    @property
    def answers(self) -> int:
        """Number of answers that a step samples."""
        return self.questions * self.num_generations

    @property
    def train(self) -> TrainConfig:
        """The settings of the optimiser and its schedule."""
        return TrainConfig(
            lr=self.lr,
            steps=self.steps,
            betas=self.betas,
            schedule=self.schedule,
            warmup_ratio=self.warmup_ratio,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            moments=self.moments,
            seed=self.seed,
        )
