"""Progress on a terminal of any width and elsewhere: every figure complete, times in units that need no conversion."""

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


@pytest.mark.parametrize(
    ("width", "bar", "words"),
    [
        (200, 20, "mask fine-tune 38/1000 loss 2.346 1205 tokens/s 27 min left"),
        (80, 5, "mask fine-tune 38/1000 loss 2.346 1205 tokens/s 27 min left"),
        (75, 0, "mask fine-tune 38/1000 loss 2.346 1205 tokens/s 27 min left"),
        (60, 0, "mask fine-tune 38/1000 loss 2.346 27 min left"),
        (46, 0, "mask fine-tune 38/1000 27 min left"),
    ],
)
def test_a_narrow_terminal_loses_whole_figures_the_least_wanted_first(clock, width, bar, words):
    line = last_line(width, clock, done=38)
    assert [word for word in line.split() if set(word) - set("━╸")] == words.split()
    assert line.index("38/1000") == len("mask fine-tune    ") + 2 + (bar + 2 if bar else 0) + 2


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


def test_the_share_dropped_stands_behind_the_loss_until_another_is_known(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with Progress(console).phase("mask fine-tune", 100) as phase:
        for dropped in (0.000423, None):
            clock(6)
            phase.advance(tokens=60, loss=1, dropped=dropped)
            assert phase.figures == ["loss 1.000", "0.0423 % dropped", "10 tokens/s"]


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


def test_an_evaluation_within_a_run_stands_below_it_and_is_none_of_its_speed(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)

    def shown():
        page = Console(file=io.StringIO(), width=80, color_system=None)
        page.print(phase)
        return [" ".join(line.split()) for line in page.file.getvalue().splitlines()]

    with Progress(console).phase("mask fine-tune", 4) as phase:
        clock(1)
        phase.advance(tokens=60)
        with phase.within("step 1, validation", 10) as inside:
            clock(29)
            inside.advance(5, tokens=290)
            above, below = shown()
            assert above.startswith("mask fine-tune")
            assert below.startswith("step 1, validation")
            assert "5/10 10 tokens/s 29 s left" in below
        assert len(shown()) == 1
        assert phase.figures == ["60 tokens/s"]
        assert "1 min 30 s left" in shown()[0]
        phase.over = True  # although steps are missing
    assert "1/4" in shown()[0]
    assert "in 30 s" in shown()[0]


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
