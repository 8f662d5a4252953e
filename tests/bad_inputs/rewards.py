"""Training by rewards: settings, rows and models that are not for it, and studies that say two things."""

import shutil

from datasets import Dataset
from tiny import make_llama, make_rows, masked_llama
from typer.testing import CliRunner

from mft.cli.app import app
from mft.memory.rewards import rewards_memory
from mft.memory.shapes import known_config, shape_from_config
from mft.rewards.config import RewardsConfig
from mft.rewards.teacher import OnPolicyTeacher
from mft.rewards.train import train_rewards
from mft.study.load import SHIPPED, load_study

from .registry import accepted, refused


class Words:
    """A tokenizer of numbers."""

    eos_token_id = 0

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def questions(count, completion=(5, 0)):
    ids = [[3, 4 + i % 9, *completion] for i in range(count)]
    labels = [[-100, -100, *completion]] * count
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "document": list(range(count))})


@refused(ValueError, where="num_generations", got="got 1", rule="must be at least 2")
def answers_with_nothing_to_be_held_against():
    RewardsConfig(num_generations=1)


@refused(
    ValueError,
    where="micro_batch",
    got="got 7",
    rule="must divide the 64 answers of a step (questions * num_generations)",
)
def a_micro_batch_that_leaves_answers_over():
    RewardsConfig(micro_batch=7)


@refused(ValueError, where="verifier", got="got 'number'", rule="must be one of exact, last_number")
def a_verifier_of_another_name():
    RewardsConfig(verifier="number")


@refused(
    ValueError,
    where="model",
    got="got none",
    rule="must have something that requires grad",
    remedy="set scores.requires_grad_() of the masked layers",
)
def rewards_for_a_model_of_which_nothing_learns():
    train_rewards(make_llama().requires_grad_(False), Words(), questions(8), RewardsConfig(steps=1))


@refused(
    ValueError,
    where="mask.scores_dtype",
    got="got model.layers.2.self_attn.q_proj",
    rule="must not be int16 for training by rewards",
    remedy="take float32 or bfloat16",
)
def rewards_for_scores_that_autograd_cannot_reach():
    train_rewards(masked_llama(scores_dtype="int16"), Words(), questions(8), RewardsConfig(steps=1))


@refused(ValueError, where="prompt", got="got Show: {answer}", rule="must hold {question}")
def a_teacher_that_reads_no_question():
    OnPolicyTeacher(prompt="Show: {answer}")


@refused(
    ValueError, where="prompt", got="got {question} {solution}", rule="must have no fields but {question} and {answer}"
)
def a_teacher_that_is_to_read_what_there_is_not():
    OnPolicyTeacher(prompt="{question} {solution}")


@refused(
    ValueError, where="config.beta", got="got 0.1", rule="must be 0 beside a teacher, whose words alone are learned"
)
def a_weight_of_the_start_beside_a_teacher():
    train_rewards(masked_llama(), Words(), questions(8), RewardsConfig(steps=1, beta=0.1), teacher=OnPolicyTeacher())


def estimate(*arguments, config="rewards"):
    result = CliRunner().invoke(app, ["estimate", "--config", config, *arguments])
    assert result.exit_code == 2
    raise ValueError(result.output.strip().removeprefix("error: "))


@refused(
    ValueError,
    where="objective",
    got="got cross_entropy",
    rule="must be rewards for mft estimate --config, which counts steps of sampling and learning",
    remedy="else give --model alone",
)
def an_estimate_of_a_study_on_text():
    estimate(config="small")


@refused(ValueError, where="--sequence", got="got 512", rule="must not come with --config, whose study says it")
def an_option_that_the_study_says():
    estimate("--sequence", "512")


@refused(
    ValueError,
    where="layers",
    got="got [7]",
    rule="must lie in 0 to 3 (from scratch has 4 layers)",
)
def an_estimate_of_layers_that_are_not_there():
    estimate("mask.layers_to_transform=7")


@refused(
    ValueError,
    where="dataset",
    got="got 3",
    rule="must hold at least as many questions as a step asks, questions = 8",
)
def fewer_questions_than_a_step_asks():
    train_rewards(make_llama(), Words(), questions(3), RewardsConfig(steps=1))


@refused(
    ValueError,
    where="row 0 of dataset",
    got="got 12 scored tokens of 12",
    rule="must have a prompt that is not scored and a completion that is",
)
def text_in_place_of_questions():
    train_rewards(make_llama(), Words(), make_rows(), RewardsConfig(steps=1))


@refused(
    ValueError,
    where="completion",
    got="got ''",
    rule="must hold a number for the verifier last_number",
)
def an_answer_without_a_number_where_the_last_one_counts():
    train_rewards(make_llama(), Words(), questions(8, (0,)), RewardsConfig(steps=1, verifier="last_number"))


@refused(ValueError, where="rewards.lr", got="small-rewards", rule="must be left out: arms decide it")
def a_rate_of_rewards_that_arms_have(tmp):
    (tmp / "small-rewards.yaml").write_text("arms: {}\ndomains: {}\nrewards: {lr: 1.0e-3}\n")
    load_study(tmp / "small-rewards.yaml")


@refused(
    ValueError,
    where="rewards",
    got="got keys of it",
    rule="must be left out unless objective is rewards",
)
def rewards_in_a_study_of_cross_entropy(tmp):
    shutil.copy(SHIPPED / "rewards.yaml", tmp / "mine.yaml")
    load_study(tmp / "mine.yaml", ["objective=cross_entropy"])


@refused(ValueError, where="layers", got="got [28]", rule="must lie in 0 to 27 (qwen2.5-1.5b has 28 layers)")
def memory_of_rewards_for_layers_that_are_not_there():
    shape = shape_from_config(known_config("qwen2.5-1.5b"), "qwen2.5-1.5b")
    rewards_memory(shape, learns="scores", answers=8, prompt=9, completion=9, layers=[28])


@accepted("a tenth of a cent is none of the answer's digits, and thousands may be parted")
def a_number_written_in_another_way():
    from mft.evaluation.verifiers import VERIFIERS

    assert VERIFIERS["last_number"]("that makes $1,200.00.", "#### 1200")
