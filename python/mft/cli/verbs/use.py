"""The verbs of "Use": merge, serve, generate, chat, patch.

`mft --help` imports this file and should not wait for transformers: each verb imports its modules itself.
"""

from pathlib import Path
from typing import Annotated

import typer

from mft.cli.options import USE, AnyBase, BaseDtype, BaseModel, Masks
from mft.cli.waiting_threads import let_waiting_threads_sleep

verbs = typer.Typer()
Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="An output_dir of mft train, its masks/, user/repo of the hub, or a model."),
]
Only = Annotated[str | None, typer.Option(help="base or masked; both if not given.")]
System = Annotated[
    str | None,
    typer.Option(help="System prompt; by default the one that all of the run's chats share, if any. '' for none."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum tokens per answer.")]
Temperature = Annotated[
    float,
    typer.Option(
        min=0, help="0: always the most likely token; 1: the model's own probabilities; above 1: more random."
    ),
]
AnswerSeed = Annotated[int, typer.Option(min=0, help="Random seed, the same for each answer.")]


@verbs.command(rich_help_panel=USE)
def merge(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="Where the ordinary model goes.")],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    alpha: Annotated[
        float, typer.Option(help="Strength of the masks, in (0, 1]: dropped weights are scaled by 1 - alpha.")
    ] = 1.0,
    force: AnyBase = False,
) -> None:
    """Merge masks into the weights, and write an ordinary model.

    Kept weights stay bit-equal, dropped ones become +0.
    """
    from mft.cli.masks import run_merge

    run_merge(masks, output, model, dtype, force=force, alpha=alpha)


@verbs.command(rich_help_panel=USE)
def serve(
    masks: Annotated[
        list[str] | None,
        typer.Option(help="name=DIR, an output_dir of mft train, its masks/, or user/repo[@revision]; repeatable."),
    ] = None,
    masks_file: Annotated[
        Path | None, typer.Option(readable=False, help="A file with one name=DIR per line; SIGHUP reads it again.")
    ] = None,
    load_from: Annotated[
        Path | None, typer.Option(help="Allow clients to load masks below this directory, and to unload masks.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "--base", help="The base; by default the one of the first masks.")
    ] = None,
    dtype: BaseDtype = None,
    force: AnyBase = False,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            readable=False,
            help="Keys of clients, one per line: KEY, NAME KEY, or NAME KEY TASK,TASK. SIGHUP reads the file again.",
        ),
    ] = None,
    admin_keys_file: Annotated[
        Path | None,
        typer.Option(
            readable=False, help="Keys that may also load and unload masks, as lines KEY or NAME KEY; SIGHUP too."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another host name that clients may use; * for any.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="Memory for keys and values, such as 2GB; by default half of what is free.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of requests answered at once; by default what --cache holds."),
    ] = None,
    waiting: Annotated[int, typer.Option(min=0, help="Maximum number of further requests that wait.")] = 64,
    length: Annotated[
        int | None, typer.Option(min=2, help="Maximum tokens of prompt and answer; by default what the base supports.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens if the request sets none; by default 16, for a chat all that fit."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for a request, waiting included; by default no limit.")
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds for running requests after SIGTERM or SIGINT.")
    ] = 30,
    log_format: Annotated[str, typer.Option(help="text, or json: one object per line.")] = "text",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_zone: Annotated[
        str, typer.Option(help="Time zone of the log: local, UTC, or a name such as Europe/Berlin.")
    ] = "local",
) -> None:
    """Serve the masks of many tasks on one base over OpenAI's HTTP API.

    The model's name in a request chooses the task.
    """
    from mft.cli.estimate import parse_bytes
    from mft.cli.serve import run_serve

    run_serve(
        masks or [],
        model,
        dtype,
        masks_file=masks_file,
        load_from=load_from,
        force=force,
        api_keys_file=api_keys_file,
        admin_keys_file=admin_keys_file,
        host=host,
        port=port,
        allow_host=allow_host or (),
        cache=None if cache is None else int(parse_bytes(cache, "--cache")),
        rows=rows,
        waiting=waiting,
        length=length,
        max_tokens=max_tokens,
        timeout=timeout,
        grace=grace,
        log_format=log_format,
        log_level=log_level,
        log_zone=log_zone,
    )


@verbs.command(rich_help_panel=USE)
def generate(
    run: Run,
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="A message, or with --raw a text to continue.")
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(min=1, help="Answer this many prompts of the validation data, and show the expected answers."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(readable=False, help="Answer the prompts of a file: one per line, or a .jsonl of messages."),
    ] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not use the tokenizer's chat template.")] = False,
    only: Only = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0,
    seed: AnswerSeed = 0,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: AnyBase = False,
) -> None:
    """Answer prompts with the base and with the base plus masks."""
    from mft.cli.generate import Asked, Sampling, run_generate

    asked = Asked(prompt, held_out, prompts, system=system, raw=raw)
    sampling = Sampling(max_tokens, temperature, seed)
    run_generate(run, asked, sampling, only=only, model_name=model, dtype=dtype, force=force)


@verbs.command(rich_help_panel=USE)
def chat(
    run: Run,
    system: System = None,
    only: Only = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0,
    seed: AnswerSeed = 0,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: AnyBase = False,
) -> None:
    """Chat with the base and with the base plus masks.

    Each has its own conversation. Ctrl-D ends it.
    """
    from mft.cli.generate import Sampling, run_chat

    sampling = Sampling(max_tokens, temperature, seed)
    run_chat(run, sampling, system=system, only=only, model_name=model, dtype=dtype, force=force)


@verbs.command(rich_help_panel=USE)
def patch(
    model: Annotated[Path, typer.Argument(help="A GGUF file; with --undo, a patched one.")],
    masks_and_output: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MASKS] [OUTPUT]", help="Masks as for mft merge, and the new GGUF file; with --undo only OUTPUT."
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Restore the original from MODEL and MODEL.undo.")] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change MODEL itself, without OUTPUT; a running llama.cpp sees it.")
    ] = False,
    widen: Annotated[
        str | None, typer.Option(help="f32: store masked tensors whose type has no exact zero in float32.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Write a LoRA adapter to this file instead, without OUTPUT.")
    ] = None,
    base: BaseModel = None,
    dtype: BaseDtype = None,
    force: AnyBase = False,
) -> None:
    """Write masks into a GGUF file for llama.cpp and Ollama, or undo it.

    Dropped weights become exact zeros, all others keep their bits.
    """
    from mft.cli.patch import Request, run_patch

    request = Request(model, tuple(masks_and_output or ()), undo, in_place, widen, lora, base, dtype, force)
    let_waiting_threads_sleep()
    run_patch(request)
