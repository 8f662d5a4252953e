"""mft: full fine-tune, mask fine-tune, evaluate, compare, merge, inspect, from a YAML file and overrides."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

import mft
from mft.checks import check_one_of
from mft.cli.keys import Keyed, ListedKeys, StudyKeys, run_schema, study_schema
from mft.config import RunConfig
from mft.config_file import load_config
from mft.contention import core_share
from mft.tracking.console import console, say

# Loaded inside the verbs: transformers takes seconds, and `mft --help` should not wait for it.

TRACEBACK = "MFT_TRACEBACK"

# torch reads it when it first allocates: large tensors in huge pages, or each new one costs a page fault every 4 KB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _OneMessageAnError(typer.core.TyperGroup):
    """What the user can mend is one message and exit code 2; MFT_TRACEBACK=1 shows where it arose."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_at_home(argument) for argument in args])

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:  # a RuntimeError too
            raise
        except (ValueError, RuntimeError, OSError) as error:
            if os.environ.get(TRACEBACK):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


def _at_home(argument: str) -> str:
    """The argument, or the value of --option=value, whose ~ the shell has left; configurations expand their own."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return option + equals + os.path.expanduser(value)


app = typer.Typer(
    cls=_OneMessageAnError,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Mask fine-tuning: train a 1-bit mask over frozen weights, and bake it in.",
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


_DEFAULTS = RunConfig()  # of mft train, which mft estimate takes too

Config = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file, or paper; the defaults if none.")]
Set = Annotated[list[str] | None, typer.Option("--set", "-s", help="Override, such as train.lr=3e-4; repeatable.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Overrides, such as train.lr=3e-4; --help KEY explains a key.", metavar="[KEY=VALUE]..."),
]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Go on with the run in this output_dir, with its own configuration.")
]
Force = Annotated[bool, typer.Option("--force", help="Resume although configuration, data or base have changed.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the run that output_dir holds.")]

Masks = Annotated[
    str, typer.Argument(help="An output_dir of mft train, its masks/, or user/repo[@revision] of the hub.")
]
BaseModel = Annotated[str | None, typer.Option(help="The base; by default the one that the masks were learned on.")]
BaseDtype = Annotated[str | None, typer.Option(help="Of the base; by default as the masks were learned.")]


@app.command(cls=ListedKeys)
def finetune(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    force: Force = False,
) -> None:
    """Fine-tune all weights; writes an ordinary model to output_dir/model."""
    _let_waiting_threads_sleep()
    from mft.training.run import run_finetune

    run_finetune(_start(config, overrides, sets, overwrite=overwrite, resume=resume, force=force))


@app.command(cls=ListedKeys)
def train(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    force: Force = False,
    merge: Annotated[
        Path | None,
        typer.Option(help="Bake the masks in at the end: where the ordinary model goes, as mft merge says."),
    ] = None,
) -> None:
    """Fine-tune masks over frozen weights; writes them to output_dir/masks."""
    _let_waiting_threads_sleep()
    from mft.cli.masks import check_merged, run_merge
    from mft.training.run import run_train
    from mft.training.run_directory import next_steps

    if merge is not None:
        check_merged("--merge", merge)  # before it trains for hours
    masks = run_train(_start(config, overrides, sets, overwrite=overwrite, resume=resume, force=force))
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes the first one goes on
        return
    if merge is not None:
        run_merge(str(masks), merge, None, None, force=False)
    for line in ("next:", *next_steps(masks.parent)):
        say(line)


@app.command(cls=Keyed)
def evaluate(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    masks: Annotated[
        list[str] | None,
        typer.Option(help="Masks to put on the model: as for mft merge. Several are taken in turn."),
    ] = None,
    split: Annotated[str, typer.Option(help="validation or test; of the held-out loss.")] = "validation",
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", help="Tasks of lm-eval instead, such as gsm8k,humaneval.")
    ] = None,
    lm_eval_tasks: Annotated[
        Path | None, typer.Option("--lm-eval-tasks", help="A directory of your own task files.")
    ] = None,
    run_task_code: Annotated[
        bool, typer.Option("--run-task-code", help="Those files may run what they hold, on this machine.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task.")] = None,
    run_generated_code: Annotated[
        bool, typer.Option("--run-generated-code", help="Tasks may run what the model wrote, on this machine.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the tasks' scores there as JSON.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
    unquantized: Annotated[
        bool, typer.Option("--unquantized", help="On exact weights, also if the masks were learned on quantised ones.")
    ] = False,
) -> None:
    """Held-out loss and accuracy, or the tasks of --lm-eval; with --masks both without them and with them.

    Without --config, masks are evaluated on the base and the data of their run; overrides win.
    """
    from mft.cli.evaluate import masks_config, run_evaluate, run_lm_eval
    from mft.masks.location import masks_directory

    directories = {name: masks_directory(name) for name in masks or ()}
    if config is None and directories:
        run_config = masks_config(next(iter(directories.values())), [*(overrides or []), *(sets or [])])
    else:
        run_config = _read(config, overrides, sets)
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
    run_evaluate(run_config, directories, split, force=force, unquantized=unquantized)


data = typer.Typer(no_args_is_help=True, help="Look at the rows that training and evaluation are given.")
app.add_typer(data, name="data")


@data.command(cls=Keyed)
def show(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="How many, from the first.")] = 3,
) -> None:
    """Rows as the model will see them: tokens, what of them is scored, where examples begin; loads no weight."""
    from mft.cli.data import run_data_show

    run_data_show(_read(config, overrides, sets), split, rows)


@app.command(cls=StudyKeys)
def compare(
    config: Annotated[
        str,
        typer.Option(
            "--config", "-c", help="own (your data), demo, small, smollm2, board-small, board-smollm2, or a YAML file."
        ),
    ] = "small",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides, such as seeds=[0,1].", metavar="[KEY=VALUE]...")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="Override, such as arms.MFT.lrs=[1e-3]; repeatable.")
    ] = None,
    fine_tunes_of: Annotated[
        Path | None,
        typer.Option(
            "--fine-tunes-of", help="Another study's output_dir, whose fine-tunes are taken up if they are this one's."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the study that output_dir holds.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Open the reserve though this study has opened it.")] = False,
    join: Annotated[
        bool, typer.Option("--join", help="Work beside other processes with --join, on any machine of the same disk.")
    ] = False,
    same_processor: Annotated[
        bool, typer.Option("--same-processor", help="Refuse units that ran on another kind of processor than this one.")
    ] = False,
    on: Annotated[
        str, typer.Option("--on", help="Where workers run: local, or ray (a Ray cluster, which needs no shared disk).")
    ] = "local",
) -> None:
    """MFT against honest baselines, chosen on validation, reported on test; continues where it was interrupted."""
    from mft.cli.study import run_compare
    from mft.study.load import load_study

    study = load_study(config, [*(overrides or []), *(sets or [])])
    run_compare(
        study,
        overwrite=overwrite,
        fine_tunes_of=fine_tunes_of,
        again=again,
        joins=join,
        same_processor=same_processor,
        on=on,
    )


@app.command(cls=StudyKeys)
def ablate(
    what: Annotated[str, typer.Argument(help="ratio, layers or data.")],
    config: Annotated[str, typer.Option("--config", "-c", help="The study that it is derived from.")] = "small",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of it, such as seeds=[0,1].", metavar="[KEY=VALUE]...")
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Keep ratios, groups of layers (0-3,4-7) or shares of the data.")
    ] = None,
    domains: Annotated[
        list[str] | None, typer.Option("--domain", help="Of the study; repeatable; all if not given.")
    ] = None,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="A mask of the study; repeatable; all if not given.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the study that its directory holds.")] = False,
) -> None:
    """MFT by keep ratio, by masked layers or by share of the data, beside the same baselines; continues too."""
    from mft.cli.study import run_ablate
    from mft.study.load import load_study

    given = [] if values is None else values.split(",")
    run_ablate(load_study(config, overrides or []), what, given, domains or [], arms or [], overwrite=overwrite)


@app.command(cls=Keyed)
def sensitivity(
    config: Config = None,
    overrides: Overrides = None,
    sets: Set = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers in a group.")] = 1,
    kinds: Annotated[bool, typer.Option("--kinds", help="Groups of one kind, such as down_proj, instead.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Ranks groups of layers by what a briefly trained mask on each alone does to the validation loss."""
    from mft.cli.sensitivity import run_sensitivity

    run_sensitivity(_read(config, overrides, sets), None if kinds else layers, overwrite=overwrite)


@app.command()
def plot(
    what: Annotated[str, typer.Argument(help="summary, bytes, forgetting, surface, overlap or flips.")],
    directories: Annotated[
        list[Path],
        typer.Argument(
            help="A finished mft compare's; of summary, bytes and forgetting: or a table.json; of flips: runs of mft "
            "train."
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A PNG; by default beside what it shows.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Of surface; the first if not given.")] = None,
    arm: Annotated[str | None, typer.Option(help="Of surface and overlap: one of MFT; the first if not given.")] = None,
    rows: Annotated[int, typer.Option(help="Of surface: validation rows that every point sees.")] = 32,
    points: Annotated[int, typer.Option(help="Of surface: points along each axis.")] = 11,
) -> None:
    """Pictures of a study: differences from the control, loss against bytes, gain against forgetting, loss surface,
    overlap of masks; flips over training."""
    from mft.cli.study import run_plot

    run_plot(what, directories, output, domain=domain, arm=arm, rows=rows, points=points)


@app.command()
def merge(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="Where the ordinary model goes.")],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    alpha: Annotated[
        float, typer.Option(help="How far from the base, in (0, 1]: dropped weights are scaled by 1 - alpha.")
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Bake masks into the weights: kept ones bit-equal, dropped ones +0."""
    from mft.cli.masks import run_merge

    run_merge(masks, output, model, dtype, force=force, alpha=alpha)


@app.command()
def serve(
    masks: Annotated[
        list[str] | None,
        typer.Option(help="name=DIR, an output_dir of mft train, its masks/, or user/repo[@revision]; repeatable."),
    ] = None,
    masks_file: Annotated[
        Path | None, typer.Option(help="A file with name=DIR in each line; SIGHUP reads it again.")
    ] = None,
    load_from: Annotated[
        Path | None, typer.Option(help="Let clients load masks from below this directory, and unload masks.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "--base", help="The base; by default the one of the first masks.")
    ] = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="A key per line, one of which clients must send; SIGHUP reads it again.")
    ] = None,
    host: Annotated[str, typer.Option(help="Whom it listens to; 0.0.0.0 is everyone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name, or * for any, that clients may ask for besides loopback's.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests that are answered at once.")] = 8,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait beside them.")] = 64,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer; by default the base's positions.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of an answer whose request names none; by default 16, and of a chat all there is."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Seconds for a request, waiting included; by default no limit.")
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, max=86400, help="Seconds for what is being answered, at SIGTERM or SIGINT.")
    ] = 30,
    log_format: Annotated[str, typer.Option(help="Of the log: text, or json, an object per line.")] = "text",
    log_level: Annotated[str, typer.Option(help="Of the log: debug, info, warning or error.")] = "info",
    log_zone: Annotated[
        str, typer.Option(help="Of times in the log: local, UTC, or a name like Europe/Berlin.")
    ] = "local",
) -> None:
    """Many tasks' masks on one base over HTTP, as OpenAI's API: the model's name chooses the task."""
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
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
Temperature = Annotated[
    float, typer.Option(min=0, help="0: the likeliest token each time; 1: drawn as the model says; more: wilder.")
]
AnswerSeed = Annotated[int, typer.Option(min=0, help="Of what is drawn, the same for each answer.")]


@app.command()
def generate(
    run: Run,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="A message, or with --raw a text to continue.")],
    raw: Annotated[bool, typer.Option("--raw", help="Without the chat template that the tokenizer has.")] = False,
    only: Only = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0,
    seed: AnswerSeed = 0,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """One prompt, answered by the base and by the base with the masks."""
    from mft.cli.generate import Sampling, run_generate

    sampling = Sampling(max_tokens, temperature, seed)
    run_generate(run, prompt, sampling, raw=raw, only=only, model_name=model, dtype=dtype, force=force)


@app.command()
def chat(
    run: Run,
    only: Only = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0,
    seed: AnswerSeed = 0,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """A conversation with the base and with the base with the masks, each in its own; Ctrl-D ends it."""
    from mft.cli.generate import Sampling, run_chat

    run_chat(run, Sampling(max_tokens, temperature, seed), only=only, model_name=model, dtype=dtype, force=force)


@app.command()
def inspect(
    masks: Masks,
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
    every_row: Annotated[bool, typer.Option("--all", help="A row per masked layer, not per kind of layer.")] = False,
) -> None:
    """Kept share, flips since initialisation and overlap with the magnitude mask, per kind of layer and in total."""
    from mft.cli.masks import run_inspect

    run_inspect(masks, model, dtype, force=force, every_row=every_row)


@app.command()
def verify(
    directory: Annotated[
        str, typer.Argument(help="An output_dir, its masks/, one of its checkpoints, or user/repo[@revision].")
    ],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    base: Annotated[bool, typer.Option("--base/--no-base", help="Whether to load the base and compare it.")] = True,
) -> None:
    """Whether masks and checkpoints are whole, and the base is the one that the masks were learned on."""
    from mft.cli.verify import run_verify

    run_verify(directory, model, dtype, base=base)


@app.command()
def recode(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="Where they go; may be the directory that they come from.")],
    coding: Annotated[
        str,
        typer.Option(
            help="rice: about their entropy; by_weight: smaller, read with the base alone; packed: 1 bit each."
        ),
    ] = "rice",
    model: BaseModel = None,
    dtype: BaseDtype = None,
) -> None:
    """Write masks again in another coding: the same masks and content hash. by_weight loads the base, others do not."""
    from mft.cli.masks import run_recode

    run_recode(masks, output, coding, model, dtype)


@app.command()
def patch(
    model: Annotated[Path, typer.Argument(help="A GGUF file; with --undo one that was patched.")],
    masks_and_output: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MASKS] [OUTPUT]", help="Masks as for mft merge, and the new GGUF file; with --undo OUTPUT alone."
        ),
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Give the original back, from MODEL and MODEL.undo.")] = False,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Change MODEL itself; a running llama.cpp sees it at once. No OUTPUT.")
    ] = False,
    widen: Annotated[
        str | None, typer.Option(help="f32: store masked tensors in it whose type has no exact zero.")
    ] = None,
    lora: Annotated[
        Path | None, typer.Option(help="Write a LoRA adapter there instead, for what can only add. No OUTPUT.")
    ] = None,
    base: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Put masks into a GGUF file: dropped weights become exact zeros, every other weight keeps its bits; and back."""
    _let_waiting_threads_sleep()
    from mft.cli.patch import Request, run_patch

    run_patch(Request(model, tuple(masks_and_output or ()), undo, in_place, widen, lora, base, dtype, force))


@app.command()
def push(
    directory: Annotated[
        Path, typer.Argument(help="An output_dir or its masks/, what PEFT saved, or a model that was merged.")
    ],
    repository: Annotated[str, typer.Argument(help="user/name on the hub; made where there is none.")],
    revision: Annotated[
        str | None,
        typer.Option("--revision", "--branch", help="A branch, made where there is none; main if not given."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is shown to its owner alone.")] = False,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    license: Annotated[
        str | None, typer.Option(help="For the card, such as apache-2.0; that of the base's card if it lies here.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base's name on the hub, if it is named by a path here.")] = None,
    coding: Annotated[
        str | None, typer.Option(help="For masks: rice, entropy-coded, or packed; as they lie here if not given.")
    ] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a README.md on the hub, whoever wrote it.")
    ] = False,
) -> None:
    """Upload masks or a merged model to the Hugging Face Hub with a model card, in one commit."""
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


@app.command("import-masks")
def import_masks(
    path: Annotated[Path, typer.Argument(help="A masks.pt of the paper's code.")],
    output: Annotated[Path, typer.Argument(help="Where the masks go.")],
    model: Annotated[str, typer.Option(help="The base that they are for.")],
    dtype: Annotated[str, typer.Option(help="Of the base.")] = "bfloat16",
) -> None:
    """Masks of the paper's code, as masks of ours; the one pickle that is ever read, by torch's weights-only loader."""
    from mft.cli.masks import run_import_masks

    run_import_masks(path, output, model, dtype)


@app.command("export-masks")
def export_masks(
    masks: Masks,
    output: Annotated[Path, typer.Argument(help="The new masks.pt.")],
    model: BaseModel = None,
    dtype: BaseDtype = None,
    force: Annotated[bool, typer.Option("--force", help="Use masks that were learned on another base.")] = False,
) -> None:
    """Masks in the form of the paper's code."""
    from mft.cli.masks import run_export_masks

    run_export_masks(masks, output, model, dtype, force=force)


@app.command()
def estimate(
    ctx: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of --config.", metavar="[KEY=VALUE]...")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A shipped name, a config.json, a model directory or a hub id.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="A study by rewards: each of its arms, in place of the options."),
    ] = None,
    layers: Annotated[str, typer.Option(help="Masked layers, such as 4-7, or all.")] = "all",
    sequence: Annotated[int, typer.Option(help="Tokens per row.")] = _DEFAULTS.data.sequence_length,
    micro_batch: Annotated[int, typer.Option(help="Rows at once.")] = _DEFAULTS.train.batch_size,
    accumulation: Annotated[int, typer.Option(help="Micro-batches per step.")] = _DEFAULTS.train.accumulation,
    batches_at_once: Annotated[
        int | None, typer.Option(help="Of layerwise: micro-batches whose boundaries the host holds; those that fit.")
    ] = None,
    processes: Annotated[int, typer.Option(help="That torchrun starts on the machine, a GPU each.")] = 1,
    memory: Annotated[str, typer.Option(help="auto, plain, in_place, resident, quantized or layerwise.")] = "auto",
    gpu: Annotated[str | None, typer.Option(help="Its memory, such as 24GB or 24GiB.")] = None,
    cpu: Annotated[str | None, typer.Option(help="Without a GPU: memory; this machine's if not given.")] = None,
    host: Annotated[str | None, typer.Option(help="Memory beside the GPU; this machine's if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = _DEFAULTS.model.dtype,
    scores: Annotated[str, typer.Option(help="auto, float32, bfloat16 or int16.")] = _DEFAULTS.mask.scores_dtype,
    moments: Annotated[str, typer.Option(help="auto, float32 or 8bit.")] = _DEFAULTS.train.moments,
    grad_dtype: Annotated[str | None, typer.Option(help="Of the gradient buffers; the weights' if not given.")] = None,
    quantization: Annotated[str | None, typer.Option(help="nf4, nf4-dq or int8, of the base.")] = None,
    quantize_masked: Annotated[bool, typer.Option("--quantize-masked", help="The masked weights too.")] = False,
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Of plain.")] = False,
    target_modules: Annotated[str | None, typer.Option(help="Linear layers, such as up_proj,down_proj.")] = None,
    budget: Annotated[float | None, typer.Option(help="Share of all masked weights that is dropped.")] = None,
    objective: Annotated[str, typer.Option(help="kl, distill (its teacher not counted) or dpo.")] = "cross_entropy",
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """What each way of training needs of memory and time, without loading a weight; exit code 2 if nothing fits."""
    from mft.cli.estimate import STEP, parse_bytes, run_estimate
    from mft.config import parse_layers
    from mft.memory.workload import Workload

    if model is None and config is None:
        raise ValueError("--model or --config must be given, got neither")
    if gpu is not None and cpu is not None:
        raise ValueError(f"--gpu or --cpu must be given, got both, {gpu} and {cpu}: --host is the memory beside a GPU")
    if gpu is None and host is not None:
        raise ValueError(f"--host must come with --gpu, got {host} alone: --cpu is the one memory where there is none")
    sizes = [parse_bytes(size, option) for size, option in ((gpu, "--gpu"), (cpu, "--cpu")) if size is not None]
    device_bytes, device = sizes[0] if sizes else None, "cpu" if gpu is None else "cuda"
    if config is not None:
        from mft.cli.estimate_rewards import run_estimate_rewards

        _check_only(ctx, {"model", "config", "gpu", "cpu", "as_json", "overrides"}, "--config, whose study says it")
        if not run_estimate_rewards(
            config, overrides or [], model, device=device, device_bytes=device_bytes, as_json=as_json
        ):
            raise typer.Exit(2)
        return
    if overrides:
        raise ValueError(f"KEY=VALUE must come with --config, got {' '.join(overrides)}")
    assert model is not None
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
        budget=budget,
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


@app.command()
def schema(what: Annotated[str, typer.Argument(help="run, or study: what mft compare reads.")] = "run") -> None:
    """A JSON Schema of YAML files, by which editors complete and check them."""
    check_one_of("what", what, ("run", "study"))
    written = run_schema() if what == "run" else study_schema()
    typer.echo(json.dumps(written, indent=2))


@app.command()
def env(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time ours beside dense and eager PyTorch, in less than 30 s.")
    ] = False,
) -> None:
    """Versions, threads, the processor, and which kernels serve which device."""
    from mft.cli.environment import run_env

    run_env(measure=measure)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where its files go.")] = Path("runs/demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run that lies there. That of an earlier demo goes anyway.")
    ] = False,
) -> None:
    """A mask on SmolLM2-135M learns the standard library's source: text and loss before and after, in minutes."""
    _let_waiting_threads_sleep()
    from mft.cli.demo import demo_config, run_demo

    run_demo(demo_config(output), overwrite=overwrite)


def main() -> None:
    """The console script."""
    app()


def _let_waiting_threads_sleep() -> None:
    """Before torch is loaded, on a busy machine: libgomp's threads wait for each other asleep, after a short spin.

    On their own they spin for milliseconds, on a core that another process may have in mid-product: 2 threads of mft
    train then took 17 times as long as one. What is computed stays. 1000 turns are what libgomp takes itself where it
    knows of more threads than cores. On free cores the long spin is a tenth faster and stays (SmolLM2-135M, Zen 4).
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(asked) if asked.isdecimal() and int(asked) else len(os.sched_getaffinity(0))
    if threads > 1 and (found := core_share(threads)).is_busy:
        os.environ["GOMP_SPINCOUNT"] = "1000"
        say(
            f"{found}, other processes use the rest: threads that wait sleep soon (GOMP_SPINCOUNT=1000)", style="yellow"
        )


def _check_only(ctx: typer.Context, names: set[str], beside: str) -> None:
    """Raise ValueError if other options than these were given."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name not in names and _is_given(ctx, name):
            raise ValueError(f"{parameter.opts[0]} must not come with {beside}, got {ctx.params[name]}")


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, be it with its default."""
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
) -> Any:
    """How a run of finetune or train begins."""
    from mft.training.resume import Begin, Resume

    if resume is None:
        if force:
            raise ValueError("--force must come with --resume, got it alone")
        return Begin(_read(config, overrides, sets), overwrite=overwrite)
    if overwrite:
        raise ValueError("--overwrite must not come with --resume: one deletes the run, the other goes on with it")
    return Resume(resume, config, [*(overrides or []), *(sets or [])], force=force)


def _read(config: Path | None, overrides: list[str] | None, sets: list[str] | None) -> RunConfig:
    return load_config(None if config is None else str(config), [*(overrides or []), *(sets or [])])


if __name__ == "__main__":
    main()
