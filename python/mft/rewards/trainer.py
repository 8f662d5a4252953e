"""A subclass of TRL's GRPOTrainer with our rows, our generation, our optimiser and our log-probabilities.

Advantages, loss, ratio clipping, the order of questions and the loop are TRL's. This module imports trl: see
train_rewards.py.
"""

import contextlib
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from mft.engines.step import NonFiniteLoss
from mft.evaluation.continuation import continue_prompts, generating
from mft.models.causal_lm import FEW, decoder_of, run_decoder, split_at_head
from mft.models.key_value_cache import can_extend_cache
from mft.models.longrope import by_own_length
from mft.models.packed_rows import positions_of
from mft.rewards.config import RewardsConfig
from mft.rewards.log_probs import token_divergences, token_log_probs
from mft.rewards.on_policy_teacher import Teaching
from mft.rewards.questions import Question, rewards_of, share_that_differs
from mft.rewards.shared_prompts import states_before_answers

_SPECIAL = ("eos_token_id", "bos_token_id", "pad_token_id")


@dataclass
class Sampled:
    """Figures of one round of answers: mean reward, share of questions whose rewards differ, tokens per answer."""

    reward: float
    differing: float
    length: float
    tokens: int  # of prompts and answers


class Trainer(GRPOTrainer):
    """TRL's GRPOTrainer on questions; rows are their numbers. start: of beta's KL. teaching: replaces the rewards."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        questions: Sequence[Question],
        config: RewardsConfig,
        directory: str,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR],
        start: Any,
        teaching: Teaching | None,
    ) -> None:
        self.questions, self.config, self.sampled = questions, config, Sampled(0.0, 0.0, 0.0, 0)
        numbers = datasets.Dataset.from_dict({"prompt": [str(number) for number in range(len(questions))]})
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)  # trl's version is pinned
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
            super().__init__(
                model=model,
                reward_funcs=self._rewards,
                args=_arguments(config, directory, next(model.parameters()).device),
                train_dataset=numbers,
                processing_class=tokenizer,
                optimizers=optimizers,
                rollout_func=lambda prompts, _: self._sample(prompts),
            )
        self.remove_callback(PrinterCallback)
        self.beta, self.ref_model = config.beta, start  # TRL would load one by the model's name
        few = torch.tensor([questions[0].prompt[:FEW]], device=self.accelerator.device)
        self._teaching = teaching
        models = (model, start, None if teaching is None else teaching.model)
        self._split = {id(each): split_at_head(each, few) for each in models if each is not None}

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _sample(self, prompts: list[str]) -> dict[str, Any]:
        asked = [self.questions[int(number)].prompt for number in prompts]
        eos, model = self._tokenizer.eos_token_id, self.accelerator.unwrap_model(self.model)
        settings = GenerationConfig(
            max_new_tokens=self.config.max_completion_tokens,
            do_sample=True,
            temperature=self.config.temperature,
            top_k=0,  # sample from the whole distribution, as the loss assumes
            eos_token_id=eos,
            pad_token_id=eos,
        )
        with torch.no_grad(), generating(model, settings):
            try:
                found = continue_prompts(asked, model, eos)
            except RuntimeError as error:
                if "probability tensor contains" not in str(error):
                    raise
                raise self._nonfinite_loss("the logits", "NaN or Inf") from None
        answers = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in found]
        said = sum(map(len, answers))
        self.sampled = Sampled(0.0, 0.0, said / len(answers), said + sum(map(len, asked)))
        return {"prompt_ids": asked, "completion_ids": answers, "logprobs": None}

    def _rewards(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        asked = [self.questions[int(number)] for number in prompts]
        rewards = rewards_of(completion_ids, asked, self._tokenizer, self.config)
        self.sampled.reward = sum(rewards) / len(rewards)
        self.sampled.differing = share_that_differs(rewards, self.config.num_generations)
        return [*rewards]

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor, None]:
        """Return (log-probabilities, entropies) of the answers' tokens, (B, logits_to_keep) each; no auxiliary loss."""
        batch_size = batch_size or len(input_ids)
        parts = [
            self._score_batch(model, ids, mask, logits_to_keep)
            for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size))
        ]
        log_probs, entropies = (torch.cat(each) for each in zip(*parts))
        return log_probs, entropies, None

    def _score_batch(self, model: nn.Module, ids: Tensor, mask: Tensor, kept: int) -> tuple[Tensor, Tensor]:
        head, states = self._answer_states(self.accelerator.unwrap_model(model), ids, mask, kept)
        said = mask[:, -kept:].bool()
        values = token_log_probs(head, states, ids[:, -kept:][said], self.config.temperature)
        log_probs, entropies = (torch.zeros(said.shape, device=ids.device).masked_scatter(said, v) for v in values)
        return log_probs, entropies

    def _answer_states(self, own: nn.Module, ids: Tensor, mask: Tensor, kept: int) -> tuple[nn.Module, Tensor]:
        """Return own's head, and the states (M, D) that predict the answers' tokens, answer after answer."""
        run, head = self._split[id(own)]
        with by_own_length(own):
            # Answers share a pass over their prompt, but not with checkpointing or without a plain head.
            if run is run_decoder and not self.config.gradient_checkpointing and can_extend_cache(own):
                return head, states_before_answers(own, ids, mask, kept)[mask[:, -kept:].bool()]
            hidden = run(own, ids, positions_of(decoder_of(own), mask), mask)[:, -kept - 1 : -1]
            return head, hidden[mask[:, -kept:].bool()]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        found = super()._generate_and_score_completions(inputs)
        numbers = [int(row["prompt"]) for row in inputs]
        return found | {"questions": torch.tensor(numbers)}  # TRL splits and shuffles this with the answers

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if self._teaching is None:
            return super()._compute_loss(model, inputs)
        answers, said = inputs["completion_ids"], inputs["completion_mask"]
        kept = answers.shape[1]
        ids = torch.cat([inputs["prompt_ids"], answers], 1), torch.cat([inputs["prompt_mask"], said], 1)
        head, states = self._answer_states(self.accelerator.unwrap_model(model), *ids, kept)
        prompts = [torch.tensor(self._teaching.prompts[number]) for number in inputs["questions"].tolist()]
        read = pad_sequence(prompts, True, self._tokenizer.eos_token_id, "left").to(answers)
        mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], True, 0, "left").to(said)
        with torch.no_grad():
            shown = torch.cat([read, answers], 1), torch.cat([mask, said], 1)
            other, wanted = self._answer_states(self._teaching.model, *shown, kept)
        found, entropies = token_divergences(
            (head, other), (states, wanted), self.config.divergence, self.config.temperature
        )
        self._metrics["train"]["divergence"].append(found.mean().item())
        self._metrics["train"]["entropy"].append(entropies.mean().item())
        return found.sum() / inputs["num_items_in_batch"].clamp(min=1)  # mean over the step's tokens, as in dapo

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> Tensor:
        loss = super().compute_loss(model, inputs, *args, **options)
        if not loss.isfinite():
            raise self._nonfinite_loss("the loss", loss.item())
        return loss

    def _nonfinite_loss(self, what: str, found: object) -> NonFiniteLoss:
        step = self.state.global_step + 1
        return NonFiniteLoss(
            f"{what} must stay finite, got {found} at step {step} of {self.config.steps}: lower rewards.lr (now "
            f"{self.config.lr:g})"
        )


class Reporting(TrainerCallback):
    """Calls on_log(step, TRL's figures of the step) after each step."""

    def __init__(self, on_log: Callable[[int, dict[str, float]], None]) -> None:
        self._on_log = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "train_runtime" not in logs:  # the summary at the end
            self._on_log(state.global_step, logs)


@contextlib.contextmanager
def undoing_changes(model: Any, tokenizer: Any) -> Iterator[str]:
    """Yield a temporary directory; afterwards undo the Trainer's changes to model, tokenizer and random generators."""
    text, attributes = model.config.get_text_config(), dict(vars(model))
    tokens = {name: getattr(text, name, None) for name in _SPECIAL}
    before = getattr(model.config, "use_cache", None), model.generation_config, tokenizer.pad_token
    states = random.getstate(), numpy.random.get_state()
    # Set as the Trainer would set them; it would print a message each time.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    own = {name: getattr(tokenizer, name) for name in _SPECIAL if getattr(tokenizer, name) is not None}
    for name, token in own.items():
        setattr(text, name, token)
    model.generation_config = GenerationConfig(**own)
    try:
        with tempfile.TemporaryDirectory(prefix="mft-rewards-") as directory:
            yield directory
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        for name in vars(model).keys() - attributes.keys():  # forward, model_tags and the like
            del vars(model)[name]
        vars(model).update({name: attributes[name] for name in ("forward", "model_tags") if name in attributes})
        for name, token in tokens.items():
            setattr(text, name, token)
        model.config.use_cache, model.generation_config, tokenizer.pad_token = before


def _arguments(config: RewardsConfig, directory: str, device: torch.device) -> GRPOConfig:
    micro_batch = config.micro_batch or config.answers
    return GRPOConfig(
        directory,
        max_steps=config.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=config.answers // micro_batch,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_tokens,
        temperature=config.temperature,
        top_k=0,
        beta=0.0,  # set later, with its reference model
        epsilon=config.epsilon,
        num_iterations=config.iterations,
        loss_type=config.loss_type,
        router_aux_loss_coef=0.0,  # as everywhere here: routers are frozen, or learn only from the rewards
        gradient_checkpointing=False,  # training_mode in training/loop.py enables it
        max_grad_norm=0.0,  # SteppedOptimizer clips
        seed=config.seed % 2**32,  # numpy takes no larger seed
        lr_scheduler_type="constant",
        learning_rate=config.lr,
        use_cpu=device.type == "cpu",
        bf16=False,  # no autocast: weights keep their dtype
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
    )
