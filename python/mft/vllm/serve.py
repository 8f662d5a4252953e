"""python -m mft.vllm: vLLM's own OpenAI server for one base, with the masks of many tasks and the routes /v1/mft."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mft.checks import check_rule
from mft.escaping import escaped
from mft.masks.export_format import read_export
from mft.masks.location import masks_directory
from mft.serving.api.api_keys import ApiKeys
from mft.serving.task_list import parse_masks, read_listed, read_masks_file
from mft.vllm.empty_loras import EAGER, Adapters
from mft.vllm.token_masks import warn_without_kernels
from mft.vllm.versions import NAME, PER_REQUEST_BACKEND, check_vllm
from mft.vllm.worker_errors import sentence_of

USAGE = (
    "python -m mft.vllm BASE --masks NAME=DIR [--masks NAME=DIR ...] [--masks-file FILE] [--force] [--per-request]\n"
    "    [--api-keys-file FILE] [--admin-keys-file FILE] [options of vLLM]"
)
_OURS = ("--quantization", "-q", "--weight-transfer-config")


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGINT or SIGTERM. On errors that the caller can fix, print one line and exit with code 2."""
    try:
        ours, rest = read_arguments(arguments)
        check_vllm()
        keys, tasks = read_keys(ours.api_keys_file, ours.admin_keys_file), check_tasks(ours.masks, ours.masks_file)
        if ours.per_request:
            warn_without_kernels()
        _serve(tasks, ours.force, keys, Adapters(tasks) if ours.per_request else None, rest)
    except (OSError, RuntimeError, ValueError) as error:
        print(escaped(f"error: {sentence_of(error) or error}"), file=sys.stderr)
        sys.exit(2)


def read_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split the arguments into those of this program and those that vLLM reads."""
    parser = argparse.ArgumentParser(prog="python -m mft.vllm", usage=USAGE, allow_abbrev=False)
    parser.add_argument(
        "--masks", action="append", default=[], help="a task: an output_dir of mft train, or its masks/"
    )
    parser.add_argument("--masks-file", type=Path, help="more tasks, one name=DIR per line")
    parser.add_argument("--api-keys-file", type=Path, help="keys of clients, as lines KEY or NAME KEY")
    parser.add_argument("--admin-keys-file", type=Path, help="keys that may also switch the task")
    parser.add_argument("--force", action="store_true", help="use masks that were learned on another base")
    parser.add_argument(
        "--per-request", action="store_true", help="experimental: each request names its task as its model"
    )
    ours, rest = parser.parse_known_args(arguments)
    for word in rest:
        option = word.partition("=")[0]
        if ours.per_request and option.replace("_", "-") == "--no-enforce-eager":
            raise ValueError(f"--enforce-eager must be {EAGER}, got {word!r}: leave it out")
        if option in _OURS or (option.startswith("--") and "lora" in option):
            raise ValueError(f"{option} must be left out, because mft sets it for masks in vLLM, got {word!r}")
    return ours, rest


def check_tasks(given: Sequence[str], file: Path | None = None) -> dict[str, str]:
    """Return {task: directory} from both options, checked before vLLM spends seconds on loading the base."""
    listed = {} if file is None else read_masks_file(file)
    places = parse_masks(given) if given or not listed else {}
    twice = next((task for task in listed if task in places), None)
    check_rule(twice is None, "--masks-file", "name no task of --masks", repr(twice))
    tasks: dict[str, str] = {}
    for task, place in (places | listed).items():
        directory = masks_directory(place)
        read_export(directory)
        tasks[task] = str(directory.resolve())
    return tasks


def read_keys(users: Path | None, admins: Path | None) -> ApiKeys | None:
    """Return the keys of --api-keys-file and --admin-keys-file, None without either. Raises: ValueError for tasks."""
    if users is None and admins is None:
        return None
    keys = ApiKeys(users, logging.getLogger(__name__).warning, admins)
    lines = [] if users is None else read_listed("--api-keys-file", "a key", users).splitlines()
    for number, line in enumerate(lines, 1):
        check_rule(
            len(line.split()) < 3 or line.strip().startswith(b"#"),
            "--api-keys-file",
            "hold no tasks, because in vLLM every key may call every task",
            f"tasks in line {number} of {users}: remove them, or use mft serve",
        )
    return keys


def _serve(
    tasks: dict[str, str], force: bool, keys: ApiKeys | None, adapters: Adapters | None, rest: list[str]
) -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    os.environ["VLLM_PLUGINS"] = f"{allowed},{NAME}" if allowed else NAME
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="python -m mft.vllm", usage=USAGE))
    backend = PER_REQUEST_BACKEND if adapters else NAME
    words = [*rest, "--quantization", NAME, "--weight-transfer-config", f'{{"backend": "{backend}"}}']
    args: Any = parser.parse_args(words)
    if args.model_tag is not None:
        args.model = args.model_tag
    if args.api_server_count not in (None, 1):
        raise ValueError(
            f"--api-server-count must be 1, because a single process switches masks, got {args.api_server_count}"
        )
    if keys is not None and (args.api_key or os.environ.get("VLLM_API_KEY")):
        raise ValueError("--api-key must be left out with files of keys, got both: write that key into a file")
    args.mft_tasks, args.mft_force, args.mft_per_request, args.mft_keys = tasks, force, adapters is not None, keys
    if adapters:
        _choose_by_model(args, adapters)
    validate_parsed_serve_args(args)
    how = ", a task for each request (experimental)" if adapters else ""
    print(f"serving {args.model} with the masks of {', '.join(tasks)}{how}", flush=True)
    uvloop.run(run_server(args))


def _choose_by_model(args: Any, adapters: Adapters) -> None:
    """Make each task a model name of the server, next to the base."""
    from vllm import envs
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    for option, given in (
        ("--enable-lora", args.enable_lora),  # in a file of --config
        ("--lora-modules", args.lora_modules),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING),
    ):
        if given:
            raise ValueError(
                f"{option} must be left out with --per-request, which takes vLLM's LoRA slots, got {given}"
            )
    names = args.served_model_name or [args.model]
    for task in adapters.ids:
        if task in names:
            raise ValueError(f"--masks must name no task as the base, got {task!r}: --served-model-name names the base")
    vars(args).update(adapters.options, enforce_eager=True)
    args.lora_modules = [LoRAModulePath(task, adapters.path) for task in adapters.ids]
