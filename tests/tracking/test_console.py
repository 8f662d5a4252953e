"""The single console: user input is shown as it was given."""

import io

import pytest
from rich.table import Table

from mft.tracking.console import console, new_console, say
from mft.tracking.progress import Progress

TEXTS = ["runs/[lr=3]", "runs/[/y]", "[bold]x[/bold]", "a:fire:b", r"\[x]", "runs/100"]


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_in_a_line_or_a_table_is_markup(text):
    file = io.StringIO()
    shown = new_console(file, width=80)
    shown.print(f"to {text}", style="bold")
    table = Table("run", title=text, title_justify="left")
    table.add_column(text)
    table.add_row(text, text)
    shown.print(table)
    assert file.getvalue().splitlines()[0] == f"to {text}"
    assert file.getvalue().count(text) == 5


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[2J\x07", r"\x1b[2J\x07"),
        ("\r\x08\x0b\x7f", r"\r\x08\x0b\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2066c\u2029", r"a\u202eb\u2066c\u2029"),
        ("\ud800", r"\ud800"),
        ("a\xa0é\u3000👩\u200d🚀", "a\xa0é\u3000👩\u200d🚀"),
    ],
)
def test_no_text_controls_the_terminal(text, seen, capsys):
    say(f"{text}\n{text}", style="bold")
    assert capsys.readouterr().out == f"{seen}\n{seen}\n"
    file = io.StringIO()
    table = Table(text, title=text)
    table.add_row(text)
    new_console(file, width=80).print(table)
    assert file.getvalue().count(seen) == 3
    assert not {letter for letter in file.getvalue() if letter < " "} - {"\n"}


@pytest.mark.parametrize("text", TEXTS)
def test_nothing_in_a_name_of_progress_is_markup(text, capsys):
    say(text)
    with Progress(console).phase(text, 1) as phase:
        phase.advance()
    assert capsys.readouterr().out == f"{text}\n{text}: 1/1  (0 s)\n"


def test_a_table_in_a_pipe_has_one_line_a_row_however_wide(capsys):
    table = Table("layer", "what it is for")
    table.add_row("model.layers.0.mlp.experts.gate_up_proj" * 3, "words that a narrow column would break " * 5)
    console.print(table)
    lines = [line for line in capsys.readouterr().out.splitlines() if "gate_up_proj" in line]
    assert len(lines) == 1
    assert "words that a narrow column would break " * 4 in lines[0]
    file, path = io.StringIO(), "/a/" + 30 * "long/" + "path 1 'x' 0.5 True"
    new_console(file, width=40).print("word " * 20)
    assert max(map(len, file.getvalue().splitlines())) <= 40  # a width that is asked for holds in a file too
    new_console(file, width=40).print(path, soft_wrap=True)
    assert file.getvalue().endswith(f"\n{path}\n")
