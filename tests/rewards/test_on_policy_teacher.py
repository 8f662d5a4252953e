"""On-policy distillation: what the teacher reads, the gradient by hand, and what is learned from it."""

import copy

import pytest
import torch
from half_right import assert_near, config, gradients, make_rows, masked, questions
from tiny import equal

from mft.config import TrainConfig
from mft.evaluation.exact_match import exact_matches
from mft.rewards.config import DIVERGENCES
from mft.rewards.on_policy_teacher import OnPolicyTeacher
from mft.rewards.questions import Question
from mft.training.loop import finetune

pytest.importorskip("trl")

from mft.rewards import trainer
from mft.rewards.train_rewards import train_rewards

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")

SHOWN = "{question} {answer} and {question}"


# ---------------------------------------------------------------------------------------------- what it reads


def test_the_question_is_its_own_tokens_and_the_answer_a_text(tokenizer):
    asked = Question(tokenizer.encode("Al has 5:"), "{question}")
    assert OnPolicyTeacher().prompts([asked], tokenizer) == [asked.prompt]
    (read,) = OnPolicyTeacher(prompt=SHOWN).prompts([asked], tokenizer)
    between = tokenizer.encode(" {question} and ")
    assert read == [*asked.prompt, *between, *asked.prompt]


def test_what_begins_a_document_stays_at_its_beginning(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.bos_token = own.eos_token
    asked = Question([own.bos_token_id, *tokenizer.encode("Al has 5:")], "3")
    (read,) = OnPolicyTeacher(prompt="Bert {question}").prompts([asked], own)
    assert read == [own.bos_token_id, *tokenizer.encode("Bert "), *asked.prompt[1:]]


@pytest.mark.parametrize("prompt", ["", "{answer}", "{question} {text}", "{question} {}"])
def test_a_prompt_without_the_question_or_with_other_fields_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt must (hold \{question\}|have no fields but \{question\} and)"):
        OnPolicyTeacher(prompt=prompt)


# ---------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_gradient_is_that_of_the_divergence_by_hand(base, tokenizer, rows, kind, monkeypatch):
    """It is the mean over the tokens of all answers; the teacher's prompts are longer than the model's."""
    sampled, found = {}, {}

    def judged(answers, asked, *_):
        sampled.update(answers=answers, asked=asked)
        return [0.0] * len(answers)

    monkeypatch.setattr(trainer, "rewards_of", judged)
    start = masked(copy.deepcopy(base), keep_ratio=0.7)
    model, teacher = copy.deepcopy(start), copy.deepcopy(base)
    note = lambda *_: found.update(gradients(model))  # noqa: E731
    options = {"questions": 8, "temperature": 0.7, "micro_batch": 8, "steps": 1, "divergence": kind}
    asked = OnPolicyTeacher(teacher, SHOWN)
    (report,) = train_rewards(model, tokenizer, rows, config(**options), teacher=asked, before_update=note)

    loss, tokens = 0.0, sum(map(len, sampled["answers"]))
    assert len({len(question.prompt) for question in sampled["asked"]}) > 1
    for question, answer in zip(sampled["asked"], sampled["answers"]):
        (read,) = asked.prompts([question], tokenizer)
        said = [
            (one(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7).softmax(-1)
            for one, prompt in ((start, question.prompt), (base, read))
        ]
        p, q = said[0], said[1].detach()
        first, second = {"reverse_kl": (p, q), "forward_kl": (q, p), "jsd": (p, (p + q) / 2)}[kind]
        terms = (first * (first / second).log()).sum(-1)
        if kind == "jsd":
            terms = (terms + (q * (q / second).log()).sum(-1)) / 2
        loss = loss + terms.sum() / tokens
    loss.backward()
    assert_near(found, gradients(start))
    assert report.divergence == pytest.approx(loss.item(), rel=0.1)  # of micro-batches: the mean of their means
    assert report.reward == 0


def test_the_model_says_at_last_what_its_teacher_says(base, tokenizer, rows):
    """Rewards could not teach this: no answer is right before or after."""
    teacher, pairs = copy.deepcopy(base), [(prompt, " 3") for prompt, _ in questions(24)]
    finetune(teacher, make_rows(pairs, tokenizer), TrainConfig.of_weights(lr=3e-3, steps=60, batch_size=8))
    model = copy.deepcopy(base)
    rows = make_rows([(prompt, " 77") for prompt, _ in questions(24)], tokenizer)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    options = {"steps": 30, "lr": 3e-3, "questions": 8, "divergence": "forward_kl"}
    reports = train_rewards(model, tokenizer, rows, config(**options), teacher=OnPolicyTeacher(teacher))
    assert reports[-1].divergence < 0.1 * reports[0].divergence
    assert max(report.reward for report in reports) == 0
    assert exact_matches(model, tokenizer, make_rows(pairs, tokenizer), max_new_tokens=4)[0].sum() >= 22
    assert equal(teacher.state_dict(), before)


def test_a_teacher_left_out_is_the_model_as_the_call_found_it(base, tokenizer, rows):
    """It reads the model's own prompt, so at first there is nothing to learn; it must stay unchanged."""
    model = masked(copy.deepcopy(base))
    reports = train_rewards(model, tokenizer, rows, config(steps=3), teacher=OnPolicyTeacher())
    assert abs(reports[0].divergence) < 1e-6
    model = masked(copy.deepcopy(base))
    shown = train_rewards(model, tokenizer, rows, config(steps=3), teacher=OnPolicyTeacher(prompt=SHOWN))
    assert shown[0].divergence > 1e-3


def test_a_loss_that_would_be_ignored_beside_a_teacher_is_refused(base, tokenizer, rows):
    model, teacher = masked(copy.deepcopy(base)), OnPolicyTeacher()
    with pytest.raises(ValueError, match="config.loss_type must be dapo with a teacher: .* got grpo"):
        train_rewards(model, tokenizer, rows, config(loss_type="grpo"), teacher=teacher)


def test_a_teacher_of_fewer_words_is_refused(base, tokenizer, rows):
    teacher = copy.deepcopy(base)
    teacher.resize_token_embeddings(200)
    with pytest.raises(
        ValueError, match="teacher.model must have at least the 270 words of the model's tokenizer, got one of 200"
    ):
        train_rewards(masked(copy.deepcopy(base)), tokenizer, rows, config(), teacher=OnPolicyTeacher(teacher))


def test_the_model_that_learns_is_no_teacher_and_stays_trainable(base, tokenizer, rows):
    model = masked(copy.deepcopy(base))
    with pytest.raises(ValueError, match="teacher.model must be another model than the one that learns, or left out"):
        train_rewards(model, tokenizer, rows, config(), teacher=OnPolicyTeacher(model))
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_what_the_teacher_reads_must_fit_in_it(base, tokenizer, rows):
    teacher = copy.deepcopy(base)
    teacher.config.max_position_embeddings = 24
    asked = OnPolicyTeacher(teacher, "{question} and so on, and so on, and so on: {question}")
    with pytest.raises(ValueError, match="sequence_length must be at most 24"):
        train_rewards(masked(copy.deepcopy(base)), tokenizer, rows, config(), teacher=asked)
