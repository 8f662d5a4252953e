"""A hostile client: malformed, oversized, cancelled and half-sent requests, on a service in this process."""

import contextlib
import http.client
import itertools
import json
import socket
import struct
import threading
from collections import Counter

LENGTH = 512  # the server's longest row, in tokens
TIMEOUT = 120  # seconds for one answer, on a busy machine

COMPLETION = {"model": "code", "prompt": "3 4 5", "max_tokens": 6, "temperature": 0}
CHAT = {"model": "code", "messages": [{"role": "user", "content": "3 4"}], "max_tokens": 6, "temperature": 0}
WELL_FORMED = [
    ("/v1/completions", COMPLETION),
    ("/v1/completions", COMPLETION | {"model": "tiny", "prompt": "7 8 9 10"}),
    ("/v1/completions", COMPLETION | {"model": "math", "prompt": "40", "stop": ["no such"], "max_tokens": 12}),
    ("/v1/chat/completions", CHAT),
]


def request(body, *head, route="/v1/completions", length=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    given = "".join(line + "\r\n" for line in head)
    if "Host:" not in given:
        given += "Host: localhost\r\n"
    if "Content-Type:" not in given:
        given += "Content-Type: application/json\r\n"
    if "Transfer-Encoding:" not in given and "Content-Length:" not in given:
        given += f"Content-Length: {len(data) if length is None else length}\r\n"
    return f"POST {route} HTTP/1.1\r\n{given}\r\n".encode() + data


def completion(**keys):
    return request(COMPLETION | keys)


def filled(begin, item, end, size):
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
ANSWERED = {
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
CANCELLED = {
    "leaves a stream": (STREAM, True),
    "leaves a stream at once": (STREAM, False),
    "leaves an answer": (completion(max_tokens=400), False),
    "leaves a chat": (request(CHAT | {"max_tokens": 400}, route=CHAT_ROUTE), False),
    "leaves in a body": (request(b'{"model"', length=50_000), False),
    "leaves in a head": (b"POST /v1/completions HTTP/1.1\r\nHost: loc", False),
}
# Requests that stay open until the end.
HALF_SENT = {
    "half a head": b"POST /v1/completions HTTP/1.1\r\nHost: loc",
    "half a body": request(b'{"model": "code"' + b" " * 50_000, length=60_000),
    "half a chunk": request(b"ffff\r\n12345", "Transfer-Encoding: chunked"),
    "nothing": b"",
}


class Client:
    """Sends requests, hostile and well-formed, and notes wrong answers. Threads share one object."""

    def __init__(self, address):
        host, port = address.removeprefix("http://").split(":")
        self.address, self.sent, self.wrong, self.held = (host, int(port)), Counter(), [], []
        self.alone = [self.answer(*each) for each in WELL_FORMED]

    def answer(self, route, body):
        """Return (status, what is answered) of a well-formed request."""
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=TIMEOUT)) as connection:
            connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            found = json.loads(response.read())
        choices = found.get("choices") or [found]
        return response.status, choices[0].get("text") or choices[0].get("message")

    def ask(self, number):
        found = self.again(lambda: self.answer(*WELL_FORMED[number % 4]))
        if found != self.alone[number % 4]:
            self.wrong.append(f"well-formed {number % 4}: {found} for {self.alone[number % 4]}")

    def again(self, work):
        """Return what the work returns. Do it once more if the server closed the connection to make room."""
        for attempt in range(2):
            try:
                return work()
            except OSError as error:
                if attempt or not isinstance(error, ConnectionResetError):
                    self.wrong.append(repr(error))
                    return None
        raise AssertionError

    def send(self, name):
        self.sent[name] += 1
        self.again(lambda: self._send(name))

    def _send(self, name):
        data, awaited = ANSWERED.get(name) or CANCELLED.get(name) or (HALF_SENT[name], None)
        connected = socket.create_connection(self.address, timeout=TIMEOUT)
        # The server may answer and close before it has read everything.
        with contextlib.suppress(ConnectionError):
            connected.sendall(data)
        if name in HALF_SENT:
            self.held.append(connected)
            return
        with connected:
            if name in ANSWERED:
                line = connected.makefile("rb").readline()
                if not line.startswith(f"HTTP/1.1 {awaited} ".encode()):
                    self.wrong.append(f"{name}: {line!r} for {awaited}")
                return
            if awaited and not connected.recv(1000).startswith(b"HTTP/1.1 200 "):
                self.wrong.append(f"{name}: no answer")
            if self.sent[name] % 2:  # end with a reset instead of a close
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def in_threads(count, numbers, work):
    """Start threads that share the numbers; return them."""
    left, lock = iter(numbers), threading.Lock()

    def run():
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


def test_hostile_requests_change_no_answer_and_leave_nothing_behind(serve, until):
    running = serve(rows=8, waiting=64, length=LENGTH, hosts=frozenset(), connections=16)
    client = Client(running.address)
    assert [status for status, _ in client.alone] == [200] * 4
    kinds = [*ANSWERED, *CANCELLED, *list(HALF_SENT) * 4] * 2
    threads = in_threads(4, range(len(kinds)), lambda number: client.send(kinds[number]))
    threads += in_threads(2, range(12), client.ask)
    for each in threads:
        each.join(60)
    assert not any(each.is_alive() for each in threads)
    assert client.sent.total() == len(kinds)
    assert client.wrong == []
    assert len(running.server.server_state.connections) <= 16
    for each in client.held:
        each.close()
    until(lambda: running.scheduler.counts == (0, 0))
    until(lambda: not running.server.server_state.connections)
