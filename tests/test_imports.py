"""Imports run downward only: draws the lines of the architecture from the sources and fails when one is crossed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import those on lines above its own, and none on its own line.
KERNEL_LAYERS = (
    ("eager", "fixed_point", "processor", "reference", "testing", "timing"),
    ("reference_step",),
    ("autotune", "backends", "built", "checks", "direct", "library", "maskable"),
    ("cpu_choice",),
    ("ops", "cpu", "cuda", "scores", "step", "triton"),
    ("held", "masking", "optim"),
    ("linear",),
    ("__init__",),
)
TRITON_LAYERS = (
    ("target", "tiles"),
    ("launch",),
    ("bits", "choice", "plan", "select"),
    ("arguments",),
    ("product", "score_grad", "scratch"),
    ("backward",),
    ("ops", "score_step"),
    ("__init__",),
)
# Of mft_kernels: a kernel knows no sibling.
KERNELS_MAY_IMPORT = {"autotune", "backends", "reference", "reference_step"}
RECIPE_LAYERS = (
    (
        *("atomic", "banked_linear", "checkpointing", "choices", "clones", "console", "corpus"),
        *("header_corpus", "hub", "moving", "next_tokens", "problems", "progress", "quantized_weight", "randomness"),
        *("regular_file", "run_lock", "simulate", "step_errors", "step_report", "token_loss"),
        *("weight_readers", "yaml_file"),
    ),
    ("cache", "json_file", "measure"),
    ("gguf_file", "safetensors_file"),
    ("batches", "checkpoint", "fetch", "fields", "linears", "record_files", "saved_modules", "shapes"),
    ("activations", "causal_lm", "config", "export_file", "lora", "model_config", "setting", "harness"),
    (
        *("distributed", "layer_calls", "master_weights", "models", "prefix", "records", "run_directory"),
        *("score_states", "step_time", "targets"),
    ),
    ("convert", "estimate", "examples", "layer_engine"),
    ("answers", "bases", "choice", "inspection", "layerwise", "peft_layer", "plain", "rows"),
    ("engines", "estimate_report", "one_shot", "training_state"),
    ("saver",),
    ("evaluate",),
    ("export", "mask_cost", "recipe", "surface", "temperature"),
    (
        *("data", "fit", "flips", "mask_bank", "overlap", "paper_masks", "peft_method", "quantized", "recorder"),
        *("tuning", "verify"),
    ),
    ("compare", "lm_eval_model", "resume", "sensitivity", "simulated_step", "study"),
    ("plots",),
    ("report",),
    ("demo", "mask_verbs", "verbs"),
    ("cli", "demo_grid"),
    ("__init__",),
)
STUDY_LAYERS = (
    ("declared", "environment", "shown"),
    ("ablate", "bench", "from_scratch", "load", "outcome"),
    ("arms", "plan", "statistics"),
    ("store", "table", "workers"),
    ("figures", "plots", "run", "verdict"),
    ("report",),
    ("verbs",),
    ("__init__",),
)
EXTERNAL = {"torch", "triton", "numpy"}  # all that mft_kernels may import besides the standard library


def imports(path: Path, package: str) -> tuple[set[str], set[str]]:
    """(modules of ``package``, top-level names of others) that a file imports, wherever in it.

    What comes from the package above is named with a dot before it.
    """
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            own |= {"." * (node.level - 1) + name for name in names}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name.startswith(f"{package}."):
                    own.add(name.removeprefix(f"{package}.").split(".")[0])
                elif name == package and isinstance(node, ast.ImportFrom):
                    own |= {alias.name for alias in node.names}
                else:
                    others.add(name.split(".")[0])
    return own, others


def crossings(folder: Path, package: str, layers: tuple[tuple[str, ...], ...]) -> list[str]:
    """Every import that does not run downward, and every module that no layer names."""
    rank = {name: i for i, layer in enumerate(layers) for name in layer}
    found = []
    for path in sorted(folder.glob("*.py")):
        module = path.stem
        if module not in rank:
            found.append(f"{path.name} stands in no layer")
            continue
        for imported in imports(path, package)[0] & rank.keys():
            if rank[imported] >= rank[module]:
                found.append(f"{module} imports {imported}")
    return found


def test_the_kernel_package_imports_downward():
    assert crossings(ROOT / "mft_kernels", "mft_kernels", KERNEL_LAYERS) == []


def test_the_triton_kernels_import_downward_and_no_sibling():
    folder = ROOT / "mft_kernels" / "triton"
    assert crossings(folder, "mft_kernels.triton", TRITON_LAYERS) == []
    for path in folder.glob("*.py"):
        above = {name[1:] for name in imports(path, "mft_kernels.triton")[0] if name.startswith(".")}
        assert above <= KERNELS_MAY_IMPORT, path
        assert not any("mft_kernels" in name for name in imports(path, "mft_kernels.triton")[1]), path


def test_the_recipe_imports_downward():
    assert crossings(ROOT / "python" / "mft", "mft", RECIPE_LAYERS) == []


def test_the_study_imports_downward():
    assert crossings(ROOT / "python" / "mft" / "study", "mft.study", STUDY_LAYERS) == []


def test_the_kernel_package_needs_torch_triton_and_numpy_alone():
    for path in (ROOT / "mft_kernels").rglob("*.py"):
        _, others = imports(path, "mft_kernels")
        assert others <= EXTERNAL | set(sys.stdlib_module_names), path


def test_a_crossed_line_is_found(tmp_path):
    (tmp_path / "low.py").write_text("def f():\n    from .high import g\n")
    (tmp_path / "high.py").write_text("import kernels.low\nfrom kernels import low\n")
    (tmp_path / "new.py").write_text("")
    assert crossings(tmp_path, "kernels", (("low",), ("high",))) == ["low imports high", "new.py stands in no layer"]


@pytest.mark.parametrize("module", ["transformers", "datasets", "yaml", "typer", "matplotlib"])
def test_importing_the_kernels_loads_nothing_of_the_recipe(module):
    code = f"import sys, mft_kernels; assert {module!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
