"""The number of tokens that a prompt and its answer may have together."""

from typing import Any

from mft.models.next_tokens import longest_row


def row_length(asked: int | None, config: Any, name: str) -> int:
    """Return asked, or by default the model's positions. Raises: ValueError for more than these, or if unlimited."""
    longest = longest_row(config)
    if asked is None:
        if longest is None:
            raise ValueError(f"--length must be given, because {name!r} has no limit on positions, got none")
        return longest
    if longest is not None and asked > longest:
        raise ValueError(f"--length must be at most {longest}, as many positions as {name!r} has, got {asked}")
    return asked
