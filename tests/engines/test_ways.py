"""The ways to run a step: each gives the plain loop's update, and uses the memory that it declares."""

import copy
import weakref

import pytest
import torch
from tiny import assert_masks_agree, make_gpt2, make_llama, make_rows, masked_llama
from tiny_ways import BY_LAYERS, EXACT, TOLERANCE, WAYS, masked_mixture, scores_of

import mft.config
import mft.engines.mode
from mft.config import MaskConfig, TrainConfig
from mft.data.batches import take_rows
from mft.engines.mode import place
from mft.engines.offload import Mover
from mft.evaluation.evaluate import evaluate
from mft.masks.convert import mask_model, masked_modules, merge_model, trainable_parameters
from mft.masks.quantize import quantize_model
from mft.objectives.kl import KL
from mft.training.loop import NonFiniteLoss, train_masks


def train(way, model=None, rows=None, **options):
    model = masked_llama(layers=(1, 2, 3)) if model is None else model
    settings = TrainConfig(**{"lr": 1e-3, "steps": 3, "batch_size": 2} | options)
    reports = train_masks(model, make_rows() if rows is None else rows, settings, way=way)
    return model, [report.loss for report in reports], reports


def assert_same_training(one, other, tolerance=EXACT):
    (model, losses, *_), (other_model, other_losses, *_) = one, other
    assert losses == pytest.approx(other_losses, abs=tolerance)
    ours, theirs = scores_of(model), scores_of(other_model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance, name


@pytest.mark.parametrize("accumulation", [1, 16])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_plain_update(way, accumulation, separate):
    start = scores_of(masked_llama(layers=(1, 2, 3)))
    plain = train("plain", accumulation=accumulation)
    assert_same_training(train(way, accumulation=accumulation), plain, TOLERANCE[way])
    moved = [(scores_of(plain[0])[name] - start[name]).abs().max() for name in start]
    assert min(moved) > 1e-3


def test_all_ways_select_the_same_masks():
    begun = masked_modules(masked_llama(layers=(1, 2, 3)))
    plain, *others = [masked_modules(train(way, steps=8, accumulation=2)[0]) for way in mft.config.WAYS]
    for name, module in plain.items():
        for other in others:
            assert_masks_agree(module, other[name], TOLERANCE["in_place"])
        assert not torch.equal(begun[name].mask(), module.mask())


PORTIONS = {  # (model, settings, options) of a step that layerwise takes in portions
    "fp32": ({}, {}, {}),
    "sums in bf16": ({"dtype": torch.bfloat16}, {}, {}),
    "int16 scores, 8-bit moments": ({"scores_dtype": "int16"}, {"moments": "8bit"}, {}),
    "remembered layers": ({"layers": (2, 3)}, {"steps": 4}, {}),
    "held to the base": ({"layers": (1, 2)}, {}, {"objective": KL()}),
}


@pytest.mark.parametrize("case", PORTIONS)
def test_a_step_in_portions_is_the_same_step(case, separate):
    """The results are bitwise equal: gradients accumulate in the same dtype and order.

    5 batches run as 2, 2 and 1, or singly.
    """
    mask, settings, options = PORTIONS[case]

    def trained(at_once):
        model = masked_llama(**{"layers": (1, 2, 3)} | mask)
        train_settings = {"accumulation": 5, "batch_size": 1, "batches_at_once": at_once} | settings
        train = TrainConfig(**{"lr": 1e-3, "steps": 2} | train_settings)
        reports = train_masks(model, make_rows(), train, way="layerwise", **options)
        return [report.loss for report in reports], masked_modules(model)

    losses, whole = trained(None)
    for at_once in (2, 1, 9):
        again, portions = trained(at_once)
        assert again == losses
        for name, module in whole.items():
            assert torch.equal(portions[name].scores, module.scores), (at_once, name)
            assert torch.equal(portions[name].packed_mask(), module.packed_mask()), (at_once, name)


@pytest.mark.parametrize("way", ["plain", "resident"])
def test_ways_of_one_batch_at_a_time_refuse_portions(way):
    with pytest.raises(ValueError, match=f"train.batches_at_once must be null with memory: {way}.*got 2"):
        train(way, batches_at_once=2)


@pytest.mark.parametrize("at_once", [None, 1])
def test_layerwise_holds_one_layers_gradients_on_the_device(at_once, separate):
    """In portions, the next layer's sums may be there too, in transit; those of all layers rest on the host."""
    model = masked_llama(layers=(0, 1, 2, 3))
    batch = take_rows(make_rows(), [0, 1])
    settings = TrainConfig(steps=1, batches_at_once=at_once)
    engine = place(model, way="layerwise").start(batch.input_ids[:1, :8], settings)
    held = []
    backward = engine.backward_layer
    engine.backward_layer = lambda layer, *args: (
        held.append([m.grad is not None for m in engine.masks]),
        backward(layer, *args),
    )[1]
    engine.step([batch, batch], 1.0, 1e-3, None, lambda *_: None)
    assert [sum(flags) for flags in held] == [7] * 8  # the seven linears of a layer; two micro-batches, four layers
    assert not any(m.grad is not None for m in engine.masks)
    engine.close()


def free(**mask):
    layers = {"target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [1, 2, 3]}
    return mask_model(make_llama(), MaskConfig(**layers | mask))


SHARP = {"mode": "value", "threshold": 0.0, "init": "magnitude", "sharpness": [30.0, 300.0], "deletion_penalty": 0.5}
KINDS = {
    "value": lambda: masked_llama(layers=(0, 2), mode="value"),
    "threshold": lambda: masked_llama(layers=(0, 2), threshold=0.01),
    "half": lambda: masked_llama(layers=(0, 2), keep_ratio=0.5, init="magnitude"),
    "budget": lambda: free(budget=0.03, mode="magnitude"),
    "surrogate": lambda: free(**SHARP),
    # Scores of both signs; the penalty pushes away from the threshold on both sides of 0.
    "surrogate, magnitude": lambda: free(**SHARP | {"mode": "magnitude", "threshold": 0.005, "init": "normal"}),
    "mixture, value": lambda: masked_mixture(mode="value"),
    "mixture, threshold": lambda: masked_mixture(threshold=0.01),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_mask(way, kind, separate):
    ours, plain = (train(each, KINDS[kind](), accumulation=2) for each in (way, "plain"))
    assert_same_training(ours, plain, TOLERANCE[way])
    assert [report.dropped for report in ours[2]] == [report.dropped for report in plain[2]]


@pytest.mark.parametrize("kind", ["half", "budget", "surrogate", "mixture, value"])
def test_clipping_by_the_global_norm(kind, separate):
    plain, other = (train("plain", KINDS[kind](), max_grad_norm=norm) for norm in (1e-4, None))
    for way in ("in_place", "resident"):
        assert_same_training(train(way, KINDS[kind](), max_grad_norm=1e-4), plain, TOLERANCE[way])
    clipped = scores_of(plain[0])
    assert any((scores - clipped[name]).abs().max() > 10 * EXACT for name, scores in scores_of(other[0]).items())


@pytest.mark.parametrize("kind", ["budget", "surrogate"])
def test_a_quantised_base_learns_as_its_weights_do(kind):
    models = [quantize_model(KINDS[kind](), "int8", masked=True) for _ in range(2)]
    assert_same_training(train("quantized", models[0]), train("plain", models[1]))


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_score_different_numbers_of_tokens(way, separate):
    rows = make_rows(6)
    labels = [[-100] * (i * 2) + row["labels"][i * 2 :] for i, row in enumerate(rows)]
    labels[0] = [-100] * len(labels[0])
    rows = rows.remove_columns("labels").add_column("labels", labels)
    options = {"rows": rows, "accumulation": 3, "batch_size": 1}
    assert_same_training(train(way, **options), train("plain", **options), TOLERANCE[way])


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_untouched_and_the_result_merges(way, separate):
    model = masked_llama(layers=(1, 3))
    before = copy.deepcopy(model.state_dict())
    trained = train(way, model)[0]
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name]) != name.endswith(".scores"), name
    tokens = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        masked = trained(tokens).logits
        assert torch.allclose(merge_model(trained)(tokens).logits, masked, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_the_mask_held_after_the_last_step_is_the_scores(way, separate):
    """A run exports its masks from the scores; the engine computes with its own packed masks."""
    rows = make_rows()
    model = train(way, rows=rows)[0]
    held = evaluate(model, rows, way=way)
    assert held.loss == pytest.approx(evaluate(model, rows).loss, abs=1e-6)


@pytest.mark.parametrize("way", BY_LAYERS)
def test_evaluation_in_every_way(way, separate):
    rows = make_rows(7)
    for model in (make_llama(), masked_llama()):
        plain, ours = evaluate(model, rows), evaluate(model, rows, way=way, batch_size=2)
        assert torch.equal(ours.documents, plain.documents)
        assert torch.equal(ours.correct, plain.correct)
        assert torch.allclose(ours.loss_sums, plain.loss_sums, atol=1e-5)


@pytest.mark.parametrize("scores_dtype", ["bfloat16", "int16"])
@pytest.mark.parametrize("way", WAYS)
def test_scores_and_moments_in_few_bits_learn_the_same(way, scores_dtype, separate):
    """Layer by layer the results are bitwise equal, and close to fp32: rounding depends on step and place only."""
    ours = [
        train(w, masked_llama(layers=(1, 2), scores_dtype=scores_dtype), moments="8bit", steps=12)
        for w in ("resident", way)
    ]
    for name, scores in scores_of(ours[0][0]).items():
        same = (scores == scores_of(ours[1][0])[name]).float().mean()
        assert same == 1 if way in BY_LAYERS else same > 0.99, name
    exact = train("plain", masked_llama(layers=(1, 2)), steps=12)
    for name, module in masked_modules(ours[1][0]).items():
        agree = (module.mask() == masked_modules(exact[0])[name].mask()).float().mean()
        assert agree > 0.97, name


def test_fixed_point_scores_count_as_trainable():
    counts = [trainable_parameters(masked_llama(scores_dtype=dtype)) for dtype in ("float32", "int16")]
    assert counts[0] == counts[1]
    assert 0 < counts[0][0] < counts[0][1]


def test_bfloat16_weights_and_buffers(separate):
    plain = train("plain", masked_llama(dtype=torch.bfloat16))
    for way in WAYS:
        for grad_dtype in (None, "float32"):
            ours = train(way, masked_llama(dtype=torch.bfloat16), grad_dtype=grad_dtype)
            assert_same_training(ours, plain, tolerance=3e-3)  # as far as 3 steps at 1e-3 can move a score


@pytest.mark.parametrize("way", ["plain", *WAYS])
def test_a_trained_model_trains_on_in_another_way(way):
    model = train(way, steps=1)[0]
    assert trainable_parameters(model)[0] > 0
    before = scores_of(model)
    train("plain", model, steps=1)
    assert all((scores_of(model)[name] != scores).any() for name, scores in before.items())


@pytest.mark.parametrize("way", BY_LAYERS)
def test_frozen_layers_are_run_once_a_row(way, separate):
    model = masked_llama(layers=(2, 3))
    calls = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    train(way, model, steps=12, rows=make_rows(4))
    looking = 5  # ways to examine the model: training, whole, its head, layer by layer, the layer below
    assert len(calls) <= 2 + looking


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_not_finite_changes_no_score(way, separate):
    model = masked_llama()
    before = scores_of(model)
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(NonFiniteLoss, match="at step 1 of 3 in the batch of rows"):
        train(way, model)
    for name, scores in scores_of(model).items():
        assert torch.equal(scores, before[name])


@pytest.mark.parametrize("way", WAYS)
def test_scores_that_are_not_finite_are_named(way, separate):
    model = masked_llama(layers=(2, 3))
    with torch.no_grad():  # dropped, so the forward pass does not see it, but its score's gradient does
        model.model.layers[3].mlp.down_proj.weight[0, 0] = torch.inf
        model.model.layers[3].mlp.down_proj.scores[0, 0] = 1e-9
    with pytest.raises(ValueError, match="scores of module 'model.layers.3.mlp.down_proj' must be finite, got 1 NaN"):
        train(way, model)


@pytest.mark.parametrize("way", BY_LAYERS)
def test_lack_of_memory_names_layer_contents_and_remedy(way, monkeypatch):
    model = masked_llama()

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    engine_of = mft.engines.mode.MODES[way].engine
    backward = engine_of.backward_layer

    def fail_after_layer_two(self, layer, *args):
        if layer == 2:
            monkeypatch.setattr(self.calls, "run", fail)
        return backward(self, layer, *args)

    monkeypatch.setattr(engine_of, "backward_layer", fail_after_layer_two)
    with pytest.raises(RuntimeError) as caught:
        train(way, model)
    message = str(caught.value)
    assert message.startswith("out of memory at layer 2, backward; live on cpu")
    assert all(word in message for word in ("weights", "gradient buffers", "2.00 GiB", "train.batch_size"))
    assert ("memory: layerwise" in message) or way == "layerwise"


@pytest.mark.parametrize("way", BY_LAYERS)
def test_dropout_is_refused_in_training_and_plays_no_part_in_evaluation(way):
    model = mask_model(make_gpt2(dropout=0.1), MaskConfig.paper())
    with pytest.raises(ValueError, match=f"memory must be plain for a model with dropout, .*, got {way}"):
        train(way, model)
    rows = make_rows(4)
    assert evaluate(model, rows, way=way).loss == pytest.approx(evaluate(model, rows).loss, abs=1e-6)


@pytest.mark.parametrize("way", BY_LAYERS)
def test_noise_that_no_configuration_names_is_refused_like_dropout(way):
    """For example a router's noise: the layer runs twice, so its gradient would belong to another pass."""
    model = masked_llama()
    model.model.layers[3].mlp.register_forward_hook(
        lambda mlp, _, output: output * torch.rand_like(output) if mlp.training else None
    )
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=f"memory must be plain for a model with dropout, or other noise .*, got {way}"
    ):
        train(way, model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("way", WAYS)
def test_other_architectures(way, separate):
    """GPT-2 returns tuples from Conv1D layers, Gemma 3 has layers with different attention, and both tie the head."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    def gemma():
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 16}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        return Gemma3ForCausalLM(
            Gemma3TextConfig(vocab_size=61, **sizes, **heads, sliding_window=4, layer_types=layers, pad_token_id=0)
        )

    for make in (lambda: make_gpt2(n_layer=3), gemma):
        torch.manual_seed(0)
        models = [make().eval()]
        models.append(copy.deepcopy(models[0]))
        for model in models:
            mask_model(model, MaskConfig.paper(layers_to_transform=[1, 2]))
        assert_same_training(train(way, models[0]), train("plain", models[1]), TOLERANCE[way])


def test_layers_that_hand_on_more_than_hidden_states_are_refused(monkeypatch):
    model = masked_llama()
    layer = model.model.layers[2]
    forward, seen = layer.forward, []

    def forward_that_remembers(hidden, *args, **kwargs):
        seen.append(hidden)
        return forward(hidden * len(seen) % 3, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward_that_remembers)
    with pytest.raises(ValueError, match="memory must be plain for LlamaForCausalLM: its layers pass on more"):
        train("resident", model)


def test_host_buffers_are_used_again():
    mover = Mover("cpu", separate=True)
    first = mover.store(torch.ones(3))
    mover.give_back(first)
    second = mover.store(torch.zeros(3))
    assert second.data_ptr() == first.data_ptr()
    assert mover.store(torch.zeros(3)).data_ptr() != second.data_ptr()
    (brought,) = mover.bring([second]).wait()
    assert torch.equal(brought, second)
    assert brought.data_ptr() != second.data_ptr()


def test_one_memory_copies_nothing():
    mover = Mover("cpu")
    tensor = torch.ones(3)
    assert mover.store(tensor) is tensor
    assert mover.bring([tensor]).wait()[0] is tensor
    alive = weakref.ref(tensor)
    mover.give_back(tensor)
    del tensor
    assert alive() is None  # nothing keeps it alive


def test_a_placed_model_keeps_its_mode_when_options_are_added():
    model = masked_llama()
    placed = place(place(model, way="layerwise", device="cpu"), remember=False)
    assert (placed.model, placed.mode, placed.remember) == (model, mft.engines.mode.MODES["layerwise"], False)
