"""The verbs of "Start here": demo, estimate, env, data.

`mft --help` imports this file and should not wait for transformers: each verb imports its modules itself.
"""

from pathlib import Path
from typing import Annotated

import typer

from mft.cli.keys import Keyed
from mft.cli.options import START, Config, Overrides, Set, given_overrides
from mft.cli.studies import study_function
from mft.cli.waiting_threads import let_waiting_threads_sleep
from mft.config import QUANTIZATIONS, WAYS, RunConfig
from mft.config_file import load_config

verbs = typer.Typer()
_DEFAULTS = RunConfig()  # the defaults of mft train, which mft estimate uses too


@verbs.command(rich_help_panel=START)
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
    let_waiting_threads_sleep()
    from mft.cli.demo import demo_config, run_demo

    run_demo(demo_config(output), overwrite=overwrite)


@verbs.command(rich_help_panel=START)
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
    quantization: Annotated[
        str | None, typer.Option(help=f"Quantisation of the base: {', '.join(QUANTIZATIONS)}.")
    ] = None,
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
        _check_study_options(ctx)
        if not study_function("estimate")(
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


@verbs.command(rich_help_panel=START)
def env(
    measure: Annotated[
        bool, typer.Option("--measure", help="Time our kernels, dense and eager PyTorch, in less than 30 s.")
    ] = False,
) -> None:
    """Show versions, threads, the processor, and which kernels run on which device."""
    from mft.cli.environment import run_env

    run_env(measure=measure)


data = typer.Typer(no_args_is_help=True, help="Show the rows that training and evaluation read.")
verbs.add_typer(data, name="data", rich_help_panel=START)


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


def _check_study_options(ctx: typer.Context) -> None:
    """Raise ValueError for an option that a study sets itself."""
    for parameter in ctx.command.params:
        name = str(parameter.name)
        if name not in ("model", "config", "gpu", "cpu", "as_json", "overrides") and _is_given(ctx, name):
            option, given = parameter.opts[0], ctx.params[name]
            raise ValueError(f"{option} must not come with --config, because its study sets it, got {given}")


def _is_given(ctx: typer.Context, name: str) -> bool:
    """Return whether an option is on the command line, even with its default value."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
