"""A hostile client of a real mft serve on loopback: python tests/serving/hostile_client.py [--model NAME] [--soak N]

It starts mft serve with masks that it makes itself, and sends malformed, oversized, cancelled and half-sent requests
from eight threads. Well-formed requests in between must get the same answers as without attack, and every malformed one
its status. It fails if the server's memory (VmHWM) exceeds 1.2 times that after loading, if the server's log has a
traceback, or if SIGTERM does not end the server. --soak N sends N small requests of every kind, and fails if memory
grows after the first third. Linux only: it reads /proc.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

LENGTH = 512  # for --length: a row's keys and values are legitimate, but they take memory
MOST_MEMORY = 1.2  # times the memory after loading
MOST_GROWTH = 16 << 20  # bytes in the last two thirds of a soak
MOST_HELD = 300  # half-sent requests at a time
LEAST_ANSWERED = 20  # well-formed requests during the attack, which lasts at least that long
TIMEOUT = 120  # seconds for one answer, on a busy machine

COMPLETION = {"model": "code", "prompt": "3 4 5", "max_tokens": 6, "temperature": 0}
CHAT = {"model": "code", "messages": [{"role": "user", "content": "3 4"}], "max_tokens": 6, "temperature": 0}
WELL_FORMED = [
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"prompt": "7 8 9 10"}),
    ("/v1/completions", COMPLETION | {"prompt": "40", "stop": ["no such"], "max_tokens": 12}),
    ("/v1/chat/completions", CHAT),
]


@dataclass(frozen=True)
class Address:
    host: str
    port: int

    def ask(self, route: str, body: dict, *, timeout: float = TIMEOUT) -> tuple[int, str]:
        """Return (status, text) of a well-formed request."""
        status, data = self.exchange("POST", route, body, timeout=timeout)
        found = json.loads(data)
        if status != 200:
            return status, found["error"]["message"]
        choice = found["choices"][0]
        return 200, choice["text"] if "text" in choice else choice["message"]["content"]

    def get(self, route: str, *, timeout: float = TIMEOUT) -> dict:
        return json.loads(self.exchange("GET", route, timeout=timeout)[1])

    def exchange(
        self, method: str, route: str, body: dict | None = None, *, timeout: float = TIMEOUT
    ) -> tuple[int, bytes]:
        """Return (status, body). If the server closes the connection to make room for others, connect once more."""
        for is_last in (False, True):
            connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
            with contextlib.closing(connection):
                try:
                    connection.request(
                        method, route, json.dumps(body) if body else None, {"Content-Type": "application/json"}
                    )
                    response = connection.getresponse()
                    return response.status, response.read()
                except ConnectionResetError:
                    if is_last:
                        raise
        raise AssertionError

    def send(self, data: bytes) -> socket.socket:
        connected = socket.create_connection((self.host, self.port), timeout=TIMEOUT)
        # The server may answer and close before it has read everything.
        with contextlib.suppress(ConnectionError):
            connected.sendall(data)
        return connected


# ---------------------------------------------------------------------------------------------- what is sent


def request(body: bytes | dict, *head: str, route: str = "/v1/completions", length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = "".join(line + "\r\n" for line in head)
    if "Host:" not in given:
        given += "Host: localhost\r\n"
    if "Content-Type:" not in given:
        given += "Content-Type: application/json\r\n"
    if "Transfer-Encoding:" not in given and "Content-Length:" not in given:
        given += f"Content-Length: {len(data) if length is None else length}\r\n"
    return f"POST {route} HTTP/1.1\r\n{given}\r\n".encode() + data


def completion(**keys: object) -> bytes:
    return request(COMPLETION | keys)


def filled(begin: str, item: str, end: str, size: int) -> bytes:
    """Return a body of about ``size`` bytes that repeats one item, which may contain a number."""
    count = size // (1 + len(item % 10_000 if "%d" in item else item))
    items = (item % i for i in range(count)) if "%d" in item else itertools.repeat(item, count)
    return (begin + ",".join(items) + end).encode()


CHAT_ROUTE = "/v1/chat/completions"
ALLOWED = 60_000  # bytes; a body of this size is not refused for its size
HUGE = 15_800_000
MESSAGES, STOP = '{"model": "code", "messages": [', '{"model": "code", "prompt": "3", "stop": ['
PROMPT = '{"model": "code", "prompt": ['

# {name: (what is sent, the expected status)}
ANSWERED: dict[str, tuple[bytes, int]] = {
    "no JSON": (request(b"{"), 400),
    "no UTF-8": (request(b'{"model": "\xff"}'), 400),
    "brackets": (request(b"[" * ALLOWED), 400),
    "an empty body": (request(b""), 400),
    "NaN": (request(b'{"model": "code", "prompt": "3", "temperature": NaN}'), 400),
    "a number of 50,000 digits": (request(b'{"model": "code", "prompt": [' + b"1" * 50_000 + b"]}"), 400),
    "messages of zeros": (request(filled(MESSAGES, "0", "]}", ALLOWED), route=CHAT_ROUTE), 400),
    "messages of nothing": (request(filled(MESSAGES, "{}", "]}", ALLOWED), route=CHAT_ROUTE), 400),
    "too many messages": (
        request(filled(MESSAGES, '{"role":"user","content":""}', "]}", 75_000), route=CHAT_ROUTE),
        400,
    ),
    "stop strings of zeros": (request(filled(STOP, "0", "]}", ALLOWED)), 400),
    "many stop strings": (request(filled(STOP, '"a"', "]}", ALLOWED)), 400),
    "unknown keys": (request(filled("{", '"%d":0', "}", ALLOWED)), 400),
    "many prompts": (request(filled(PROMPT, '"a"', "]}", ALLOWED)), 400),
    "many tokens": (request(filled(PROMPT, "3", "]}", ALLOWED)), 400),
    "unknown tokens": (request(filled(PROMPT, "-1", "]}", ALLOWED)), 400),
    "a long prompt": (completion(prompt="3 " * 30_000), 400),
    "one long word": (completion(prompt="a" * ALLOWED), 400),
    "too many tokens asked for": (completion(max_tokens=10**9), 400),
    "an unknown model": (completion(model="a" * 200), 404),
    "another type": (request(COMPLETION, "Content-Type: text/plain"), 415),
    "a stranger's name": (request(COMPLETION, "Host: stranger.example"), 403),
    "an unknown route": (request(COMPLETION, route="/" + "a" * 5000), 404),
    "another method": (b"PUT /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n", 405),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64 + b"\r\n\r\n", 400),
    "a long head": (b"POST / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 9000, 400),
    "a negative length": (request(COMPLETION, "Content-Length: -1"), 400),
    "two lengths": (request(COMPLETION, "Content-Length: 5", "Content-Length: 6"), 400),
    "a length and chunks": (request(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    "a length of a terabyte": (request(b"{", length=10**12), 413),
    "oversized messages of zeros": (request(filled(MESSAGES, "0", "]}", HUGE), route=CHAT_ROUTE), 413),
    "oversized stop strings of zeros": (request(filled(STOP, "0", "]}", HUGE)), 413),
    "oversized chunks": (request(b"fffff\r\n%s\r\n" % (b" " * 0xFFFFF) * 4, "Transfer-Encoding: chunked"), 413),
}  # fmt: skip
STREAM = completion(stream=True, max_tokens=400)
# {name: (what is sent, whether to wait for the begin of the answer)}; then the client leaves
CANCELLED: dict[str, tuple[bytes, bool]] = {
    "leaves a stream": (STREAM, True),
    "leaves a stream at once": (STREAM, False),
    "leaves an answer": (completion(max_tokens=400), False),
    "leaves a chat": (request(CHAT | {"max_tokens": 400}, route=CHAT_ROUTE), False),
    "leaves in a body": (request(b'{"model"', length=50_000), False),
    "leaves in a head": (b"POST /v1/completions HTTP/1.1\r\nHost: loc", False),
}
# Requests that stay open until the end.
HALF_SENT: dict[str, bytes] = {
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: loc",
    "half a body": request(b'{"model": "code"' + b" " * 50_000, length=60_000),
    "half a chunk": request(b"ffff\r\n12345", "Transfer-Encoding: chunked"),
    "nothing": b"",
}


@dataclass
class Hostile:
    """A record of what was sent, and of wrong answers. Threads share one object."""

    address: Address
    sent: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    held: list[socket.socket] = field(default_factory=list)

    def send(self, name: str) -> None:
        """Send one request. If the server closes the connection to make room for others, connect once more."""
        self.sent[name] += 1
        for is_last in (False, True):
            try:
                self._send(name)
            except OSError as error:
                if not is_last and isinstance(error, ConnectionResetError):
                    continue
                self.wrong.append(f"{name}: {error!r}")
            return

    def close(self) -> None:
        for each in self.held:
            each.close()

    def _send(self, name: str) -> None:
        if name in ANSWERED:
            self._answered(name)
        elif name in CANCELLED:
            self._cancelled(name)
        else:
            self.held.append(self.address.send(HALF_SENT[name]))
            if len(self.held) > MOST_HELD:
                self.held.pop(0).close()

    def _answered(self, name: str) -> None:
        data, status = ANSWERED[name]
        with self.address.send(data) as connected:
            line = connected.makefile("rb").readline()
        if not line.startswith(f"HTTP/1.1 {status} ".encode()):
            self.wrong.append(f"{name}: {line!r} for {status}")

    def _cancelled(self, name: str) -> None:
        data, is_awaited = CANCELLED[name]
        with self.address.send(data) as connected:
            if is_awaited and not connected.recv(1000).startswith(b"HTTP/1.1 200 "):
                self.wrong.append(f"{name}: no answer")
            if self.sent[name] % 2:  # end with a reset instead of a close
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


# ---------------------------------------------------------------------------------------------- the server


def write_base(name: str, root: Path) -> list[str]:
    """Write a base and two tasks' masks on it; return the options of mft serve for them."""
    from mft.config import MaskConfig, ModelConfig
    from mft.masks.convert import mask_model
    from mft.masks.export import save_masks
    from mft.training.inputs import read_model

    if name == "tiny":
        sys.path.append(str(Path(__file__).parents[1]))
        from tiny import make_llama, save_llama
        from transformers import AutoTokenizer

        name = str(root / "base")
        save_llama(name)
        make_llama(initializer_range=0.3).save_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        tokenizer.chat_template = "{% for message in messages %}{{ message.content + ' 60 ' }}{% endfor %}"
        tokenizer.save_pretrained(name)
    model, _ = read_model(ModelConfig(name=name, dtype="float32"))
    last = model.config.num_hidden_layers - 1
    masked = mask_model(model, MaskConfig.paper(keep_ratio=0.8, layers_to_transform=[last - 1, last], seed=1))
    save_masks(masked, root / "code")
    return ["--masks", f"code={root / 'code'}", "--model", name, "--dtype", "float32"]


@contextlib.contextmanager
def server(options: list[str], log: Path) -> Iterator[tuple[subprocess.Popen, Address]]:
    """Run mft serve in a process of its own; at the end, SIGTERM must end it."""
    command = [sys.executable, "-m", "mft", "serve", *options, "--port", "0", "--length", str(LENGTH)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 300
        while not (ready := re.search(r" on http://127\.0\.0\.1:(\d+)/v1", log.read_text())):
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"mft serve must start, got\n{log.read_text()}")
            time.sleep(0.1)
        yield process, Address("127.0.0.1", int(ready[1]))
        process.send_signal(signal.SIGTERM)
        if process.wait(60) != 0:
            sys.exit(f"mft serve must end with 0 by SIGTERM, got {process.returncode}\n{log.read_text()[-5000:]}")
    finally:
        process.kill()
        process.wait()


def memory(process: subprocess.Popen, name: str) -> int:
    """Return VmRSS or VmHWM in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def mebibytes(count: float) -> str:
    return f"{count / (1 << 20):,.0f} MiB"


# ---------------------------------------------------------------------------------------------- the two runs


class WellFormed:
    """Requests to the base and its tasks in turn; answers must equal those without any other request."""

    def __init__(self, address: Address) -> None:
        self._address = address
        names = itertools.cycle(each["id"] for each in address.get("/v1/models")["data"])
        self._requests = [(route, body | {"model": name}) for (route, body), name in zip(WELL_FORMED, names)]
        self._alone = [address.ask(*each) for each in self._requests]
        self.seconds: list[float] = []  # one for each answer
        self.wrong = [f"alone: {found}" for found in self._alone if found[0] != 200]

    def ask(self, number: int) -> None:
        index, began = number % len(self._requests), time.monotonic()
        try:
            found = self._address.ask(*self._requests[index])
        except OSError as error:
            found = (0, repr(error))
        self.seconds.append(time.monotonic() - began)
        if found != self._alone[index]:
            self.wrong.append(f"well-formed {index}: {found} for {self._alone[index]}")


def in_threads(count: int, numbers: Iterable[int], work: Callable[[int], None]) -> list[threading.Thread]:
    """Start threads that share the numbers; return them."""
    left, lock = iter(numbers), threading.Lock()

    def run() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None:
                return
            work(number)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for each in threads:
        each.start()
    return threads


def attack(process: subprocess.Popen, address: Address, requests: int) -> list[str]:
    """Send at least ``requests`` hostile requests. Returns: what went wrong."""
    loaded = memory(process, "VmRSS")
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # reset VmHWM: loading itself needs more
    well_formed, hostile = WellFormed(address), Hostile(address)
    kinds = [*ANSWERED, *CANCELLED, *HALF_SENT]
    began = time.monotonic()
    numbers = itertools.takewhile(
        lambda number: number < requests or len(well_formed.seconds) < LEAST_ANSWERED, itertools.count()
    )
    threads = in_threads(8, numbers, lambda number: hostile.send(kinds[number % len(kinds)]))
    while_they_run = itertools.takewhile(lambda _: any(each.is_alive() for each in threads), itertools.count())
    for each in (*threads, *in_threads(2, while_they_run, well_formed.ask)):
        each.join()
    peak, seconds, took = memory(process, "VmHWM"), well_formed.seconds, time.monotonic() - began
    hostile.close()
    print(
        f"{hostile.sent.total()} hostile requests of {len(kinds)} kinds in {took:.0f} s; {len(seconds)} "
        f"well-formed ones between them, answered in {statistics.median(seconds):.1f} s, the slowest in "
        f"{max(seconds):.1f} s\n"
        f"memory: {mebibytes(loaded)} after loading, {mebibytes(peak)} at most, {peak / loaded:.3f} times"
    )
    wrong = [*well_formed.wrong, *hostile.wrong]
    if peak > MOST_MEMORY * loaded:
        wrong.append(f"memory must be at most {MOST_MEMORY} times that after loading, got {peak / loaded:.3f}")
    return wrong


def soak(process: subprocess.Popen, address: Address, requests: int) -> list[str]:
    """Send ``requests``, two thirds of them well-formed. Returns: what went wrong."""
    well_formed, hostile = WellFormed(address), Hostile(address)
    small = [name for name in (*ANSWERED, *CANCELLED) if "oversized" not in name]
    sizes: dict[int, int] = {}

    def work(number: int) -> None:
        if number % max(1, requests // 10) == 0:
            sizes[number] = memory(process, "VmRSS")
            print(f"after {number} requests: {mebibytes(sizes[number])}", flush=True)
        if number % 3 == 2:
            hostile.send(small[number // 3 % len(small)])
        else:
            well_formed.ask(number)

    began = time.monotonic()
    for each in in_threads(8, range(requests), work):
        each.join()
    last = memory(process, "VmRSS")
    print(f"after {requests} requests: {mebibytes(last)}; {time.monotonic() - began:.0f} s")
    growth = last - max(size for number, size in sizes.items() if number <= requests // 3)
    wrong = [*well_formed.wrong, *hostile.wrong]
    if growth > MOST_GROWTH:
        wrong.append(f"memory must not grow by more than {mebibytes(MOST_GROWTH)}, got {mebibytes(growth)}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="A hostile client of mft serve on loopback.")
    parser.add_argument("--model", default="tiny", help="of mft, such as smollm2-135m; by default a tiny one is made")
    parser.add_argument("--requests", type=int, default=2000, help="hostile ones at least")
    parser.add_argument("--soak", type=int, default=0, help="send so many small requests instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        log = Path(root, "log")
        with server(write_base(given.model, Path(root)), log) as (process, address):
            wrong = soak(process, address, given.soak) if given.soak else attack(process, address, given.requests)
            end = time.monotonic() + 30
            while (health := address.get("/health")) != {"running": 0, "waiting": 0} and time.monotonic() < end:
                time.sleep(0.1)
            if any(health.values()):
                wrong.append(f"nothing must be left to answer, got {health}")
        if "Traceback" in log.read_text():
            wrong.append(f"the log must have no traceback, got\n{log.read_text()[-5000:]}")
    print("\n".join((*wrong[:20], f"{len(wrong)} faults")))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
