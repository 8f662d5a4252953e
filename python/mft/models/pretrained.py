"""Load a causal language model from a directory, a GGUF file or the Hub. Save it so that transformers can load it."""

import copy
import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from mft.checks import nearest, nearest_path
from mft.config import ModelConfig
from mft.files.atomic import atomic_directory
from mft.files.cache import cache_root, sha256_of
from mft.files.gguf_file import MAGIC, read_gguf_header
from mft.files.hub import HubError, hub_is_reachable
from mft.files.json_file import read_object
from mft.files.regular_file import check_regular, open_regular, read_regular
from mft.files.safetensors_file import check_header
from mft.models.claims import check_layers, check_parameters
from mft.models.hub_model import fetch_model
from mft.models.next_tokens import check_next_tokens
from mft.models.smollm2 import GGUF_SHA256, fetch_smollm2
from mft.models.weight_files import WeightFiles, are_readable, quiet_progress

logger = logging.getLogger(__name__)

TEMPLATES = Path(__file__).with_name("templates")

SHORTHANDS = ("smollm2-135m",)
# Files that save_pretrained and a Hub snapshot write. save_model replaces a directory that holds nothing else.
MODEL_FILES = re.compile(r".*\.safetensors|.*\.json|.*\.jinja|.*\.model|merges\.txt|.*\.md|\.gitattributes|LICENSE.*")
_CONFIG = "config.json"
# JSON files of a model's directory that transformers assumes to hold an object.
_OBJECTS = (
    *(_CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # for transformers
_MOST_JSON = 1 << 28  # bytes: a tokenizer of 262,144 tokens has 33 MB
_MOST_TEMPLATE = 1 << 20  # bytes: a hundred times the longest template of published models
# Errors that transformers raises for well-formed files whose values it cannot use.
_UNREADABLE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError),
    *(ValueError, SafetensorError, StrictDataclassError),
)


def load_model(config: ModelConfig | str, *, sequence_length: int | None = None) -> tuple[Any, Any]:
    """Load (model, tokenizer): in config.dtype, on the CPU, in eval mode. pad = eos if the tokenizer has no pad token.

    config: a string is the name, with the defaults of ModelConfig (bfloat16). A GGUF file is dequantised once, and kept
    in the cache as an ordinary model directory. sequence_length: of the rows to be read; checked before loading.
    Raises: ValueError if config.name is no causal language model, or cannot be reached; it says what to do.
    """
    config = ModelConfig(config) if isinstance(config, str) else config
    return _load_named(config, partial(_load, sequence_length=sequence_length), weights=True)


def load_tokenizer(config: ModelConfig, *, sequence_length: int | None = None) -> Any:
    """Load the tokenizer of load_model without the model. Raises as load_model, except for errors about weights."""
    return _load_named(config, partial(_load_tokenizer, sequence_length=sequence_length))


def load_unread(config: ModelConfig) -> tuple[Any, Any]:
    """Load as load_model, but leave the weights in their files: parameters are on the meta device, buffers are real.

    weight_files(model) reads them. A model in another format, such as a quantised one, is loaded as load_model does.
    """
    return _load_named(config, partial(_load, sequence_length=None, unread=True), weights=True)


def load_outline(config: ModelConfig) -> Any:
    """Build the model of load_model on the meta device: modules and shapes only. No weight is read."""
    return _load_named(config, _load_outline)


def smollm2_directory(dtype: str = "bfloat16") -> Path:
    """Return the cached model directory of SmolLM2-135M-Instruct. The first call fetches and dequantises it."""
    return _dequantised(None, GGUF_SHA256, dtype)


def save_model(
    model: Any, tokenizer: Any, directory: str | os.PathLike, *, beside: Mapping[str, str] | None = None
) -> Path:
    """Write model and tokenizer for from_pretrained(directory), and the texts of beside by file name.

    An existing model directory is replaced; one that holds anything else is refused.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"directory must be a directory, got the file {target}")
    present = [entry.name for entry in target.iterdir()] if target.exists() else []
    foreign = [name for name in present if not MODEL_FILES.fullmatch(name)]
    if foreign:
        raise ValueError(
            f"directory must be new, empty or a model's, got {target} with "
            f"{', '.join(sorted(foreign)[:3])}: choose another one"
        )
    masked = [key for key, _ in model.named_parameters() if key.endswith(".scores")]
    if masked:
        raise ValueError(
            f"model must be merged before it is saved, got {len(masked)} masked layers such as "
            f"{masked[0].removesuffix('.scores')}: call merge_model(model) first"
        )
    _forget_gguf(model)
    with atomic_directory(target) as scratch, quiet_progress():
        model.save_pretrained(scratch)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, scratch)
        for name, text in (beside or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
    return target


def _load_named(config: ModelConfig, load: Callable[[str, ModelConfig], Any], *, weights: bool = False) -> Any:
    """Return load(directory, config) for config.name's directory. weights: whether to fetch the Hub's weights too."""
    name = config.name
    path = Path(name)
    if config.revision is not None and (name in SHORTHANDS or path.exists()):
        raise ValueError(
            f"model.revision must be null for a model on this machine, which has one state, got {config.revision!r} "
            f"for {name!r}: leave it out, or name a hub id"
        )
    if name in SHORTHANDS:
        source = smollm2_directory(config.dtype)
    elif path.is_dir():
        source = _model_directory(path)
    elif path.exists():
        source = _dequantised(path, _gguf_hash(path), config.dtype)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith((".gguf", ".safetensors", "/")):
        raise ValueError(
            f"model.name must be a model that exists, got {name!r}: no such file or directory{nearest_path(path)}"
        )
    else:
        return _load_from_hub(config, load, weights=weights)
    return load(str(source), config)


@contextmanager
def _convert_errors(config: ModelConfig, what: str) -> Iterator[None]:
    """Turn transformers' errors into a ValueError that names the model."""
    with refuse_unreadable(f"model.name {config.name!r} cannot be loaded as a {what}"), quiet_progress():
        yield


def _load_tokenizer(source: str, config: ModelConfig, *, sequence_length: int | None) -> Any:
    with _convert_errors(config, "model"):
        architecture = transformers.AutoConfig.from_pretrained(source, **LOCAL)
    check_next_tokens(architecture, config.name, sequence_length)
    with _convert_errors(config, "tokenizer"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **LOCAL)
    if config.chat_template is not None:
        tokenizer.chat_template = read_chat_template(config.chat_template)
    return _padding(tokenizer, config.name)


def _load_outline(source: str, config: ModelConfig) -> Any:
    with _convert_errors(config, "causal language model"):
        return outline_of(transformers.AutoConfig.from_pretrained(source, **LOCAL), config.dtype)


def outline_of(settings: Any, dtype: str, **attention: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, dtype), trust_remote_code=False, **attention
        )


def _load(source: str, config: ModelConfig, *, sequence_length: int | None, unread: bool = False) -> tuple[Any, Any]:
    tokenizer = _load_tokenizer(source, config, sequence_length=sequence_length)
    stored = sum(path.stat().st_size for path in Path(source).glob("*.safetensors"))
    if stored:  # if there are none, transformers reports it
        check_parameters(_load_outline(source, config), stored, config.name)
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    model: Any
    info: Any
    what = " ".join(["causal language model", *(f"with {key}={value!r}" for key, value in attention.items())])
    with _convert_errors(config, what):
        settings = transformers.AutoConfig.from_pretrained(source, **LOCAL) if unread else None
        if settings is not None and are_readable(settings, Path(source)):
            model, other = (outline_of(copy.deepcopy(settings), config.dtype, **attention) for _ in range(2))
            info = {"missing_keys": WeightFiles(model, other, Path(source), getattr(torch, config.dtype)).missing}
        else:
            model, info = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
                source,
                dtype=getattr(torch, config.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **attention,
                **LOCAL,
            )
    _check_whole(model, info, config.name)
    return _prepared(model, tokenizer, config.name)


def read_chat_template(name: str) -> str:
    """Read a shipped chat template ("tulu") or a Jinja file. Its text is also saved with the tokenizer."""
    shipped = {path.stem: path for path in TEMPLATES.glob("*.jinja")}
    path = shipped.get(name, Path(name))
    if not path.exists():
        raise ValueError(
            f"model.chat_template must be {' or '.join(shipped)}, or a Jinja file that exists, got {name!r}"
            f"{nearest(name, shipped) or nearest_path(path)}"
        )
    try:
        return read_regular(path, _MOST_TEMPLATE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: model.chat_template must be UTF-8 text, byte {error.start} is not") from None


def _check_whole(model: Any, info: dict[str, Any], name: str) -> None:
    """Raise ValueError if weights were missing, because transformers would initialise them itself."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"model.name {name!r} must hold every weight of a {type(model).__name__}, "
            f"{len(missing)} are missing, such as {missing[0]}: is it a causal language model?"
        )


def _padding(tokenizer: Any, name: str) -> Any:
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.name {name!r} must have a tokenizer with an end-of-sequence token, got none")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _prepared(model: Any, tokenizer: Any, name: str) -> tuple[Any, Any]:
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise ValueError(
            f"model.name {name!r} must embed every token of its tokenizer, got {len(tokenizer)} tokens "
            f"and {model.get_input_embeddings().num_embeddings} embeddings"
        )
    model.config.__dict__.pop("_model_name_or_path", None)  # a title from GGUF metadata, not a name to load by
    model.config._name_or_path = name
    return model.eval(), tokenizer


def _load_from_hub(config: ModelConfig, load: Callable[[str, ModelConfig], Any], *, weights: bool) -> Any:
    name = config.name
    hint = nearest(name.rpartition("/")[2], SHORTHANDS)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"model.name must be {', '.join(SHORTHANDS)}, a directory, a *.gguf file or a hub id, got {name!r}{hint}"
        )
    online = hub_is_reachable()
    revision = "" if config.revision is None else f" at model.revision {config.revision!r}"
    try:
        source = fetch_model(name, config.revision, weights=weights, online=online)
        return load(str(_model_directory(source)), config)
    except (HubError, ValueError) as error:
        if not online and (isinstance(error, HubError) or isinstance(error.__cause__, OSError)):
            raise ValueError(
                f"model.name {name!r}{revision} is neither {' nor '.join(SHORTHANDS)}, nor a file or directory here, "
                "nor a model in the hub's local cache, and the hub cannot be reached: check the name and the "
                f"network, or give a local directory{hint}"
            ) from error
        named = f"model.name {name!r}{revision} cannot be loaded: " if isinstance(error, HubError) else ""
        raise ValueError(f"{named}{error}{hint}") from error


def _dequantised(gguf: Path | None, digest: str, dtype: str) -> Path:
    """Return the cached directory of this GGUF file in this dtype. gguf None: SmolLM2, which is fetched if needed."""
    target = cache_root() / "models" / f"{digest[:16]}-{dtype}"
    if target.is_dir():
        return target
    gguf = gguf or fetch_smollm2()
    logger.warning("dequantising %s to %s, once; kept in %s", gguf.name, dtype, target)
    begin = time.monotonic()
    # A whole path: transformers takes the weights of a file of this name in the working directory before those of gguf.
    options = {**LOCAL, "gguf_file": str(gguf.absolute())}
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions may keep weights packed in layers other than nn.Linear
        dense = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model: Any
    info: Any
    refusal = f"model.name must be a GGUF file that transformers can read, got {gguf}"
    with refuse_unreadable(refusal):
        settings = transformers.AutoConfig.from_pretrained(gguf.parent, **options)
        outline = outline_of(settings, dtype)
    check_parameters(outline, gguf.stat().st_size, str(gguf))
    # Only a terminal shows transformers' bar for a GGUF file: it obeys no setting, and would fill a log file.
    shown = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with refuse_unreadable(refusal), quiet_progress(), redirect_stderr(shown):
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **options)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            gguf.parent, config=settings, dtype=getattr(torch, dtype), output_loading_info=True, **dense, **options
        )
    _check_whole(model, info, str(gguf))
    _prepared(model, _padding(tokenizer, str(gguf)), str(gguf))
    _forget_gguf(model)
    with atomic_directory(target, replace=lambda: False) as scratch, quiet_progress():
        model.save_pretrained(scratch)
        _save_tokenizer(tokenizer, scratch)
    logger.warning("dequantised %s in %.0f s", gguf.name, time.monotonic() - begin)
    return target


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # tokenizers (Rust) raises a plain Exception for disk errors


def _gguf_hash(path: Path) -> str:
    with open_regular(path) as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ValueError(
            f"model.name must be a GGUF file if it is a file, got {path}, which begins with {magic!r}: "
            "name the directory of an ordinary model"
        )
    read_gguf_header(path)
    return sha256_of(path)


def _model_directory(path: Path) -> Path:
    if (path / _CONFIG).exists():
        _check_files(path)
        return path
    if any((each / "adapter_config.json").is_file() for each in (path, path / "masks")):  # masks/: a run's
        raise ValueError(
            f"model.name must be a model, got {path}, which holds masks or an adapter: load the base, and put masks on "
            f"it by mft.load_masks(model, {str(path)!r}); or write a merged model by mft merge {path} DIRECTORY"
        )
    remedy = "name a directory that save_pretrained wrote"
    if files := sorted(path.glob("*.gguf")):
        remedy = f"name the file, {files[0]}"
    elif (path / "model" / _CONFIG).is_file():  # of a run of mft finetune
        remedy = f"name {path / 'model'}"
    raise ValueError(f"model.name must be a directory with a config.json, got {path} without one: {remedy}")


def _check_files(directory: Path) -> None:
    """Raise ValueError that names a file on which transformers would hang or fail."""
    tensors, config = 0, dict[str, Any]()
    for path in sorted(directory.iterdir()):
        if path.is_dir() or not path.exists():
            continue
        check_regular(path)
        if path.name in _OBJECTS:
            values = read_object(path, _MOST_JSON)
            config = values if path.name == _CONFIG else config
        elif path.suffix == ".safetensors":
            tensors += check_header(path, "copy the model again")
    check_layers(directory / _CONFIG, config, tensors)


@contextmanager
def refuse_unreadable(words: str) -> Iterator[None]:
    """Turn transformers' errors on a model's files into a ValueError that starts with these words."""
    try:
        yield
    except Exception as error:
        # tokenizers raises Exception itself, not a subclass.
        if not isinstance(error, _UNREADABLE) and type(error) is not Exception:
            raise
        text = " ".join(str(error).split())
        raise ValueError(f"{words}: {text if len(text) <= 300 else text[:297] + '...'}") from error


def _forget_gguf(model: Any) -> None:
    """Remove the GGUF settings: transformers refuses to save a model that it considers quantised."""
    settings = getattr(model.config, "quantization_config", None)
    if settings is not None and not isinstance(settings, dict):
        settings = settings.to_dict()
    if settings is not None and settings.get("quant_method") == "gguf":
        del model.config.quantization_config
        model.hf_quantizer = None
        model.is_quantized = False
