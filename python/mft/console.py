"""What the verbs print on, and a plain line there."""

from rich.console import Console

console = Console()


def say(line: str) -> None:
    """Unbroken and uncoloured: paths can be copied from it."""
    console.print(line, highlight=False, soft_wrap=True)
