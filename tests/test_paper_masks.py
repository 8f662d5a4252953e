"""masks.pt of the paper's code: what is read, what is refused, and that it comes back."""

import pytest
import torch
from tiny import make_llama, masked_llama

from mft.convert import masked_modules
from mft.paper_masks import import_paper_masks, read_paper_masks, write_paper_masks

UP = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_go_out_and_come_back(tmp_path, dtype):
    model = masked_llama(dtype=dtype, keep_ratio=0.7)
    write_paper_masks(model, tmp_path / "masks.pt")
    stored = torch.load(tmp_path / "masks.pt", weights_only=True)  # as the paper's code multiplies weights with
    masked = masked_modules(model)
    assert stored.keys() == masked.keys()
    for name, module in masked.items():
        assert stored[name].dtype == module.weight.dtype
        assert torch.equal(stored[name], module.mask().to(dtype))
    fresh = import_paper_masks(make_llama(dtype), tmp_path / "masks.pt")
    assert all(torch.equal(module.mask(), masked[name].mask()) for name, module in masked_modules(fresh).items())
    ids = torch.arange(1, 9).view(1, -1)
    assert torch.equal(fresh(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(64, 32)], r"expected a dictionary of masks, got list of 1 entries"),
        ({}, "expected a dictionary of masks, got dict of 0 entries"),
        ({1: torch.ones(64, 32)}, "expected modules' names as keys, got 1"),
        ({UP: 3}, rf"{UP} must be a dense matrix \(N, K\), got int"),
        ({UP: torch.ones(64)}, rf"{UP} must be a dense matrix \(N, K\), got Tensor of shape \(64,\)"),
        ({UP: torch.ones(64, 32).to_sparse()}, f"{UP} must be a dense matrix"),
        ({UP: torch.full((64, 32), 0.5)}, f"{UP} must hold ones and zeros, got 2048 other values, 0.5 among them"),
        ({UP: torch.full((64, 32), torch.nan)}, f"{UP} must hold ones and zeros, got 2048 other values, nan among"),
        ({UP: torch.ones(64, 32, dtype=torch.complex64)}, f"{UP} must hold ones and zeros, got torch.complex64"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "masks.pt")
    with pytest.raises(ValueError, match=f"masks.pt: {message}"):
        read_paper_masks(tmp_path / "masks.pt")


class Runs:
    """What a pickle may make: a call."""

    def __reduce__(self):
        return print, ("run",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, capsys):
    torch.save({UP: Runs()}, tmp_path / "masks.pt")
    with pytest.raises(ValueError, match=r"masks.pt: expected a dictionary of tensors saved by torch"):
        read_paper_masks(tmp_path / "masks.pt")
    assert "run" not in capsys.readouterr().out.split()


def test_masks_that_do_not_fit_leave_the_model_as_it_was(tmp_path):
    model = make_llama()
    for content, message in (
        ({UP: torch.ones(32, 64)}, rf"{UP}: the mask is for a weight of \(32, 64\), the model's is \(64, 32\)"),
        ({"model.layers.9.mlp.up_proj": torch.ones(64, 32)}, "model.layers.9.mlp.up_proj"),
    ):
        torch.save(content, tmp_path / "masks.pt")
        with pytest.raises(ValueError, match=message):
            import_paper_masks(model, tmp_path / "masks.pt")
        assert not masked_modules(model)


def test_a_missing_file_and_a_plain_model_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none.pt: expected the masks.pt of the paper's code, got nothing there"
    ):
        read_paper_masks(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="model has no masked layers to save"):
        write_paper_masks(make_llama(), tmp_path / "masks.pt")
    assert list(tmp_path.iterdir()) == []
