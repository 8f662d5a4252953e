"""Each extra of pyproject.toml suffices for its purpose: packages that it does not bring are hidden."""

import importlib.metadata as metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OF_THE_CHECKOUT = {"dev", "cuda-build", "docs"}  # for work on the checkout: no user installs only these

HIDE = """
import re, sys
from importlib.machinery import PathFinder

class Brought:  # what an installation of the extra alone would find
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else PathFinder.find_spec(name, path, target)

    def find_distributions(context):
        for found in PathFinder.find_distributions(context):
            if re.sub("[-_.]+", "-", found.metadata["Name"]).lower() in {brought!r}:
                yield found

sys.meta_path[sys.meta_path.index(PathFinder)] = Brought
"""
MODEL = """
import torch, mft
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, pad_token_id=0))
ids = torch.arange(12)[None]
"""
USES = {
    None: """
import torch, mft_kernels
layer = mft_kernels.MaskedLinear.from_linear(torch.nn.Linear(8, 8))
layer(torch.randn(2, 8)).sum().backward()
assert layer.scores.grad.shape == (8, 8)
from mft.cli.command import main
try:
    main()
except SystemExit as error:
    assert error.code == 2
""",
    "train": f"""
{MODEL}
model = mft.mask_model(model, mft.MaskConfig())
model(input_ids=ids, labels=ids).loss.backward()
mft.save_masks(model, "masks")
sys.path.append({str(ROOT / "tests")!r})
from tiny_gguf import write_tiny_gguf
write_tiny_gguf("tiny.gguf")
mft.load_model("tiny.gguf")
sys.argv[1:] = ["recode", "masks", "rice"]
from mft.cli.command import main
main()
""",
    "quantized": f"""
{MODEL}
mft.mask_model(model, mft.MaskConfig(target_modules=["q_proj"]))
mft.quantize_model(model, "nf4")
model(input_ids=ids, labels=ids).loss.backward()
""",
    "compare": f"""
{MODEL}
from mft_study.peft_methods import add_adapter, lora_options
adapted = add_adapter(model, ["model.layers.0.mlp.up_proj"], lora_options(8))
adapted(input_ids=ids, labels=ids).loss.backward()
import mft_study.study_run
""",
    "peft": f"""
{MODEL}
import peft, mft.masks.peft
model = peft.get_peft_model(model, mft.MaskPeftConfig())
model(input_ids=ids, labels=ids).loss.backward()
model.save_pretrained("adapter")
""",
    "trl": f"""
{MODEL}
import peft, mft.masks.peft
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
words = Tokenizer(models.WordLevel({{"<end>": 0, "a": 1}}, unk_token="<end>"))
words = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
rows = Dataset.from_dict({{"input_ids": [list(range(1, 9))] * 4}})
settings = SFTConfig("run", max_steps=1, report_to="none", use_cpu=True, save_strategy="no", bf16=False)
SFTTrainer(model, settings, train_dataset=rows, processing_class=words, peft_config=mft.MaskPeftConfig()).train()
""",
    "lm-eval": """
import mft.evaluation.lm_eval_model
from mft.evaluation.lm_eval_tasks import load_tasks
try:
    load_tasks(["no-task"])
except ValueError as error:
    assert "no-task" in str(error)
""",
    "serve": """
import mft.serving.launch
sys.argv[1:] = ["serve", "no-masks-here"]
from mft.cli.command import main
try:
    main()
except SystemExit as error:
    assert error.code == 2
""",
    "ray": """
from mft_study.shared.on_ray import start_on_ray
""",
    "trackers": """
from pathlib import Path
from mft.tracking.trackers import Trackers, check_trackers
check_trackers(["tensorboard", "trackio"])
Trackers(["tensorboard"], Path("."), "project", {}, None, print).close()
""",
}


def brought_by(extra, name=None, found=None):
    """Return the distributions of an install with only this extra: {name: extras}."""
    found = {} if found is None else found
    name, extras = name or PROJECT["name"], frozenset({extra} if isinstance(extra, str) else extra or ())
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found and extras <= found[key]:
        return found
    found[key] = found.get(key, frozenset()) | extras
    needs = requirements(extras) if name == PROJECT["name"] else installed_requirements(name)
    for need in map(Requirement, needs):
        if need.marker is None or any(need.marker.evaluate({"extra": e}) for e in {*found[key], ""}):
            brought_by(need.extras, need.name, found)
    return found


def requirements(extras):
    """Return this project's requirements from its file, because an installed checkout may be older."""
    return [*PROJECT["dependencies"], *(need for extra in extras for need in PROJECT["optional-dependencies"][extra])]


def installed_requirements(name):
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []  # for another system, or for an extra that only a checkout has


def test_every_extra_is_driven():
    assert set(USES) - {None} == set(PROJECT["optional-dependencies"]) - OF_THE_CHECKOUT


@pytest.mark.slow
@pytest.mark.parametrize("extra", USES)
def test_an_extra_alone_is_enough(extra, tmp_path):
    brought = brought_by(extra)
    hidden = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in distributions} & set(brought)
    }
    assert ("transformers" in hidden) == (extra is None)
    assert "pytest" in hidden
    code = HIDE.format(hidden=hidden, brought=set(brought)) + USES[extra]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
