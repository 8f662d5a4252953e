"""The table of backends: explicit requests never fall back, and the report gives the reason."""

import pytest
import torch

import mft_kernels
from mft_kernels.backends import table as backends
from mft_kernels.codes import Nf4
from mft_kernels.testing import integer_inputs


def test_the_environment_variable_chooses_and_is_named_in_errors(monkeypatch):
    t = integer_inputs(2, 3, 4)
    monkeypatch.setenv("MFT_KERNELS", "cuda")
    with pytest.raises(RuntimeError, match="MFT_KERNELS='cuda' cannot serve"):
        mft_kernels.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0))
    monkeypatch.setenv("MFT_KERNELS", "reference")
    assert mft_kernels.masked_linear(t.x, t.weight, t.scores, torch.tensor(1.0)).shape == (2, 3)


def of_strangers(name="mine", **options):
    return backends.Backend(name, frozenset({"cpu"}), frozenset(), {"select": print}, **options)


CPU, FLOATS = torch.device("cpu"), (torch.float32,)


@pytest.mark.parametrize("name", backends.PREFERENCE)
def test_a_name_is_registered_once(name, own_table):
    with pytest.raises(ValueError, match=f"backend '{name}' is registered already; take another name"):
        backends.register(of_strangers(name))
    backends.register(of_strangers())
    with pytest.raises(ValueError, match="backend 'mine' is registered already"):
        backends.register(of_strangers())


def test_a_backend_from_outside_is_taken_where_it_is_asked_for(own_table, monkeypatch):
    backends.register(of_strangers(detail="my own"))
    assert backends.choose("select", CPU, FLOATS) is not print
    assert backends.choose("select", CPU, FLOATS, "mine") is print
    with pytest.raises(RuntimeError, match="backend='mine' cannot serve pack: it has no pack"):
        backends.choose("pack", CPU, FLOATS, "mine")
    report = mft_kernels.backend_report()
    assert report["backends"]["mine"] == {"available": True, "detail": "my own", "reason": None}
    assert report["auto"]["cpu"] != "mine"
    monkeypatch.setenv("MFT_KERNELS", "mine")
    assert backends.choose("select", CPU, FLOATS) is print


def test_a_refused_request_names_the_backend_that_auto_would_take(own_table):
    """MFT_KERNELS=cuda for a function that only Triton has, on a GPU."""
    gpus = frozenset({"cuda"})
    for name, function in (("cuda", "select"), ("triton", "pack")):
        backends._TABLE[name] = backends.Backend(name, gpus, frozenset(), {function: print})
    with pytest.raises(RuntimeError, match="backend='cuda' cannot serve pack: it has no pack; use 'auto' or 'triton'"):
        backends.choose("pack", torch.device("cuda"), FLOATS, "cuda")


def test_auto_asks_a_backend_from_outside_that_has_a_place(own_table):
    others = backends.choose("pack", CPU, FLOATS)
    assert backends.choose("select", CPU, FLOATS) is not print  # this choice must not survive the registration
    backends.register(of_strangers("theirs"), before="reference")
    backends.register(of_strangers(), before="cpu")
    assert list(mft_kernels.backend_report()["backends"]) == ["cuda", "triton", "mine", "cpu", "theirs", "reference"]
    assert backends.choose("select", CPU, FLOATS) is print
    assert backends.choose("pack", CPU, FLOATS) is others


@pytest.mark.parametrize(
    ("backend", "before", "message"),
    [
        (of_strangers("auto"), None, "name of a backend must not be empty or 'auto', got 'auto'"),
        (of_strangers(""), None, "name of a backend must not be empty or 'auto', got ''"),
        (of_strangers(), "cpus", r"before must be a backend that auto tries, one of \('cuda', .*\), got 'cpus'"),
        (
            backends.Backend("mine", frozenset(), frozenset(), {"packs": print, "pack": print}),
            None,
            r"functions of 'mine' must be among \('product', .*\), got packs$",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused_and_leaves_nothing(own_table, backend, before, message):
    with pytest.raises(ValueError, match=message):
        backends.register(backend, before=before)
    assert list(mft_kernels.backend_report()["backends"]) == list(backends.PREFERENCE)


def test_a_backend_says_why_it_refuses():
    backend = backends.Backend("cpu", frozenset({"cpu"}), frozenset({torch.float32}), {"product": print})
    cpu, floats = torch.device("cpu"), (torch.float32,)
    assert backend.refusal("product", cpu, floats) is None
    assert backend.refusal("pack", cpu, floats) == "it has no pack"
    assert backend.refusal("gradients", cpu, floats) == "it has no score_grad"
    assert backend.refusal("product", cpu, floats, frozenset({Nf4})) == "its product takes no Nf4"
    assert "runs on cpu, got a tensor on meta" in backend.refusal("product", torch.device("meta"), floats)
    assert "takes float32, got float64" in backend.refusal("product", cpu, (torch.float64,))


def test_the_report_names_every_backend_and_what_auto_chooses():
    report = mft_kernels.backend_report()
    assert list(report["backends"]) == list(backends.PREFERENCE)
    for row in report["backends"].values():
        assert row["available"] == (row["reason"] is None)
    assert report["backends"]["reference"]["available"]
    assert report["backends"][report["auto"]["cpu"]]["available"]


def test_auto_takes_a_backends_own_choice_and_a_request_its_plain_function(monkeypatch):
    def plain():
        pass

    def chosen():
        pass

    backend = backends.Backend(
        "cpu", frozenset(), frozenset(), {"pack": plain, "signs": plain}, automatic={"pack": chosen}
    )
    monkeypatch.setattr(backends, "_TABLE", {"cpu": backend})
    monkeypatch.setattr(backends, "_chosen", {})
    cpu, floats = torch.device("cpu"), (torch.float32,)
    assert backends.choose("pack", cpu, floats) is chosen
    assert backends.choose("signs", cpu, floats) is plain
    assert backends.choose("pack", cpu, floats, "cpu") is plain
