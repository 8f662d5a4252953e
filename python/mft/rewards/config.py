"""What a run by rewards is: how answers are sampled and judged, and how the model learns from them."""

from dataclasses import dataclass
from typing import Annotated

from mft.checks import BETA, POSITIVE, POSITIVE_OR_NULL, SEED, SHARE, at_least, check_rule, coerce_fields, one_of
from mft.config import MOMENTS, SCHEDULES, TrainConfig
from mft.evaluation.verifiers import VERIFIERS

# TRL's: how the losses of tokens become one. dapo: their mean over all tokens of a step; grpo: over each completion's,
# then over completions; dr_grpo: their sum by a constant; bnpo: as dapo, of each micro-batch alone.
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")
# From a teacher at each token of an answer: KL(model || teacher), which leaves out what the teacher would not say;
# KL(teacher || model), which covers all that it would; the mean of both to the middle of the two.
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


@dataclass
class RewardsConfig:
    """GRPO (arXiv 2402.03300) on questions with answers that can be verified: right is 1, wrong is 0.

    Each step samples num_generations answers to each of so many questions. An answer's advantage is its reward less the
    mean of its question's, over their standard deviation: where all answers are right, or all are wrong, nothing is
    learned.
    """

    lr: Annotated[float, POSITIVE] = 3e-4  # of masks; weights learn at less
    steps: Annotated[int, at_least(1)] = 100  # optimiser steps
    questions: Annotated[int, at_least(1)] = 8  # of which a step samples answers
    num_generations: Annotated[int, at_least(2)] = 8  # answers to each
    max_completion_tokens: Annotated[int, at_least(1)] = 32  # of an answer, its eos included
    temperature: Annotated[float, POSITIVE] = 1.0
    verifier: Annotated[str, one_of(tuple(VERIFIERS))] = "exact"
    beta: Annotated[float, at_least(0)] = 0.0  # weight of the KL to the start, estimated on what is sampled
    epsilon: Annotated[float, POSITIVE] = 0.2  # the ratio to what sampled is clipped to 1 -+ epsilon
    iterations: Annotated[int, at_least(1)] = 1  # steps on the same answers; at 1 no ratio is ever clipped
    loss_type: Annotated[str, one_of(LOSSES)] = "dapo"  # TRL's default
    divergence: Annotated[str, one_of(DIVERGENCES)] = "reverse_kl"  # from a teacher; rewards teach nothing beside one
    micro_batch: Annotated[int | None, at_least(1)] = None  # answers that are backpropagated together; null: all
    betas: Annotated[tuple[float, float], BETA] = (0.9, 0.999)  # of AdamW
    schedule: Annotated[str, one_of(SCHEDULES)] = "constant"
    warmup_ratio: Annotated[float, SHARE] = 0.03
    weight_decay: Annotated[float, at_least(0)] = 0.0
    max_grad_norm: Annotated[float | None, POSITIVE_OR_NULL] = None
    moments: Annotated[str, one_of(MOMENTS)] = "float32"  # of the scores' optimiser
    gradient_checkpointing: bool = False
    seed: Annotated[int, SEED] = 0

    def __post_init__(self) -> None:
        coerce_fields(self)
        rule = f"divide the {self.answers} answers of a step (questions * num_generations)"
        check_rule(self.answers % (self.micro_batch or 1) == 0, "micro_batch", rule, self.micro_batch)

    @property
    def answers(self) -> int:
        """That a step samples."""
        return self.questions * self.num_generations

    @property
    def train(self) -> TrainConfig:
        """What the optimiser and its schedule read."""
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
