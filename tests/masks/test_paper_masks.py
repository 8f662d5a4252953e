"""masks.pt of the paper's code: what is read, what is refused, and that it can be written and read back."""

import zipfile

import pytest
import torch
from tiny import make_llama, masked_llama

from mft.masks.convert import masked_modules
from mft.masks.paper_masks import import_paper_masks, read_paper_masks, write_paper_masks

UP = "model.layers.2.mlp.up_proj"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_go_out_and_come_back(tmp_path, dtype):
    model = masked_llama(dtype=dtype, keep_ratio=0.7)
    write_paper_masks(model, tmp_path / "masks.pt")
    stored = torch.load(tmp_path / "masks.pt", weights_only=True)  # as the paper's code multiplies
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
        ({}, "expected a dictionary of masks, got dict of 0 entries"),
        ({1: torch.ones(64, 32)}, "expected modules' names as keys, got 1"),
        ({UP: 3}, rf"{UP} must be a dense matrix \(N, K\), got int"),
        ({UP: torch.ones(64)}, rf"{UP} must be a dense matrix \(N, K\), got Tensor of shape \(64,\)"),
        ({UP: torch.full((64, 32), torch.nan)}, f"{UP} must hold ones and zeros, got 2048 other values, nan among"),
        (
            dict.fromkeys(("a", "b", "c", "d"), torch.ones(64, 32)),
            r"expected every value of every mask in the file, got \d+ bytes for masks of 32768",
        ),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "masks.pt")
    with pytest.raises(ValueError, match=f"masks.pt: {message}"):
        read_paper_masks(tmp_path / "masks.pt")


class Calls:
    """A pickle can call a function when it is read."""

    def __init__(self, function, argument):
        self.made = function, (argument,)

    def __reduce__(self):
        return self.made


@pytest.mark.filterwarnings("ignore:.*nested tensors.*", "ignore:Sparse CSR")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        lambda: torch.ones(64, 32).to_sparse(),
        lambda: torch.ones(64, 32).to_sparse_csr(),
        lambda: torch.ones(64, 32, dtype=torch.complex64),
        lambda: torch.ones(64, 32, dtype=torch.uint16),
        lambda: Calls(bytearray, 17 * 10**9),
    ],
)
def test_what_is_no_dense_tensor_is_refused_before_it_is_made(tmp_path, make):
    torch.save({UP: make()}, tmp_path / "masks.pt")
    message = (
        r"masks.pt: expected a dictionary of tensors saved by torch, got a file with: '.*', which no dictionary of"
    )
    with pytest.raises(ValueError, match=message):
        read_paper_masks(tmp_path / "masks.pt")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_file_that_is_small_because_it_is_compressed_is_refused(tmp_path, compression):
    torch.save({UP: torch.ones(64, 32)}, tmp_path / "masks.pt")
    with zipfile.ZipFile(tmp_path / "masks.pt") as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "masks.pt", "w", compression) as archive:
        for name, record in content.items():
            archive.writestr(name, record)
    with pytest.raises(ValueError, match="masks.pt: .* got a file with: compressed entries, which torch does"):
        read_paper_masks(tmp_path / "masks.pt")


def test_a_file_of_torch_before_1_6_is_refused(tmp_path):
    torch.save({UP: torch.ones(64, 32)}, tmp_path / "masks.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="masks.pt: .* got a file with: File is not a zip file"):
        read_paper_masks(tmp_path / "masks.pt")


def test_transposed_masks_and_parameters_are_read(tmp_path):
    mask = (torch.arange(12).reshape(3, 4) % 5 > 1).float()
    torch.save({"a": mask.t(), "b": torch.nn.Parameter(mask.clone())}, tmp_path / "masks.pt")
    read = read_paper_masks(tmp_path / "masks.pt")
    assert torch.equal(read["a"], mask.t() == 1)
    assert torch.equal(read["b"], mask == 1)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, capsys):
    torch.save({UP: Calls(print, "run")}, tmp_path / "masks.pt")
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
