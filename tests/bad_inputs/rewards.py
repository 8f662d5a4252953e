"""Training with rewards: settings, rows and models that do not fit, and studies that contradict themselves.
`questions(n)` are n rows of numbers, `Words()` is a tokenizer for them, and `estimate(...)` is
`mft estimate --config rewards`.
"""

import shutil

from datasets import Dataset
from tiny import make_llama, make_rows, masked_llama
from typer.testing import CliRunner

from mft.cli.app import app
from mft.evaluation.verifiers import VERIFIERS
from mft.memory.rewards_memory import rewards_memory
from mft.memory.shapes import known_config, shape_from_config
from mft.rewards.config import RewardsConfig
from mft.rewards.on_policy_teacher import OnPolicyTeacher
from mft.rewards.train_rewards import train_rewards
from mft_study.load import SHIPPED, load_study


class Words:
    """A tokenizer for numbers."""

    eos_token_id = 0

    def decode(self, tokens, **_):
        return " ".join(map(str, tokens))


def questions(count, completion=(5, 0)):
    ids = [[3, 4 + i % 9, *completion] for i in range(count)]
    labels = [[-100, -100, *completion]] * count
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "document": list(range(count))})


def estimate(*arguments, config="rewards"):
    result = CliRunner().invoke(app, ["estimate", "--config", config, *arguments])
    assert result.exit_code == 2
    raise ValueError(result.output.strip().removeprefix("error: "))


TABLE = r"""
answers with nothing to be held against
    RewardsConfig(num_generations=1)
    -> ValueError: num_generations | must be at least 2 | got 1
a micro batch that leaves answers over
    RewardsConfig(micro_batch=7)
    -> ValueError: micro_batch | must divide the 64 answers of a step (questions * num_generations) | got 7
a verifier of another name
    RewardsConfig(verifier="number")
    -> ValueError: verifier | must be one of exact, last_number | got 'number'
rewards for a model of which nothing learns
    train_rewards(make_llama().requires_grad_(False), Words(), questions(8), RewardsConfig(steps=1))
    -> ValueError: model | must have something that requires grad | got none
        | set scores.requires_grad_() of the masked layers
rewards for scores that autograd cannot reach
    train_rewards(masked_llama(scores_dtype="int16"), Words(), questions(8), RewardsConfig(steps=1))
    -> ValueError: mask.scores_dtype | must not be int16 for training by rewards | got model.layers.2.self_attn.q_proj
        | take float32 or bfloat16
a teacher that reads no question
    OnPolicyTeacher(prompt="Show: {answer}")
    -> ValueError: prompt | must hold {question} | got Show: {answer}
a teacher that is to read what there is not
    OnPolicyTeacher(prompt="{question} {solution}")
    -> ValueError: prompt | must have no fields but {question} and {answer} | got {question} {solution}
a weight of the start beside a teacher
    train_rewards(masked_llama(), Words(), questions(8), RewardsConfig(steps=1, beta=0.1), teacher=OnPolicyTeacher())
    -> ValueError: config.beta | must be 0 with a teacher, because only its words are learned | got 0.1
an estimate of a study on text
    estimate(config="small")
    -> ValueError: objective | must be rewards for mft estimate --config, which counts steps of sampling and learning
        | got cross_entropy | else give --model alone
an option that the study says
    estimate("--sequence", "512")
    -> ValueError: --sequence | must not come with --config, because its study sets it | got 512
an estimate of layers that are not there
    estimate("mask.layers_to_transform=7")
    -> ValueError: layers | must lie in 0 to 3 (from scratch has 4 layers) | got [7]
fewer questions than a step asks
    train_rewards(make_llama(), Words(), questions(3), RewardsConfig(steps=1))
    -> ValueError: dataset | must hold at least as many questions as a step asks, questions = 8 | got 3
text in place of questions
    train_rewards(make_llama(), Words(), make_rows(), RewardsConfig(steps=1))
    -> ValueError: row 0 of dataset | must have a prompt that is not scored and a completion that is
        | got 12 scored tokens of 12
an answer without a number where the last one counts
    train_rewards(make_llama(), Words(), questions(8, (0,)), RewardsConfig(steps=1, verifier="last_number"))
    -> ValueError: completion | must hold a number for the verifier last_number | got ''
a rate of rewards that arms have
    (tmp / "small-rewards.yaml").write_text("arms: {}\ndomains: {}\nrewards: {lr: 1.0e-3}\n")
    load_study(tmp / "small-rewards.yaml")
    -> ValueError: rewards.lr | must be left out: arms decide it | small-rewards
rewards in a study of cross entropy
    shutil.copy(SHIPPED / "rewards.yaml", tmp / "mine.yaml")
    load_study(tmp / "mine.yaml", ["objective=cross_entropy"])
    -> ValueError: rewards | must be left out unless objective is rewards | got keys of it
a number written in another way
    assert VERIFIERS["last_number"]("that makes $1,200.00.", "#### 1200")
    -> accepted: a tenth of a cent is none of the answer's digits, and thousands may be parted
"""
