"""A service on a local port, on the tiny Llama with two tasks whose masks drop half, for real clients."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest
from tiny import make_llama, make_words

from mft.config import MaskConfig
from mft.masks.bank import load_mask_bank
from mft.masks.convert import mask_model
from mft.masks.export import save_masks
from mft.serving.batch.running_batch import RunningBatch
from mft.serving.batch.scheduler import Scheduler

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{{ message.content + ' 60 ' }}{% endfor %}"
)


def base():
    """Return a model with weights so large that masks decide which token is the likeliest."""
    return make_llama(initializer_range=0.3)


class Recorded(logging.Formatter):
    """Formats only a line's message; its other data goes into a list."""

    def __init__(self, events):
        super().__init__()
        self._events = events

    def format(self, record):
        from mft.escaping import one_line

        self._events.append({"event": record.event, "level": record.levelname, **record.fields})
        return one_line(record.getMessage())


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    masks = {"code": {"layers_to_transform": [2, 3], "seed": 1}, "math": {"layers_to_transform": [1, 2], "seed": 2}}
    return {
        task: save_masks(mask_model(base(), MaskConfig.paper(keep_ratio=0.5, **mask)), root / task)
        for task, mask in masks.items()
    }


@pytest.fixture(scope="session")
def words():
    """Return a tokenizer with one word per number, 0 as the end, and a chat template."""
    made = make_words()
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def serve(exports, words):
    """Yield serve(rows=..., ...), which returns what runs: client, bank, scheduler, server, log lines, address."""
    import openai

    from mft.serving.api.service import Service
    from mft.serving.log import Log
    from mft.serving.port import bind
    from mft.serving.server import Server
    from mft.serving.tasks import Tasks

    started = []

    def start(
        *, rows=4, waiting=8, length=64, cache=1 << 22, grace=5.0, model=None, tokenizer=words, timeout=None, **options
    ):
        connections = options.pop("connections", 64)
        bank = load_mask_bank(model or base(), options.pop("masks", exports))
        batch = RunningBatch(bank, cache)
        batch.check_rows_apart()
        scheduler = Scheduler(batch, rows=rows, waiting=waiting, timeout=timeout)
        lines, events = [], []
        log, tasks = Log(Recorded(events), "info", lines.append), Tasks(bank, scheduler, "tiny")
        service = Service(tasks, tokenizer, scheduler, length=length, log=log, **options)
        bound = bind("127.0.0.1", 0)
        ready = threading.Event()
        server = Server(service.app, scheduler, grace=grace, connections=connections, ready=ready.set)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        assert ready.wait(10)
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=20)
        running = SimpleNamespace(
            client=client, bank=bank, scheduler=scheduler, server=server, lines=lines, address=address, thread=thread
        )
        running.events, running.log, running.tasks = events, log, tasks
        asked = {"prompt": "3 4 5", "temperature": 0, "max_tokens": 8}
        running.text = lambda model: client.completions.create(model=model, **asked).choices[0].text
        running.fails = False
        started.append(running)
        return running

    yield start
    for each in started:
        each.client.close()
        each.server.should_exit = True
        each.thread.join(20)
        assert not each.thread.is_alive()
        assert each.scheduler.has_failed == each.fails


@pytest.fixture
def gate(monkeypatch):
    """Return an event: while it is cleared, only prompts are read; steps counts the steps that passed."""
    opened, step = threading.Event(), RunningBatch.step
    opened.steps = 0

    def wait(batch, rows=None):
        unread = [row for row in batch.rows if not row.read]
        if unread and not opened.is_set():
            return step(batch, unread)
        assert opened.wait(20)
        opened.steps += 1
        return step(batch, rows)

    opened.set()
    monkeypatch.setattr(RunningBatch, "step", wait)
    yield opened
    opened.set()


@pytest.fixture
def until():
    """Return until(condition), which waits for it at most 10 seconds."""

    def wait(condition):
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)

    return wait
