"""How many tokens a prompt and its answer may have together."""

from typing import Any

from mft.models.next_tokens import longest_row


def row_length(asked: int | None, config: Any, name: str) -> int:
    """What is asked for, or as many as the model of this transformers configuration has positions for.

    Raises: ValueError if that is more than it has, or nothing is asked for and its positions have no end.
    """
    longest = longest_row(config)
    if asked is None:
        if longest is None:
            raise ValueError(f"--length must be given, as the positions of {name!r} have no end, got none")
        return longest
    if longest is not None and asked > longest:
        raise ValueError(f"--length must be at most {longest}, as many positions as {name!r} has, got {asked}")
    return asked
