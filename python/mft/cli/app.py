"""mft: full fine-tune, mask fine-tune, evaluate, compare, merge, inspect, from a YAML file and overrides."""

import os
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

import mft
from mft.cli.options import PANELS
from mft.cli.verbs import inspect, share, start, train, use
from mft.escaping import escaped
from mft.tracking.console import console

TRACEBACK = "MFT_TRACEBACK"

# torch reads this at its first allocation: it puts large tensors in huge pages, which saves a page fault per 4 KB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class _OneMessageAnError(typer.core.TyperGroup):
    """Prints errors that the user can fix as one message, with exit code 2. MFT_TRACEBACK=1 shows the traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        commands: Mapping[str, Any] = self.commands  # typer's, which know their group
        return sorted(commands, key=lambda name: PANELS.index(commands[name].rich_help_panel))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_expand_home(argument) for argument in args])

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


def _expand_home(argument: str) -> str:
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


for group in (start, train, use, share, inspect):
    app.add_typer(group.verbs)
for others in entry_points(group="mft.verbs"):  # of mft_study, which mft never imports
    app.add_typer(others.load())


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
