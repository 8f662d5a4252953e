"""The kernel for the Kernel Hub: the folder that building/hub_kernel.py makes, and loading from it."""

import ast
import copy
import hashlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

import mft_kernels
from building import hub_kernel
from building.compile import TORCH_TARGET, CannotBuild
from mft_kernels import MaskedLinear
from mft_kernels.backends import cpu
from mft_kernels.testing import integer_inputs

ROOT = Path(__file__).parents[2]


def kernels_tool():
    """Return Hugging Face's package, not the tests folder with the same name."""
    pytest.importorskip("kernels._rust", reason="the kernels tool is not installed")
    return importlib.import_module("kernels")


def test_a_kernel_names_the_stable_abi_and_the_licence():
    hexadecimal = TORCH_TARGET.partition("=")[2]
    oldest = f"{int(hexadecimal[2:4], 16)}.{int(hexadecimal[4:6], 16)}"
    assert oldest == hub_kernel.ABI
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == hub_kernel.LICENSE
    assert f"torch>={oldest}" in project["dependencies"]


# ---------------------------------------------------------------------------------------------- the folder


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Return {backend: folder of the variant}."""
    if cpu.unavailable is not None:
        pytest.skip(f"cpu backend: {cpu.unavailable}")
    made = hub_kernel.make(tmp_path_factory.mktemp("hub-kernel"))
    return {metadata(variant)["backend"]["type"]: variant for variant in made}


def metadata(variant):
    return json.loads((variant / "metadata.json").read_text())


def test_a_kernel_imports_itself_relatively_and_torch_triton_and_numpy(variants):
    allowed = {"torch", "triton", "numpy"} | sys.stdlib_module_names
    for path in variants["cpu"].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] in allowed, path


def test_the_ops_are_named_after_the_contents(variants, tmp_path):
    again = hub_kernel.make(tmp_path)
    ids = {metadata(variant)["id"] for variant in again}
    assert ids == {metadata(variant)["id"] for variant in variants.values()}, "the same contents, the same name"
    assert all(re.fullmatch(r"_mft_kernels_(cpu|cuda)_[0-9a-f]{7}", name) for name in ids)

    package = shutil.copytree(hub_kernel.PACKAGE, tmp_path / "mft_kernels")
    with open(package / "ops.py", "a") as file:
        file.write("# another build\n")
    changed = hub_kernel.make(tmp_path, package)
    assert ids.isdisjoint({metadata(variant)["id"] for variant in changed})
    assert set((tmp_path / "build").iterdir()) == set(changed), "of the one before nothing is left"


def test_without_the_library_there_is_no_kernel(tmp_path):
    (tmp_path / "_build.json").write_text('{"cpu": {"built": false, "reason": "no C++ compiler found"}}')
    with pytest.raises(CannotBuild, match="libmft_cpu.so must be built first: no C\\+\\+ compiler found; pip install"):
        hub_kernel.make(tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_kernels_tool_reads_the_metadata_and_the_digest(variants):
    rust = kernels_tool()._rust
    for backend, variant in variants.items():
        found = rust.Metadata.read_from_file(variant / "metadata.json")
        assert (found.id, str(found.name), found.license) == (metadata(variant)["id"], "mft-kernels", "Apache-2.0")
        assert str(found.backend.backend_type) == backend
        found.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))


# ---------------------------------------------------------------------------------------------- loaded


@pytest.fixture(scope="module")
def loaded(variants):
    """Return the CPU's variant, loaded next to the installed package."""
    return load(variants["cpu"])


def load(variant):
    """Load a variant with the kernels tool if it is installed, else in the same way."""
    try:
        from kernels import get_local_kernel
    except ImportError:
        name = metadata(variant)["id"]
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]
    return get_local_kernel(variant)


def test_a_kernel_has_ops_of_its_own_beside_the_installed_package(loaded, variants):
    name, modules = metadata(variants["cpu"])["id"], sys.modules
    assert loaded.masked_linear is not mft_kernels.masked_linear
    assert modules[f"{name}.ops.schema"].library.ns == name
    assert modules[f"{name}.backends.built"].cpu_ops.capability() == torch.ops.mft_cpu.capability()
    for ours, theirs in (
        (modules[f"{name}._ops"].ops, torch.ops.mft),
        (modules[f"{name}.backends.built"].cpu_ops, torch.ops.mft_cpu),
    ):
        assert ours.pack_mask is not theirs.pack_mask
        assert ours.pack_mask._qualified_op_name.startswith(name)
    assert loaded.backend_report()["backends"]["cpu"]["available"]


def test_its_results_are_the_installed_packages_bit_for_bit(loaded):
    found = []
    for package in (mft_kernels, loaded):
        t = integer_inputs(6, 8, 37, torch.bfloat16)
        x, scores = t.x.requires_grad_(), t.scores.requires_grad_()
        threshold = package.kept_threshold(scores, 0.5)
        y = package.masked_linear(x, t.weight, scores, threshold, t.bias)
        y.sum().backward()
        packed = package.pack_mask(scores.detach(), threshold)
        by_bits = package.masked_linear_packed(x.detach(), t.weight, packed, t.bias)
        found.append([threshold, y, x.grad, scores.grad, packed, by_bits])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_kernelize_gives_a_models_layers_the_kernels_forward(loaded, variants):
    kernels = kernels_tool()

    class Masked(MaskedLinear):  # a class made extensible stays so
        pass

    kernels.replace_kernel_forward_from_hub(Masked, "MaskedLinear")
    torch.manual_seed(0)
    model = nn.Sequential(Masked(37, 16, keep_ratio=0.5), nn.GELU(), Masked(16, 4, keep_ratio=0.9))
    own, x = copy.deepcopy(model), torch.randn(5, 37)
    layer = kernels.LocalLayerRepository(variants["cpu"], layer_name="MaskedLinear")
    with kernels.use_kernel_mapping({"MaskedLinear": {"cpu": layer}}, inherit_mapping=False):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    for module in (model[0], model[2]):
        assert module.forward.__func__ is loaded.layers.MaskedLinear.forward

    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    outputs, gradients = [], []
    for one in (own, model, compiled):
        outputs.append(one(x))
        outputs[-1].square().sum().backward()
        gradients.append([p.grad for p in one.parameters() if p.requires_grad])
    for got, grads in zip(outputs[1:], gradients[1:]):
        assert torch.equal(got, outputs[0])
        assert len(grads) == 2
        assert all(torch.equal(a, b) for a, b in zip(grads, gradients[0]))


def hub_cache(folder, repo_id, variant):
    """Lay out a cache as huggingface_hub does: links to files that are named by their contents."""
    commit = hashlib.sha1(variant.name.encode()).hexdigest()
    repository = folder / f"kernels--{repo_id.replace('/', '--')}"
    for path in variant.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            link = repository / "snapshots" / commit / "build" / variant.name / path.relative_to(variant)
            for parent in (blob.parent, link.parent):
                parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / f"v{hub_kernel.VERSION}").write_text(commit)


@pytest.mark.slow
def test_the_page_is_followed_with_a_kernel_from_the_hubs_cache(variants, tmp_path):
    kernels_tool()
    page = (ROOT / "docs" / "how-to" / "kernel-hub.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (repo_id,) = set(re.findall(r'"(\w+/mft-kernels)"', page))
    hub_cache(tmp_path, repo_id, variants["cpu"])
    (tmp_path / "page.py").write_text("\n".join(blocks))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-W", "error::UserWarning", "page.py"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
