"""Write a terminal's table as GitHub's Markdown, for files."""

from rich.table import Table


def markdown_table(table: Table) -> str:
    """Return title, header line, line of alignments and a line per row. Cells must be strings; | is escaped."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    header, *rows = (f"| {' | '.join(map(_cell, cells))} |" for cells in zip(*columns))
    alignments = "".join("---:|" if column.justify == "right" else "---|" for column in table.columns)
    title = [str(table.title), ""] if table.title else []
    return "\n".join([*title, header, f"|{alignments}", *rows, ""])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split("\n"))
