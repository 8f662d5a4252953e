"""mft: full fine-tune, mask fine-tune, evaluate, compare, merge, inspect, from a YAML file and overrides."""

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

import mft
from mft.checks import check_one_of
from mft.cli.keys import FinetuneKeys, Keyed, ListedKeys, run_schema
from mft.cli.options import (
    INSPECT,
    PANELS,
    SHARE,
    START,
    TRAIN,
    USE,
    BaseDtype,
    BaseModel,
    Config,
    Force,
    Masks,
    Overrides,
    Overwrite,
    Resume,
    Set,
    given_overrides,
)
from mft.config import WAYS, RunConfig
from mft.config_file import load_config
from mft.contention import core_share
from mft.escaping import escaped
from mft.tracking.console import console, say

# The commands import their modules themselves: transformers takes seconds, and `mft --help` should not wait for it.

TRACEBACK = "MFT_TRACEBACK"

# torch reads this at its first allocation: it puts large tensors in huge pages, which saves a page fault per 4 KB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _OneMessageAnError(typer.core.TyperGroup):
    """Prints errors that the user can fix as one message, with exit code 2. MFT_TRACEBACK=1 shows the traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        commands: Mapping[str, Any] = self.commands  # typer's, which know their group
        return sorted(commands, key=lambda name: PANELS.index(commands[name].rich_help_panel))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_at_home(argument) for argument in args])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, BrokenPipeError):  # a RuntimeError; typer ends quietly if the reader of a pipe has left
            raise
        except (ValueError, RuntimeError, OSError) as error:
            if os.environ.get(TRACEBACK):
                raise
            typer.echo(escaped(f"error: {error}"), err=True)
            raise typer.Exit(2) from None


def _at_home(argument: str) -> str:
    """Expand a ~ that the shell left in an argument or in --option=value. Configurations expand their own paths."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


app = typer.Typer(
    cls=_OneMessageAnError,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mask fine-tuning: train a mask that keeps or drops each frozen weight of a model, and use it.",
)


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"mft {mft.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    pass


_DEFAULTS = RunConfig()  # the defaults of mft train, which mft estimate uses too


@app.command(rich_help_panel=START)
def demo(
    output: Annotated[Path, typer.Option(help="Output directory.")] = Path("runs/demo"),
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Delete any existing run there. A run of an earlier demo is always deleted."),
    ] = False,
) -> None:
    """Train a mask on SmolLM2-135M in minutes, and show text and loss before and after.

    The mask learns the source of Python's standard library.
    """
    _let_waiting_threads_sleep()
    from mft.cli.demo import demo_config, run_demo

    run_demo(demo_config(output), overwrite=overwrite)


@app.command(cls=ListedKeys, rich_help_panel=TRAIN)
def train(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    force: Force = False,
    merge: Annotated[
        Path | None,
        typer.Option(help="At the end, also merge the masks, like mft merge: write an ordinary model there."),
    ] = None,
) -> None:
    """Fine-tune masks over frozen weights, and write them to output_dir/masks."""
    start = _start(config, overrides, sets, overwrite=overwrite, resume=resume, force=force)
    from mft.cli.masks import check_merged, run_merge
    from mft.training.run import run_train
    from mft.training.run_directory import next_steps

    if merge is not None:
        check_merged("--merge", merge)  # before it trains for hours
    masks = run_train(start)
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes, only the first one continues
        return
    if merge is not None:
        run_merge(str(masks), merge, None, None, force=False)
    for line in ("next:", *next_steps(masks.parent)):
        say(line)


@app.command(cls=FinetuneKeys, rich_help_panel=TRAIN)
def finetune(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    force: Force = False,
) -> None:
    """Fine-tune all weights, and write an ordinary model to output_dir/model."""
    start = _start(config, overrides, sets, overwrite=overwrite, resume=resume, force=force, of_weights=True)
    from mft.training.run import run_finetune

    run_finetune(start)


@app.command(cls=Keyed, rich_help_panel=INSPECT)
def evaluate(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(help="Masks to put on the model, as for mft merge; repeatable: each is evaluated."),
    ] = None,
    split: Annotated[str, typer.Option(help="validation or test: the held-out split.")] = "validation",
    answers: Annotated[
        int,
        typer.Option(min=0, help="Maximum number of held-out answers that are generated and compared with the data."),
    ] = 100,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-eval instead, such as gsm8k,humaneval.")
    ] = None,
    lm_eval_tasks: Annotated[
        Path | None, typer.Option("--lm-eval-tasks", help="A directory of your own task files.")
    ] = None,
    run_task_code: Annotated[
        bool, typer.Option("--run-task-code", help="Let the files of --lm-eval-tasks run code on this machine.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use at most this many documents of each task.")] = None,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="Let tasks run the model's code on this machine.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the tasks' scores to this file, as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
    unquantized: Annotated[
        bool, typer.Option("--unquantized", help="Use exact weights even if the masks were learned on quantised ones.")
    ] = False,
) -> None:
    """Measure loss, accuracy and exact answers on held-out data, or run lm-eval.

    With --masks, the model is measured with and without them. Without --config, masks are evaluated on the base and the
    data of their run. Overrides take precedence.
    """
    given = given_overrides(overrides, sets)
    run_config = None if config is None and masks else load_config(config, given)
    from mft.cli.evaluate import masks_config, run_evaluate, run_lm_eval
    from mft.masks.location import masks_directory

    directories = {name: masks_directory(name) for name in masks or ()}
    if run_config is None:
        run_config = masks_config(next(iter(directories.values())), given)
    if run_task_code and lm_eval_tasks is None:
        raise ValueError("--run-task-code must come with --lm-eval-tasks, got it alone")
    if lm_eval is not None:
        run_lm_eval(
            run_config,
            directories,
            [name.strip() for name in lm_eval.split(",")],
            tasks_dir=lm_eval_tasks,
            run_task_code=run_task_code,
            limit=limit,
            run_code=run_generated_code,
            output=output,
            force=force,
            unquantized=unquantized,
        )
        return
    for option, value in (("--lm-eval-tasks", lm_eval_tasks), ("--limit", limit), ("--output", output)):
        if value is not None:
            raise ValueError(f"{option} must come with --lm-eval, got {value} alone")
    run_evaluate(run_config, directories, split, answers=answers, force=force, unquantized=unquantized)


data = typer.Typer(no_args_is_help=True, help="Show the rows that training and evaluation read.")
app.add_typer(data, name="data", rich_help_panel=START)


@data.command(cls=Keyed)
def show(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="Number of rows to show.")] = 3,
) -> None:
    """Show rows as the model sees them: tokens, which of them are scored, where examples begin. Loads no weights."""
    run_config = load_config(config, given_overrides(overrides, sets))
    from mft.cli.data import run_data_show

    run_data_show(run_config, split, rows)


@app.command(rich_help_panel=USE)
def merge(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="Where the ordinary model goes.")],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    alpha: Annotated[
        float, typer.Option(help="Strength of the masks, in (0, 1]: dropped weights are scaled by 1 - alpha.")
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Merge masks into the weights, and write an ordinary model.

    Kept weights stay bit-equal, dropped ones become +0.
    """
    from mft.cli.masks import run_merge

    run_merge(masks, output, model, dtype, force=force, alpha=alpha)


@app.command(rich_help_panel=USE)
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
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            readable=False, help="A file of keys, one per line: clients must send one. SIGHUP reads it again."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another host name that clients may use; * for any.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Maximum number of requests answered at the same time.")] = 8,
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
    from mft.cli.serve import run_serve

    run_serve(
        masks or [],
        model,
        dtype,
        masks_file=masks_file,
        load_from=load_from,
        force=force,
        api_keys_file=api_keys_file,
        host=host,
        port=port,
        allow_host=allow_host or (),
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


@app.command(rich_help_panel=USE)
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
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Answer prompts with the base and with the base plus masks."""
    from mft.cli.generate import Asked, Sampling, run_generate

    asked = Asked(prompt, held_out, prompts, system=system, raw=raw)
    sampling = Sampling(max_tokens, temperature, seed)
    run_generate(run, asked, sampling, only=only, model_name=model, dtype=dtype, force=force)


@app.command(rich_help_panel=USE)
def chat(
    run: Run,
    system: System = None,
    only: Only = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0,
    seed: AnswerSeed = 0,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Chat with the base and with the base plus masks.

    Each has its own conversation. Ctrl-D ends it.
    """
    from mft.cli.generate import Sampling, run_chat

    sampling = Sampling(max_tokens, temperature, seed)
    run_chat(run, sampling, system=system, only=only, model_name=model, dtype=dtype, force=force)


@app.command(rich_help_panel=INSPECT)
def inspect(
    masks: Masks,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
    every_row: Annotated[bool, typer.Option("--all", help="One row per masked layer, not per kind of layer.")] = False,
) -> None:
    """Show how many weights masks keep, and how they differ from the magnitude mask."""
    from mft.cli.masks import run_inspect

    run_inspect(masks, model, dtype, force=force, every_row=every_row)


@app.command(rich_help_panel=INSPECT)
def verify(
    directory: Annotated[
        str, typer.Argument(help="An output_dir, its masks/, one of its checkpoints, or user/repo[@revision].")
    ],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Load the base and compare its hash.")] = True,
) -> None:
    """Check that masks and checkpoints are undamaged and fit their base."""
    from mft.cli.verify import run_verify

    run_verify(directory, model, dtype, base=base)


@app.command(rich_help_panel=USE)
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
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Write masks into a GGUF file for llama.cpp and Ollama, or undo it.

    Dropped weights become exact zeros, all others keep their bits.
    """
    from mft.cli.patch import Request, run_patch

    request = Request(model, tuple(masks_and_output or ()), undo, in_place, widen, lora, base, dtype, force)
    _let_waiting_threads_sleep()
    run_patch(request)


@app.command(rich_help_panel=SHARE)
def push(
    directory: Annotated[
        Path, typer.Argument(help="An output_dir or its masks/, an adapter that PEFT saved, or a merged model.")
    ],
    repository: Annotated[str, typer.Argument(help="user/name on the hub; created if it does not exist.")],
    revision: Annotated[
        str | None,
        typer.Option("--revision", "--branch", help="A branch, created if it does not exist; by default main."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="The commit message.")] = None,
    license: Annotated[
        str | None, typer.Option(help="The card's license, such as apache-2.0; by default the base's, if known here.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base's name on the hub, if this machine knows it by a path.")
    ] = None,
    coding: Annotated[
        str | None, typer.Option(help="For masks: rice (entropy-coded) or packed; by default unchanged.")
    ] = None,
    overwrite_card: Annotated[
        bool,
        typer.Option("--overwrite-card", help="Replace a README.md on the hub, also if somebody wrote it by hand."),
    ] = False,
) -> None:
    """Upload masks or a merged model to the Hugging Face Hub, with a model card."""
    from mft.cli.push import run_push

    run_push(
        directory,
        repository,
        revision=revision,
        private=private,
        message=message,
        license=license,
        base=base,
        coding=coding,
        overwrite_card=overwrite_card,
    )


@app.command("import-masks", rich_help_panel=SHARE)
def import_masks(
    path: Annotated[Path, typer.Argument(help="A masks.pt of the paper's code.")],
    output: Annotated[Path, typer.Argument(help="Output directory.")],
    model: Annotated[str, typer.Option(help="The base of these masks.")],
    dtype: Annotated[str, typer.Option(help="The base's dtype.")] = "bfloat16",
) -> None:
    """Import masks of the paper's code.

    This is the only pickle that mft reads, with torch's weights-only loader.
    """
    from mft.cli.masks import run_import_masks

    run_import_masks(path, output, model, dtype)


@app.command("export-masks", rich_help_panel=SHARE)
def export_masks(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="The new masks.pt.")],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Export masks for the paper's code."""
    from mft.cli.masks import run_export_masks

    run_export_masks(masks, output, model, dtype, force=force)


@app.command(rich_help_panel=SHARE)
def recode(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="Output directory; may be that of the masks.")],
    coding: Annotated[
        str,
        typer.Option(
            help="rice: about the entropy; by_weight: smaller, needs the base to read; packed: 1 bit per weight."
        ),
    ] = "rice",
    model: BaseModel = None,
    dtype: BaseDtype = None,
) -> None:
    """Write the same masks in another coding, such as one with a smaller file.

    The content hash stays the same. Only by_weight loads the base.
    """
    from mft.cli.masks import run_recode

    run_recode(masks, output, coding, model, dtype)


@app.command(rich_help_panel=START)
def estimate(
    ctx: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of --config.", metavar="[KEY=VALUE]...")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A known name such as llama2-7b, a config.json, a model directory or a hub id.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="A study by rewards: estimate each of its arms; replaces the options."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Masked layers, such as 4-7, or all.")] = "all",
    sequence: Annotated[int, typer.Option(help="Tokens per row.")] = _DEFAULTS.data.sequence_length,
    micro_batch: Annotated[int, typer.Option(help="Rows per micro-batch.")] = _DEFAULTS.train.batch_size,
    accumulation: Annotated[int, typer.Option(help="Micro-batches per step.")] = _DEFAULTS.train.accumulation,
    batches_at_once: Annotated[
        int | None, typer.Option(help="For layerwise: micro-batches held by the host; by default as many as fit.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Processes of torchrun on the machine, one GPU each.")] = 1,
    memory: Annotated[str, typer.Option(help=f"auto, {', '.join(WAYS[:-1])} or {WAYS[-1]}.")] = "auto",
    gpu: Annotated[str | None, typer.Option(help="Memory of the GPU, such as 24GB or 24GiB.")] = None,
    cpu: Annotated[str | None, typer.Option(help="Memory without a GPU; by default this machine's.")] = None,
    host: Annotated[str | None, typer.Option(help="Host memory with a GPU; by default this machine's.")] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = _DEFAULTS.model.dtype,
    scores: Annotated[str, typer.Option(help="auto, float32, bfloat16 or int16.")] = _DEFAULTS.mask.scores_dtype,
    moments: Annotated[str, typer.Option(help="auto, float32 or 8bit.")] = _DEFAULTS.train.moments,
    grad_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the gradient buffers; by default that of the weights.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="Quantisation of the base: nf4, nf4-dq or int8.")] = None,
    quantize_masked: Annotated[bool, typer.Option("--quantize-masked", help="Quantise masked weights too.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="For plain, in_place, sharded.")
    ] = False,
    target_modules: Annotated[str | None, typer.Option(help="Linear layers, such as up_proj,down_proj.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Largest share of all masked weights that is dropped.")
    ] = _DEFAULTS.mask.budget,
    keep_ratio: Annotated[
        float | None, typer.Option(help="Share of each matrix's weights that is kept, in place of a budget.")
    ] = None,
    objective: Annotated[str, typer.Option(help="kl, distill (its teacher not counted) or dpo.")] = "cross_entropy",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Estimate memory and time of each memory mode, without loading weights.

    The exit code is 2 if nothing fits.
    """
    from mft.cli.estimate import STEP, parse_bytes, run_estimate
    from mft.config import parse_layers
    from mft.memory.workload import Workload

    if model is None and config is None:
        raise ValueError("--model or --config must be given, got neither")
    if gpu is not None and cpu is not None:
        raise ValueError(
            f"--gpu or --cpu must be given, got both, {gpu} and {cpu}: --host is the host memory of a machine with a "
            "GPU"
        )
    if gpu is None and host is not None:
        raise ValueError(f"--host must come with --gpu, got {host} alone: without a GPU, --cpu is the only memory")
    sizes = [parse_bytes(size, option) for size, option in ((gpu, "--gpu"), (cpu, "--cpu")) if size is not None]
    device_bytes, device = sizes[0] if sizes else None, "cpu" if gpu is None else "cuda"
    if config is not None:
        _check_only(
            ctx, {"model", "config", "gpu", "cpu", "as_json", "overrides"}, "--config, because its study sets it"
        )
        if not _on_studies("estimate")(
            config, overrides or [], model, device=device, device_bytes=device_bytes, as_json=as_json
        ):
            raise typer.Exit(2)
        return
    if overrides:
        raise ValueError(f"KEY=VALUE must come with --config, got {' '.join(overrides)}")
    assert model is not None
    if keep_ratio is not None and _is_given(ctx, "budget"):
        raise ValueError(f"--budget or --keep-ratio must be given, got both, {budget} and {keep_ratio}")
    workload = Workload(
        memory=memory,
        layers=None if layers == "all" else tuple(parse_layers(layers)),
        target_modules=None if target_modules is None else tuple(target_modules.split(",")),
        sequence=sequence,
        micro_batch=micro_batch,
        accumulation=accumulation,
        batches_at_once=batches_at_once,
        processes=processes,
        scores=scores,
        moments=moments,
        grad_dtype=grad_dtype,
        quantization=quantization,
        quantize_masked=quantize_masked,
        gradient_checkpointing=gradient_checkpointing,
        keep_ratio=1.0 if keep_ratio is None else keep_ratio,
        budget=budget if keep_ratio is None else None,
        objective=objective,
        device=device,
    )
    host_bytes = None if host is None else parse_bytes(host, "--host")
    not_given = {name for name in STEP if not _is_given(ctx, name)}
    fits = run_estimate(
        model,
        workload,
        dtype,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        as_json=as_json,
        by_default=not_given,
    )
    if not fits:
        raise typer.Exit(2)


@app.command(rich_help_panel=TRAIN)
def schema(what: Annotated[str, typer.Argument(help="run, or study: what mft compare reads.")] = "run") -> None:
    """Print a JSON Schema, with which editors complete and check the YAML files."""
    check_one_of("what", what, ("run", "study"))
    written = run_schema() if what == "run" else _on_studies("schema")()
    typer.echo(json.dumps(written, indent=2))


@app.command(rich_help_panel=START)
def env(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time our kernels, dense and eager PyTorch, in less than 30 s.")
    ] = False,
) -> None:
    """Show versions, threads, the processor, and which kernels run on which device."""
    from mft.cli.environment import run_env

    run_env(measure=measure)


for others in entry_points(group="mft.verbs"):  # of mft_study, which mft never imports
    app.add_typer(others.load())


def main() -> None:
    """Run the command line."""
    app()


def _let_waiting_threads_sleep() -> None:
    """On a busy machine, make libgomp's waiting threads sleep after a short spin. Call it before torch is loaded.

    By default they spin for milliseconds, while another process may hold the core of the thread that they wait for: 2
    threads of mft train then took 17 times as long as one. Results do not change. libgomp itself takes 1000 turns if it
    knows that there are more threads than cores. On free cores the long spin is a tenth faster, so it stays
    (SmolLM2-135M, Zen 4).
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))
    if threads > 1 and (found := core_share(threads)).is_busy:
        os.environ["GOMP_SPINCOUNT"] = "1000"
        say(f"{found}, other processes use the rest: waiting threads sleep early (GOMP_SPINCOUNT=1000)", style="yellow")


def _on_studies(verb: str) -> Callable[..., Any]:
    """Return what mft_study does for a verb that also takes a study."""
    return entry_points(group="mft.studies")[verb].load()


def _check_only(ctx: typer.Context, names: set[str], beside: str) -> None:
    """Raise ValueError if other options than these were given."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name not in names and _is_given(ctx, name):
            raise ValueError(f"{parameter.opts[0]} must not come with {beside}, got {ctx.params[name]}")


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Return whether an option is on the command line, even with its default value."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _start(
    config: Path | None,
    overrides: list[str] | None,
    sets: list[str] | None,
    *,
    overwrite: bool,
    resume: Path | None,
    force: bool,
    of_weights: bool = False,
) -> Any:
    """Return how a run of finetune or train begins: new, or resumed. Loads torch after it has checked the keys."""
    given = given_overrides(overrides, sets)
    if resume is None:
        if force:
            raise ValueError("--force must come with --resume, got it alone")
        run_config = load_config(config, given, of_weights=of_weights)
    elif overwrite:
        raise ValueError("--overwrite must not come with --resume: one deletes the run, the other goes on with it")
    _let_waiting_threads_sleep()
    from mft.training.resume import Begin, Resume

    if resume is None:
        return Begin(run_config, overwrite=overwrite)
    return Resume(resume, config, given, force=force)


if __name__ == "__main__":
    main()
