"""Progress on a terminal of any width and elsewhere, and times in units that need no conversion."""

import io

import pytest
from rich.console import Console

import mft.tracking.progress
from mft.tracking.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """Return clock(seconds), which advances the time."""
    now = [1000.0]
    monkeypatch.setattr(mft.tracking.progress.time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def last_line(width, clock, name="mask fine-tune", done=1, total=1000, seconds=1.7):
    """Return the line shown when ``done`` of ``total`` steps took ``seconds`` each."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with Progress(console).phase(name, total) as phase:
        for _ in range(done):
            clock(seconds)
            phase.advance(tokens=2048, loss=2.3456)
    page = Console(file=io.StringIO(), width=width, color_system=None)
    page.print(phase)
    return page.file.getvalue().rstrip("\n")


@pytest.mark.parametrize("width", range(20, 131, 5))
@pytest.mark.parametrize("name", ["x", "before, validation", "/a/long/path/of/a/model-[7b], validation"])
def test_a_line_is_one_line(clock, width, name):
    line = last_line(width, clock, name=name, done=3, total=12345)
    assert "\n" not in line
    assert len(line) <= width
    assert "3/12345" in line


def test_the_time_left_is_known_after_the_first_step_and_spent_at_the_end(clock):
    assert "left" not in last_line(80, clock, done=0)
    assert last_line(80, clock, done=1, total=1).rstrip().endswith("in 2 s")


def test_steps_of_an_earlier_process_count_neither_in_speed_nor_in_what_is_left(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Progress(console).phase("mask fine-tune", 100) as phase:
        phase.advance(90, resumed=True)
        assert phase.left is None
        clock(6)
        phase.advance(tokens=60)
        assert phase.left == pytest.approx(54)
        assert phase.figures == ["10 tokens/s"]
        for dropped in (0.000423, None):  # it stands until another is known
            clock(6)
            phase.advance(tokens=60, dropped=dropped)
            assert phase.figures == ["0.0423 % dropped", "10 tokens/s"]


@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}], ids=["file", "dumb"])
def test_elsewhere_a_line_at_most_every_ten_seconds(clock, options):
    console = Console(file=io.StringIO(), width=30, **options)
    with Progress(console).phase("runs/[/y], validation", 1000) as phase:
        for _ in range(9):
            clock(6)
            phase.advance(tokens=60, loss=1)
    assert console.file.getvalue().splitlines() == [
        f"runs/[/y], validation: {done}/1000  loss 1.000  10 tokens/s  ({spent} s, about {left} left)"
        for done, spent, left in [
            (2, 12, "1 h 39 min"),
            (4, 24, "1 h 39 min"),
            (6, 36, "1 h 39 min"),
            (8, 48, "1 h 39 min"),
            (9, 54, "1 h 39 min"),
        ]
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (14 * 60 + 30, "14 min"),
        (7500, "2 h 05 min"),
        (14 * 3600, "14 h"),
        (76 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds, words):
    assert duration(seconds) == words
