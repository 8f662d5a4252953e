"""What mft serve is given, and the packages that it alone needs."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from mft.serving.task_list import parse_masks

_NEEDED = ("openai", "starlette", "uvicorn")


def run_serve(masks: Sequence[str], model_name: str | None, dtype: str | None, **options: Any) -> None:
    """mft serve"""
    directories = parse_masks(masks)
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"mft serve needs {', '.join(missing)}, not installed here: pip install 'mft_kernels[serve]'"
        )
    from mft.serving.options import Options
    from mft.serving.run import serve

    serve(directories, model_name, dtype, Options(**options))
