"""The folder for a machine with a GPU and no network: it is complete and small, and names what it lacks."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the GPU suite measures Triton kernels")

from benchmarks.gpu import bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a bundle of this checkout, and its list of what it lacks."""
    root = tmp_path_factory.mktemp("bundle")
    lacks = bundle.write(root / "made")
    return root / "made", lacks


def test_it_holds_sources_tests_and_no_results(folder):
    made, _ = folder
    for name in (
        "Makefile", "setup.py", "mft_kernels/backends/triton/product.py", "python/mft/engines/plain.py",
        "python/mft/memory/known_models/smollm2-135m.json", "benchmarks/gpu/__main__.py", "csrc/cuda/api.h",
        "tests/triton_kernels", "tests/conftest.py",
    ):  # fmt: skip
        assert (made / name).exists(), name
    assert not list(made.rglob("__pycache__"))
    assert not (made / "benchmarks" / "results").exists()
    assert (made / "mft_kernels" / "_build.json").exists() == (bundle.ROOT / "mft_kernels" / "_build.json").exists()
    assert (made / "mft_kernels" / "libmft_cuda.so").exists() == bool(bundle.report("cuda").get("built"))


def test_it_is_small_enough_to_be_carried(folder):
    made, _ = folder
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    assert size < bundle.MOST_BYTES < 64 << 20


def test_it_says_of_which_commit_it_is_and_what_it_lacks(folder):
    made, lacks = folder
    about = json.loads((made / bundle.MANIFEST).read_text())
    assert about["lacks"] == lacks == bundle.lacking(bundle.report("cuda"))
    assert bundle.commit_of(made) == {key: about[key] for key in ("commit", "tree_is_dirty")}
    assert bundle.commit_of(made / "tests") == {}


@pytest.mark.slow
def test_the_suite_runs_from_it_alone(folder, tmp_path):
    made, _ = folder
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--what", "host", "--out", str(tmp_path)]
    environment = {"PATH": "", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONSAFEPATH": ""}
    run = subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    where = json.loads((tmp_path / "gpu-host.json").read_text())["environment"]
    assert where["commit"] == bundle.commit_of(made)["commit"]


def test_what_the_library_lacks_is_said_and_is_the_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, "report", lambda part: {"built": True, "left_out": {}})
    assert bundle.main([str(tmp_path / "made")]) == 0
    assert "WITHOUT" not in capsys.readouterr().out
    monkeypatch.setattr(bundle, "report", lambda part: {"built": True, "left_out": {"score_grad_sm90": "no headers"}})
    assert bundle.main([str(tmp_path / "made")]) == 3
    assert "WITHOUT score_grad_sm90: no headers" in capsys.readouterr().out


def test_what_is_too_large_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bundle, "MOST_BYTES", 1000)
    assert bundle.main([str(tmp_path / "made")]) == 2
    assert "the bundle must be at most 0.001 MB" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match="must be new or an earlier bundle"):
        bundle.write(tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
