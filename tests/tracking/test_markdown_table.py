"""Tables in files: GitHub's Markdown, which every forge and editor shows as a table."""

from rich.table import Table

from mft.tracking.markdown_table import markdown_table


def test_a_table_becomes_one_of_github_with_its_title_before_it():
    table = Table(title="validation: 12 tokens")
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_row("before", "1.5")
    table.add_row("after")
    assert markdown_table(table) == (
        "validation: 12 tokens\n\n| model | loss |\n|---|---:|\n| before | 1.5 |\n| after |  |\n"
    )


def test_what_would_end_a_cell_is_escaped():
    table = Table("a\nb")
    table.add_row("x|y\nz")
    assert markdown_table(table) == "| a b |\n|---|\n| x\\|y z |\n"
