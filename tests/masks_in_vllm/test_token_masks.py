"""A task for each token without vLLM: masks of fused layers, and the tasks of LoRA slots."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from served import Served, is_plain, save_scattered
from tiny import make_llama

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules
from mft.masks.export import save_masks
from mft.vllm.empty_loras import Adapters
from mft.vllm.mask_flips import dropped_places, mask_without
from mft.vllm.slices import Slices
from mft.vllm.slots import Slots
from mft.vllm.task_masks import Tasks
from mft.vllm.token_masks import TokenMasks, masks_by_layer


def base():
    """With small integers, whose sums are exact."""
    model = make_llama()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-3, 4, parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Masks of the tasks code and maths on all layers, and of one on a single part of a fused layer."""
    root = tmp_path_factory.mktemp("exports")
    for seed, task in enumerate(("code", "maths")):
        save_scattered(base, root / task, seed=seed)
    save_masks(one_part(), root / "part")
    return root


def one_part():
    model = mask_model(base(), MaskConfig(keep_ratio=0.9, target_modules=["k_proj"], layers_to_transform=[1]))
    for layer in masked_modules(model).values():
        layer.scores.data = torch.rand(layer.scores.shape, generator=torch.Generator().manual_seed(3)) + 0.1
    return model


@pytest.fixture
def held(root):
    """(served, tasks, masks by layer)"""
    served = Served(base())
    slices = Slices(served, is_plain)
    tasks = Tasks(slices.find)
    tasks.add({task: str(root / task) for task in ("code", "maths", "part")})
    return served, tasks, masks_by_layer(tasks, slices.layer_of)


def test_each_token_takes_the_masks_of_its_task_in_every_layer_and_weights_stay(held):
    served, tasks, masks = held
    before = served.weights()
    numbers = torch.tensor([0, -1, 2, 1, 1, 0, 2, -1])
    layers = [layer for layer in served.children() if layer in masks]
    assert len(layers) == len(list(served.children()))
    wanted, tokens = {}, {layer: torch.randint(-3, 4, (8, layer.weight.shape[1])).float() for layer in layers}
    for number, task in ((-1, None), *enumerate(tasks.names)):
        tasks.use(task)
        wanted |= {(layer, number): F.linear(tokens[layer], layer.weight) for layer in layers}
    tasks.use(None)
    for layer in layers:
        x, bias = tokens[layer], torch.arange(len(layer.weight)).float()
        y = TokenMasks(masks[layer], lambda: numbers, 3).product(x, layer.weight, bias)
        each = [wanted[layer, number][row] for row, number in enumerate(numbers.tolist())]
        assert torch.equal(y, torch.stack(each) + bias)
        shaped = TokenMasks(masks[layer], lambda: numbers, 3).product(x.view(2, 4, -1), layer.weight, None)
        assert torch.equal(shaped, torch.stack(each).view(2, 4, -1))
    assert all(torch.equal(weight, before[name]) for name, weight in served.weights().items())


def test_a_task_has_masks_where_it_masks_a_part(held):
    served, _, masks = held
    assert [2 in masks[layer] for layer in served.children()].count(True) == 1


def test_tokens_without_a_mask_take_the_plain_product(held):
    served, _, masks = held
    layer = next(served.children())
    x = torch.rand(3, layer.weight.shape[1])
    y = TokenMasks({0: masks[layer][0]}, lambda: torch.tensor([1, -1, 2]), 3).product(x, layer.weight, None)
    assert torch.equal(y, F.linear(x, layer.weight))


def test_another_number_of_rows_than_tokens_is_an_error(held):
    served, _, masks = held
    layer = next(served.children())
    with pytest.raises(RuntimeError, match="see each token once .* got 5 rows for 3 tokens: serve this model without"):
        TokenMasks(masks[layer], lambda: torch.tensor([0, 1, 1]), 3).product(
            torch.rand(5, layer.weight.shape[1]), layer.weight, None
        )


def test_a_mask_of_places_in_any_order_drops_them():
    places = np.array([70, 3, 36, 34])
    assert dropped_places(mask_without(places, (3, 35)), (3, 35)).tolist() == [3, 34, 36, 70]


def machinery(ids, indices):
    punica = SimpleNamespace(token_lora_indices=torch.tensor(indices))
    return SimpleNamespace(lora_manager=SimpleNamespace(lora_index_to_id=ids, punica_wrapper_mapping={"all": punica}))


def test_slots_are_tasks_by_the_id_of_their_lora_also_after_they_move():
    model = machinery([7, None, 5], [0, -1, 2, 2])
    slots = Slots(model, {5: 0, 7: 1})
    assert slots.tasks_of_tokens().tolist() == [1, -1, 0, 0]
    model.lora_manager.lora_index_to_id[:] = [5, 7, None]
    model.lora_manager.punica_wrapper_mapping["all"].token_lora_indices = torch.tensor([1, 0])
    assert slots.tasks_of_tokens().tolist() == [1, 0]
    model.lora_manager.lora_index_to_id[2] = 9
    with pytest.raises(RuntimeError, match=r"each LoRA must be a task's with masks per request, got ids \[9\]"):
        slots.tasks_of_tokens()


def test_the_loras_of_tasks_share_one_adapter_of_zeros_that_goes_with_them(root):
    adapters = Adapters({"code": root / "code", "maths": root / "maths"})
    assert adapters.ids == {"code": 1, "maths": 2}
    assert adapters.options["max_loras"] == 2
    path = Path(adapters.path)
    assert sorted(each.name for each in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    del adapters
    assert not path.exists()
