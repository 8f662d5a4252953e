"""Write a terminal's table as GitHub's Markdown, for files."""

from rich.table import Table


def markdown_table(table: Table) -> str:
    """Return title, header line, line of alignments and a line per row. Cells must be strings; | is escaped."""
    columns = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    lines = ([" ".join(text.replace("|", "\\|").split("\n")) for text in cells] for cells in zip(*columns))
    header, *rows = (f"| {' | '.join(cells)} |" for cells in lines)
    alignments = "".join("---:|" if column.justify == "right" else "---|" for column in table.columns)
    title = [str(table.title), ""] if table.title else []
    return "\n".join([*title, header, f"|{alignments}", *rows, ""])
