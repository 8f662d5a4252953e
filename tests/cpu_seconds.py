"""A limit on what a test may take, for what would otherwise not end."""

import contextlib
import signal


@contextlib.contextmanager
def cpu_seconds(limit):
    """What needs more of them is ended; a reader that waits, after ten times as many on the clock."""

    def end(number, frame):
        raise AssertionError(f"not done after {limit} CPU seconds: {signal.Signals(number).name}")

    timers = {signal.ITIMER_VIRTUAL: (signal.SIGVTALRM, limit), signal.ITIMER_REAL: (signal.SIGALRM, 10 * limit)}
    before = {number: signal.signal(number, end) for number, _ in timers.values()}
    for timer, (_, seconds) in timers.items():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
