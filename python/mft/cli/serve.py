"""mft serve: check its arguments, and the packages that only it needs."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from mft.checks import install_command
from mft.serving.task_list import parse_masks

_NEEDED = ("prometheus_client", "pydantic", "starlette", "uvicorn")


def run_serve(masks: Sequence[str], model_name: str | None, dtype: str | None, **options: Any) -> None:
    """mft serve"""
    has_others = options["masks_file"] is not None or options["load_from"] is not None
    directories = parse_masks(masks) if masks or not has_others else {}
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise RuntimeError(f"mft serve needs {', '.join(missing)}, not installed here: {install_command('serve')}")
    from mft.serving.launch import serve
    from mft.serving.options import Options

    serve(directories, model_name, dtype, Options(**options))
