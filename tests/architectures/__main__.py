"""Which causal language models of transformers can be masked: make architectures; minutes, writes the table.

Every architecture that transformers names, of its default configuration made small, with random weights. Converted:
with everything kept the logits are the model's own, bit for bit; with a share kept every masked layer's scores get a
gradient; merged, the logits stay within 1e-5 of their largest. What mask_model refuses it refuses by name, and what
transformers cannot make of a small configuration, or run on token ids alone, is not counted.
"""

import copy
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from rich.progress import track
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mft.config import MaskConfig
from mft.masks.convert import mask_model, masked_modules, merge_model

TABLE = Path(__file__).parent.parent / "docs" / "architectures.md"
WORDS = 99
SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts"), 2),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), WORDS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64),
    **{"head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_group": 1, "topk_group": 1},
}
MOST = 30_000_000  # weights: what stays larger than that was not made small
# What another's code may raise on sizes that nobody tried.
THEIRS = (
    *(AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, OSError, RuntimeError, TypeError),
    *(ValueError, ZeroDivisionError, StrictDataclassError),
)


@dataclass
class Row:
    """What became of one architecture: converted, wrong, refused (by us) or not made (by transformers)."""

    kind: str
    state: str
    words: str


def main() -> None:
    """Try all, print what is wrong, write docs/architectures.md."""
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = [attempt(kind) for kind in track(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "architectures")]
    TABLE.write_text(markdown(rows))
    states = ("converted", "wrong", "refused", "not made")
    count = {state: sum(row.state == state for row in rows) for state in states}
    for row in rows:
        if row.state != "converted":
            print(f"{row.state:>9}  {row.kind}: {row.words}")
    print(", ".join(f"{number} {state}" for state, number in count.items()), f"of {len(rows)}: {TABLE}")
    sys.exit(1 if count["wrong"] else 0)


def attempt(kind: str) -> Row:
    ids = torch.randint(3, WORDS, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    try:
        config = shrink(AutoConfig.for_model(kind))
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST:
            return Row(kind, "not made", f"{size} weights at small sizes")
        base = AutoModelForCausalLM.from_config(config).eval()
        expected = logits(base, ids)
    except THEIRS as error:
        return Row(kind, "not made", first_line(error))
    try:
        masked = mask_model(copy.deepcopy(base), MaskConfig(keep_ratio=1.0))
    except ValueError as error:
        return Row(kind, "refused", first_line(error))
    if not torch.equal(logits(masked, ids), expected):
        return Row(kind, "wrong", "with everything kept the logits differ")
    masked = mask_model(copy.deepcopy(base), MaskConfig.paper(keep_ratio=0.7))
    layers, called = masked_modules(masked), set()
    for name, layer in layers.items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    masked(input_ids=ids, use_cache=False).logits.float().square().sum().backward()
    silent = [name for name in called if layers[name].scores.grad is None]
    if silent or not called:
        return Row(kind, "wrong", f"no gradient reached {silent[:3]}")
    found = logits(masked, ids)
    difference = (logits(merge_model(masked), ids) - found).abs().max()
    if not difference <= 1e-5 * found.abs().max():
        return Row(kind, "wrong", f"merging changed the logits by {difference}")
    return Row(kind, "converted", f"{len(layers)} layers: {', '.join(sorted({n.rpartition('.')[2] for n in layers}))}")


def shrink(config):
    """The same configuration with SMALL's sizes, also in the configurations that it holds."""
    for name, value in SMALL.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name))
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: SMALL["num_hidden_layers"]]
    return config


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}"


def markdown(rows: list[Row]) -> str:
    """The table, converted ones first."""
    converted = [row for row in rows if row.state == "converted"]
    refused = [row for row in rows if row.state == "refused"]
    left = [row.kind for row in rows if row.state == "not made"]
    lines = [
        "# Architectures that were converted\n",
        f"By `make architectures` with transformers {transformers.__version__}, in small sizes, with random",
        f"weights: **{len(converted)} converted**, {len(refused)} refused by name. With everything kept the logits are",
        "the model's own, bit for bit; scores get gradients; merged, the logits stay within 1e-5.\n",
        "| architecture | masked by default |\n|---|---|",
        *(f"| {row.kind} | {row.words} |" for row in converted),
        "\n| refused | why |\n|---|---|",
        *(f"| {row.kind} | {row.words.replace('|', ' ')} |" for row in refused),
        f"\nNot made small, or not run on token ids alone ({len(left)}): {', '.join(left)}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
