"""The command mft: one line and exit code 2 where the packages that it is made of are not there."""

import sys
from importlib.util import find_spec

# Of the extra "train" in pyproject.toml, by the names that they are imported by.
NEEDED = (
    *("accelerate", "datasets", "filelock", "gguf", "huggingface_hub", "jinja2", "matplotlib", "rich", "safetensors"),
    *("transformers", "typer", "yaml"),
)


def main() -> None:
    """The console script."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"error: mft needs {', '.join(missing)}, not installed here: pip install 'mft_kernels[train]' (the kernels "
            "and modules of mft_kernels work without)",
            file=sys.stderr,
        )
        sys.exit(2)
    from mft.cli.app import main as run

    run()
