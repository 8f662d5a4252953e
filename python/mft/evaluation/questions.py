"""Split a row into a question: a prompt that is not scored, and one completion that is."""

from torch import Tensor

from mft.data.tokenization import IGNORED


def split_row(
    row: int, ids: Tensor, labels: Tensor, eos: int, max_new_tokens: int | None
) -> tuple[list[int], list[int]]:
    """Return (prompt, completion with its eos) from a row's ids and labels (T,). Padding may follow the completion.

    Args: row: The row's number, for messages. max_new_tokens: Length limit of the completion; None for no limit.
    Raises: ValueError if there is no prompt, or not exactly one completion that ends with eos within max_new_tokens.
    """
    scored = (labels != IGNORED).nonzero().flatten().tolist()
    rule = None
    if not scored or scored[0] == 0:
        rule = "have a prompt that is not scored and a completion that is"
    elif scored[-1] - scored[0] + 1 != len(scored):
        rule = "have one completion, scored in one piece: load it without packing"
    elif ids[scored[-1]] != eos:
        rule = "end its completion with eos: it was cut off, so raise data.sequence_length"
    elif max_new_tokens is not None and len(scored) > max_new_tokens:
        rule = f"be answerable in max_new_tokens = {max_new_tokens}, eos included"
    if rule is not None:
        raise ValueError(f"row {row} of dataset must {rule}, got {len(scored)} scored tokens of {len(ids)}")
    return ids[: scored[0]].tolist(), ids[scored].tolist()
