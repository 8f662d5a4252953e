"""Write a terminal's table as GitHub's Markdown, for files."""

from rich.table import Table


def markdown_table(table: Table) -> str:
    """Return the title as a paragraph, if there is one, then a header line, a line of alignments and a line per row.

    The cells must be strings. A ``|`` in them is escaped, and a line break becomes a space.
    """
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    header, *rows = (f"| {' | '.join(map(_cell, cells))} |" for cells in zip(*columns))
    alignments = "".join("---:|" if column.justify == "right" else "---|" for column in table.columns)
    title = [str(table.title), ""] if table.title else []
    return "\n".join([*title, header, f"|{alignments}", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split("\n"))
