"""mft push: upload a directory, and print what was uploaded."""

from pathlib import Path
from typing import Any

from mft.publishing.push import push_to_hub
from mft.tracking.console import say


def run_push(directory: Path, repository: str, **options: Any) -> None:
    """mft push"""
    pushed = push_to_hub(directory, repository, **options)
    for note in pushed.notes:
        say(f"note: {note}")
    say(f"pushed {directory} to {pushed.url}")
    say(f"revision: {pushed.revision}; {repository}@{pushed.revision} always names exactly this state")
