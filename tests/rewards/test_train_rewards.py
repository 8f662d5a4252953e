"""Training with rewards: what is learned, from which gradient and seed, and that nothing else changes."""

import copy
import random
from itertools import pairwise

import numpy
import pytest
import torch
from half_right import assert_near, config, gradients, make_rows, masked, questions
from tiny import make_gpt2

from mft.evaluation.exact_match import exact_matches
from mft.masks.convert import masked_modules
from mft.masks.surrogate import Surrogate
from mft_study.peft_methods import add_adapter, lora_options

pytest.importorskip("trl")

from mft.rewards import train_rewards as train_module
from mft.rewards import trainer
from mft.rewards.train_rewards import train_rewards

# PEFT calls transformers by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# ---------------------------------------------------------------------------------------------- what is learned


def test_right_answers_become_likelier(base, tokenizer):
    """Every question has the same answer, which the model gives now and then."""
    rows = make_rows([(prompt, " 3") for prompt, _ in questions(8)], tokenizer)
    model, seen = learning(copy.deepcopy(base), ""), []
    before = exact_matches(model, tokenizer, rows, max_new_tokens=4)[0].sum()
    options = {"steps": 24, "lr": 3e-3, "num_generations": 8, "betas": (0.9, 0.99)}
    reports = train_rewards(model, tokenizer, rows, config(**options), on_step=seen.append)
    assert seen == reports
    assert [report.step for report in reports] == list(range(1, 25))
    assert reports[0].reward < 0.2
    assert sum(report.reward for report in reports[-4:]) / 4 > 0.5
    assert before == 0
    assert exact_matches(model, tokenizer, rows, max_new_tokens=4)[0].sum() == 8
    assert not model.training


TRAINED = {
    "scores": lambda model: masked(model),
    "scores of 16 bits": lambda model: masked(model, scores_dtype="bfloat16"),
    "weights of a layer": lambda model: learning(model, "model.layers.1.mlp."),
    "all weights": lambda model: learning(model, ""),
    "weights of 16 bits": lambda model: learning(model.bfloat16(), "model.layers.1.mlp."),
    "LoRA": lambda model: add_adapter(model, ["model.layers.1.mlp.down_proj"], lora_options(2)).get_base_model(),
}


def learning(model, prefix):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(prefix))
    return model


@pytest.mark.parametrize("kind", TRAINED)
def test_what_requires_grad_learns_and_nothing_else_changes(base, tokenizer, rows, kind):
    model = TRAINED[kind](copy.deepcopy(base))
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = state(model)
    train_rewards(model, tokenizer, rows, config(seed=1, steps=3, num_generations=8))
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    assert changed(before, state(model)) - tied == wanted - tied
    assert wanted


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradient_is_that_of_the_advantages_by_hand(base, tokenizer, rows, kind, monkeypatch):
    """-sum of advantage * log p(token) over the tokens of all answers, divided by their number."""
    sampled, found = {}, {}

    def judged(answers, asked, *_):
        rewards = [float(sum(answer) % 3 == 0) for answer in answers]
        sampled.update(answers=answers, prompts=[question.prompt for question in asked], rewards=rewards)
        return rewards

    def note(step, steps):
        assert (step, steps) == (1, 1)
        found.update(gradients(model))

    monkeypatch.setattr(trainer, "rewards_of", judged)
    eos = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.eos_token_id}
    gpt2 = lambda: make_gpt2(vocab_size=len(tokenizer), initializer_range=0.2, **eos)  # noqa: E731
    start = masked(gpt2() if kind == "gpt2" else copy.deepcopy(base).eval(), keep_ratio=0.7)
    model = copy.deepcopy(start)
    options = {"questions": 8, "num_generations": 8, "temperature": 0.7, "micro_batch": 16, "steps": 1}
    train_rewards(model, tokenizer, rows, config(**options), before_update=note)

    rewards = torch.tensor(sampled["rewards"]).view(8, 8)
    assert 0.2 < rewards.mean() < 0.8
    assert len({len(prompt) for prompt in sampled["prompts"]}) > 1
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    loss, tokens = 0.0, sum(map(len, sampled["answers"]))
    for prompt, answer, advantage in zip(sampled["prompts"], sampled["answers"], advantages):
        logits = start(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.7
        log_p = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
        loss = loss - advantage * log_p.sum() / tokens
    loss.backward()
    assert_near(found, gradients(start))


def test_scores_learn_by_the_sharpness_and_the_penalty_of_their_mask(base, tokenizer, rows):
    def run(**mask):
        model, grads = masked(copy.deepcopy(base), mode="value", threshold=0.0, **mask), []
        scores = {name: module.scores.detach().clone() for name, module in masked_modules(model).items()}
        note = lambda *_: grads.append(  # noqa: E731
            {name: module.scores.grad.clone() for name, module in masked_modules(model).items()}
        )
        train_rewards(model, tokenizer, rows, config(seed=1, steps=2, lr=1e-6), before_update=note)
        return scores, grads

    scores, straight = run()
    _, found = run(sharpness=[20.0, 200.0], deletion_penalty=0.5)
    weights = sum(one.numel() for one in scores.values())
    for sharpness, by_hand, step in zip((20.0, 200.0), straight, found, strict=True):
        surrogate = Surrogate(20.0, 200.0, 0.5, weights, sharpness)
        for name, one in scores.items():
            expected = surrogate.gradient(by_hand[name], one, threshold=0.0, mode="value")
            assert (step[name] - expected).norm() <= 1e-3 * expected.norm(), (sharpness, name)
    free = masked(copy.deepcopy(base), mode="value", threshold=0.0, sharpness=20.0)
    next(iter(masked_modules(free).values())).threshold = None
    with pytest.raises(ValueError, match="threshold must be a number with mask.sharpness, which is measured from"):
        train_rewards(free, tokenizer, rows, config())


@pytest.mark.parametrize("ramp", [0, 1])
def test_scores_under_a_budget_share_a_threshold_after_each_step(base, tokenizer, rows, ramp):
    model, shares = masked(copy.deepcopy(base), mode="magnitude", budget=0.04, budget_ramp=ramp), []

    def look(report):
        modules = list(masked_modules(model).values())
        assert len({module.threshold for module in modules}) == 1
        shares.append(1 - torch.cat([module.mask().flatten() for module in modules]).float().mean().item())

    train_rewards(model, tokenizer, rows, config(seed=1), on_step=look)
    assert shares == pytest.approx([0.04 if ramp == 0 else 0.02, 0.04], abs=1e-3)


def test_a_model_in_peft_learns_in_place(base, tokenizer, rows):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["down_proj"]))
    before = state(model)
    train_rewards(model, tokenizer, rows, config(seed=1))
    assert changed(before, state(model)) == {name for name, p in model.named_parameters() if p.requires_grad}


# ---------------------------------------------------------------------------------------------- seeds and the start


def test_the_same_seed_gives_the_same_bits_and_another_one_others(base, tokenizer, rows):
    def run(**options):
        model = masked(copy.deepcopy(base))
        reports = train_rewards(model, tokenizer, rows, config(**options))
        assert reports[-1].kl > reports[0].kl == 0  # the start stays, the model does not
        return state(model), [(report.reward, report.entropy, report.tokens, report.kl) for report in reports]

    torch.manual_seed(5)
    first = run(beta=0.1, seed=1)
    torch.rand(3)
    again, other = run(beta=0.1, seed=1), run(beta=0.1, seed=2)
    assert not changed(first[0], again[0])
    assert first[1] == again[1]
    assert changed(first[0], other[0])


def test_rates_follow_the_schedule(base, tokenizer, rows):
    settings = config(steps=5, schedule="linear", warmup_ratio=0.2)
    reports = train_rewards(masked(copy.deepcopy(base)), tokenizer, rows, settings)
    assert [report.lr for report in reports] == pytest.approx([0.005, 0.01, 0.0075, 0.005, 0.0025])
    assert all(a.seconds < b.seconds for a, b in pairwise(reports))


def test_the_kl_is_to_the_start_which_stays_and_its_weight_draws_towards_it(base, tokenizer):
    """No answer is ever right, so only the KL teaches."""
    rows = make_rows([(prompt, " 77") for prompt, _ in questions(8)], tokenizer)

    def run(model, start=None, **options):
        return train_rewards(learning(model, "model.layers."), tokenizer, rows, config(**options), start=start)

    far = masked(copy.deepcopy(base), keep_ratio=0.5, init="normal")
    before = state(far)
    reports = run(copy.deepcopy(base), beta=1.0, steps=10, lr=2e-3, num_generations=8, start=far)
    assert max(report.reward for report in reports) == 0
    assert reports[0].kl > 2 * reports[-1].kl > 0
    assert not changed(before, state(far))
    assert run(copy.deepcopy(base), beta=1.0)[0].kl == 0  # compared with itself before training
    model = copy.deepcopy(base)
    assert [report.kl for report in run(model)] == [None, None]
    assert not changed(state(base), state(model))


def test_micro_batches_and_checkpointed_layers_change_nothing(base, tokenizer, rows):
    def run(**options):
        model = learning(copy.deepcopy(base), "model.layers.")
        grads = {}
        note = lambda *_: grads.update(gradients(model))  # noqa: E731
        train_rewards(model, tokenizer, rows, config(seed=1, steps=1, **options), before_update=note)
        return grads

    whole = run()
    for options in ({"micro_batch": 4}, {"gradient_checkpointing": True}):
        assert_near(run(**options), whole)


def test_steps_on_the_same_answers_sample_once(base, tokenizer, rows):
    reports = train_rewards(masked(copy.deepcopy(base)), tokenizer, rows, config(steps=4, iterations=2))
    sampled = [(report.reward, report.tokens, report.entropy) for report in reports]
    assert sampled[0][:2] == sampled[1][:2]
    assert sampled[0] != sampled[2]


# ---------------------------------------------------------------------------------------------- nothing is left behind


def test_nothing_is_written_said_or_changed_but_what_learns(
    base, tokenizer, rows, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    told = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **said: told.append(said))
    model = masked(copy.deepcopy(base))
    model.config.use_cache = True
    model.config.eos_token_id = model.generation_config.eos_token_id = 5  # different from the tokenizer's
    own = (copy.deepcopy(model.config.to_dict()), model.generation_config.to_dict(), tokenizer.pad_token)
    generators = [torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())]
    names = set(vars(model))
    train_rewards(model, tokenizer, rows, config(seed=2**63 - 1))
    assert (model.config.to_dict(), model.generation_config.to_dict(), tokenizer.pad_token) == own
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert [random.getstate(), str(numpy.random.get_state())] == generators[1:]
    assert "forward" not in vars(model)
    assert set(vars(model)) == names
    assert not list(tmp_path.iterdir())
    assert not told
    assert capfd.readouterr().out == ""
    assert not caplog.records
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_that_does_not_stay_finite_stops(base, tokenizer, rows):
    with pytest.raises(train_module.NonFiniteLoss, match=r"must stay finite, got .* lower rewards.lr"):
        train_rewards(learning(copy.deepcopy(base), ""), tokenizer, rows, config(lr=1e38, seed=1, steps=4))


def test_a_loss_that_is_not_finite_is_not_learned_from(base, tokenizer, rows):
    model, start = learning(copy.deepcopy(base), ""), copy.deepcopy(base)
    with torch.no_grad():
        start.model.layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(train_module.NonFiniteLoss, match="the loss must stay finite, got nan at step 1 of 2"):
        train_rewards(model, tokenizer, rows, config(beta=0.1), start=start)
    assert not changed(state(base), state(model))
