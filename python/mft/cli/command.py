"""The command mft. If a package that it needs is missing, it prints one line and exits with code 2."""

import sys
from importlib.util import find_spec

from mft.checks import install_command

# The packages of the extra "train" in pyproject.toml, by their import names.
NEEDED = (
    *("accelerate", "datasets", "filelock", "gguf", "huggingface_hub", "jinja2", "matplotlib", "rich", "safetensors"),
    *("transformers", "typer", "yaml"),
)


def main() -> None:
    """Run mft, as the console script."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"error: mft needs {', '.join(missing)}, not installed here: {install_command('train')} "
            "(the kernels and modules of mft_kernels work without)",
            file=sys.stderr,
        )
        sys.exit(2)
    from mft.cli.app import main as run

    run()
