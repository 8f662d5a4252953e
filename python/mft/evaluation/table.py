"""Tables of evaluations for the terminal: each is compared with the first by a paired difference."""

import math

from rich import box
from rich.table import Column, Table

from mft.evaluation.evaluate import Evaluation, paired_difference


def evaluation_table(split: str, results: dict[str, Evaluation]) -> Table:
    """Return a table of the evaluations of one split, each compared with the first."""
    first = next(iter(results.values()))
    table = _table(f"{split}: {_counts(first)}", "model", "loss", "difference", "accuracy", "difference")
    for name, result in results.items():
        loss, accuracy = paired_difference(result, first), paired_difference(result, first, "accuracy")
        table.add_row(
            name,
            f"{result.loss:.4f}",
            "" if result is first else _pair(*loss),
            f"{100 * result.accuracy:.2f} %",
            "" if result is first else _pair(*accuracy, 100, 2),
        )
    return table


def evaluation_tables(split: str, results: dict[str, Evaluation]) -> list[Table]:
    """Return evaluation_table, and for a mix of sources a second table: the held-out loss of each source."""
    tables = [evaluation_table(split, results)]
    if parts := source_losses(results):
        first, *others = results
        headings = ["documents", "tokens", first, *(word for name in others for word in (name, "difference"))]
        table = _table(f"{split} by source: loss; differences from {first}", "source", *headings)
        for source, part in results[first].by_source().items():
            cells = [f"{len(part.documents)}", f"{int(part.tokens.sum())}"]
            for name in results:
                found = parts[source][name]
                cells.append(f"{found['loss']:.4f}")
                if "difference" in found:
                    cells.append(_pair(found["difference"], found["standard error"]))
            table.add_row(source, *cells)
        tables.append(table)
    return tables


def answer_table(split: str, results: dict[str, Evaluation], found: int) -> Table:
    """Return a table of match_answers, each compared with the first. found: answers among which these were chosen."""
    first = next(iter(results.values()))
    count = int(first.tokens.sum())
    title = (
        f"{split}: {count} of {found} answers, generated greedily; right if the text is the data's own, but for white "
        "space at its ends. The difference is paired, ± one standard error over documents."
    )
    table = _table(title, "model", "right", "exact match", "difference")
    for name, result in results.items():
        pair = "" if result is first else _pair(*paired_difference(result, first, "accuracy"), 100, 2)
        table.add_row(name, f"{int(result.correct.sum())} of {count}", f"{100 * result.accuracy:.2f} %", pair)
    return table


def source_losses(results: dict[str, Evaluation]) -> dict[str, dict[str, dict[str, float]]]:
    """Return for each source of a mix, by name: the loss, and the difference from the first result and its error."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    first = next(iter(results.values())).by_source()
    for name, result in results.items():
        for source, part in result.by_source().items():
            values = found.setdefault(source, {})[name] = {"loss": part.loss}
            if len(found[source]) > 1:
                values["difference"], values["standard error"] = paired_difference(part, first[source])
    return found


def figure_lines(objective: str, results: dict[str, Evaluation]) -> list[str]:
    """Return a line per model with the objective's figures; none for cross entropy, which is in the table."""
    return [
        f"{objective}, {name}: {', '.join(f'{key} {figure:.4f}' for key, figure in result.figures.items())}"
        for name, result in results.items()
        if result.figures
    ]


def _table(title: str, first: str, *headings: str) -> Table:
    """Return a table without rows; all columns but the first are of numbers."""
    columns = (Column(heading, justify="right") for heading in headings)
    return Table(first, *columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _counts(result: Evaluation) -> str:
    count = len(result.documents)
    return (
        f"{int(result.tokens.sum())} scored tokens of {count} document{'s' * (count != 1)}. Loss in nats per token; "
        "differences are paired, ± one standard error over documents; accuracy is that of the next token."
    )


def _pair(difference: float, error: float, scale: int = 1, digits: int = 4) -> str:
    """Format a difference with its standard error, which a single document does not have."""
    shown = "" if math.isnan(error) else f"±{scale * error:.{digits}f}"
    return f"{scale * difference:+.{digits}f}{shown}"
