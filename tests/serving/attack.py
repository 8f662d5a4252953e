"""An attack on a real mft serve on loopback, during which a probe must always be answered.

    PYTHONPATH=.:python:tests python tests/serving/attack.py --requests 1000

Twelve threads send a mix: completions, streams and pages of metrics that are not read, bodies that drip, half-open
connections, malformed requests, clients that leave, loads and unloads of masks, and SIGHUP with another list of masks.
Meanwhile a probe asks for /health/live and a small completion. The command fails if the probe gets another status than
200 or has to wait too long, if an answer is wrong, if the server dies, if its sockets, threads and memory do not come
back to what they were after a first round of half as many, or if its log has a traceback. Linux only: it reads /proc.
"""

import argparse
import itertools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from hostile_client import (
    ANSWERED,
    CANCELLED,
    COMPLETION,
    HALF_SENT,
    MOST_GROWTH,
    Address,
    Hostile,
    completion,
    in_threads,
    mebibytes,
    memory,
    request,
    server,
    write_base,
)

THREADS = 12
# Held at a time: fewer streams than --rows, so that completions get on; more metrics than the server keeps connections.
MOST_STREAMS, MOST_METRICS, MOST_DRIPPING = 6, 350, 50
MOST_THREADS = 4  # more than after the first round: the loop's pool grows when it is busy, and is bounded
LIVE_SECONDS, ANSWER_SECONDS = 10, 60  # for the probe, on a busy machine
SETTLED = 45  # seconds after which nothing must be left: those for a request and a few more
TASKS = 8  # names under which masks are loaded and unloaded
IDLE = {"running": 0, "waiting": 0}
HELD = {
    "unread stream": completion(stream=True, max_tokens=200),
    "unread metrics": b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50,
    "dripping body": request(b'{"model": "code"', length=50_000),
}
MALFORMED = [name for name in ANSWERED if "oversized" not in name]


class Attack:
    """The mix of requests to one server. Threads share one object."""

    def __init__(self, process: subprocess.Popen, address: Address, root: Path) -> None:
        self._process, self._address, self._root = process, address, root
        self._hostile, self._lock = Hostile(address), threading.Lock()
        self.sent: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._held: dict[str, deque[socket.socket]] = {
            "unread stream": deque(maxlen=MOST_STREAMS),
            "unread metrics": deque(maxlen=MOST_METRICS),
            "dripping body": deque(maxlen=MOST_DRIPPING),
        }
        self._kinds = [
            "completion",
            *self._held,
            "load",
            "malformed",
            "unread metrics",
            "unread metrics",
            "half-open",
            "unload",
            "reload",
        ]
        self._names = {"malformed": itertools.cycle(MALFORMED), "half-open": itertools.cycle([*HALF_SENT, *CANCELLED])}
        self._alone = address.ask("/v1/completions", COMPLETION)

    def send(self, number: int) -> None:
        kind = self._kinds[number % len(self._kinds)]
        self.sent[kind] += 1
        try:
            if kind == "completion":
                self.ask(number)
            elif kind in self._held:
                self._hold(kind)
            elif kind in self._names:
                with self._lock:
                    name = next(self._names[kind])
                self._hostile.send(name)
            elif kind == "reload":
                (self._root / "listed").write_text(f"listed{number % 3}={self._root / 'code'}")
                self._process.send_signal(signal.SIGHUP)
            else:
                self._change(kind, f"task{number // len(self._kinds) % TASKS}")
        except OSError as error:
            self.wrong.append(f"{kind}: {error!r}")

    def ask(self, _: int) -> None:
        found = self._address.ask("/v1/completions", COMPLETION, timeout=ANSWER_SECONDS)
        if found != self._alone:
            self.wrong.append(f"a completion must be {self._alone}, got {found}")

    def drip(self) -> None:
        """Send one more byte of each body that drips."""
        with self._lock:
            for each in self._held["dripping body"]:
                with suppress(OSError):  # closed by the server, since its time is over or to make room
                    each.send(b" ")

    def close(self) -> list[str]:
        """Close what is held. Return what went wrong."""
        self._hostile.close()
        for held in self._held.values():
            while held:
                held.pop().close()
        return self.wrong + self._hostile.wrong

    def _hold(self, kind: str) -> None:
        data = HELD[kind]
        connected = socket.socket()
        connected.settimeout(LIVE_SECONDS)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connected.connect((self._address.host, self._address.port))
        with suppress(ConnectionError):  # the server may already have closed it to make room
            connected.sendall(data)
        held = self._held[kind]
        with self._lock:
            oldest = held.popleft() if len(held) == held.maxlen else None
            held.append(connected)
        if oldest is not None:
            oldest.close()

    def _change(self, kind: str, name: str) -> None:
        body = {"lora_name": name} | ({"lora_path": "code"} if kind == "load" else {})
        status, said = self._address.exchange("POST", f"/v1/{kind}_lora_adapter", body)
        if status not in (200, 400, 404):  # 400: it is loaded, or being unloaded; 404: it is not loaded
            self.wrong.append(f"{kind}: {status} {said!r}")


class Probe(threading.Thread):
    """Asks for /health/live and a small completion in turn, until it is told to stop."""

    def __init__(self, attack: Attack, address: Address) -> None:
        super().__init__(daemon=True)
        self._attack, self._address = attack, address
        self.is_over = threading.Event()
        self.seconds: dict[str, list[float]] = {"/health/live": [], "a completion": []}
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self.is_over.wait(0.05):
            for name, ask in {"/health/live": self._live, "a completion": lambda: self._attack.ask(0)}.items():
                began = time.monotonic()
                try:
                    ask()
                except OSError as error:
                    self.wrong.append(f"the probe must get {name}, got {error!r}")
                self.seconds[name].append(time.monotonic() - began)
            self._attack.drip()

    def _live(self) -> None:
        found = self._address.get("/health/live", timeout=LIVE_SECONDS)
        if found != {"status": "live"}:
            self.wrong.append(f"the probe must get /health/live, got {found}")


@dataclass(frozen=True)
class Level:
    """What a server takes. memory: in bytes."""

    sockets: int
    threads: int
    memory: int

    @classmethod
    def of(cls, process: subprocess.Popen) -> "Level":
        sockets = 0
        for each in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                sockets += os.readlink(each).startswith("socket:")
        return cls(sockets, len(list(Path(f"/proc/{process.pid}/task").iterdir())), memory(process, "VmRSS"))

    def __str__(self) -> str:
        return f"{self.sockets} sockets, {self.threads} threads, {mebibytes(self.memory)}"


def attacked(process: subprocess.Popen, address: Address, root: Path, requests: int) -> tuple[Level, list[str]]:
    """Send so many requests. Return what the server takes after it has answered them, and what went wrong."""
    began = time.monotonic()
    attack = Attack(process, address, root)
    probe = Probe(attack, address)
    probe.start()
    for each in in_threads(THREADS, range(requests), attack.send):
        each.join()
    probe.is_over.set()
    probe.join()
    wrong = attack.close() + probe.wrong
    if process.poll() is not None:
        return Level(0, 0, 0), [*wrong, f"the server must live, got exit code {process.returncode}"]
    took, end = time.monotonic() - began, time.monotonic() + SETTLED
    # What is left: the socket that listens, the loop's own two, and the one that asks here.
    while (health := address.get("/health")) != IDLE or Level.of(process).sockets > 4:
        if time.monotonic() > end:
            wrong.append(f"nothing must be left, got {health} and {Level.of(process)}")
            break
        time.sleep(0.2)
    print(f"{requests} requests in {took:.0f} s: {', '.join(f'{n} {kind}' for kind, n in attack.sent.items())}")
    for name, seconds in probe.seconds.items():
        print(
            f"the probe got {name} {len(seconds)} times, in {median(seconds):.2f} s (median) and {max(seconds):.2f} s"
        )
    return Level.of(process), wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="An attack on mft serve, with a probe.")
    parser.add_argument("--requests", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, log = Path(folder), Path(folder, "log")
        options = write_base("tiny", root)
        (root / "listed").write_text(f"listed0={root / 'code'}")
        options += ["--load-from", folder, "--masks-file", str(root / "listed")]
        with server(options, log) as (process, address):
            before, wrong = attacked(process, address, root, given.requests // 2)
            print(f"after the first round: {before}", flush=True)
            after, more = attacked(process, address, root, given.requests)
            print(f"after the attack: {after}")
            wrong += more
        if after.sockets > before.sockets or after.threads > before.threads + MOST_THREADS:
            wrong.append(f"sockets and threads must come back to {before}, got {after}")
        if after.memory > before.memory + MOST_GROWTH:
            wrong.append(f"memory must grow by at most {mebibytes(MOST_GROWTH)} from {before}, got {after}")
        if "Traceback" in log.read_text() or "never retrieved" in log.read_text():
            wrong.append(f"the log must have no traceback, got\n{log.read_text()[-5000:]}")
    print("\n".join((*wrong[:20], f"{len(wrong)} faults")))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
