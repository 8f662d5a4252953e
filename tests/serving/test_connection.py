"""A request must arrive whole and its answer be read in time, and clients that do neither keep no one out."""

import contextlib
import http.client
import json
import socket
import time

import pytest

from mft.serving.api import connection

BODY = json.dumps({"model": "code", "prompt": "3 4", "max_tokens": 2, "temperature": 0}).encode()
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(BODY), BODY)


METRICS = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def dial():
    """Yield dial(running, data), which sends data over a new connection and returns it. buffer: the client's bytes."""
    with contextlib.ExitStack() as stack:

        def connect(running, data=b"", *, buffer=None):
            host, port = running.address.removeprefix("http://").split(":")
            made = stack.enter_context(socket.socket())
            made.settimeout(20)
            if buffer is not None:
                made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            made.connect((host, int(port)))
            made.sendall(data)
            return made

        yield connect


def rest(connected):
    """Return everything that arrives until the server closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connected.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def status(connected):
    """Return the status of one answer, which is read whole."""
    response = http.client.HTTPResponse(connected)
    response.begin()
    response.read()
    return response.status


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(connection, "READ_SECONDS", 0.3)


PARTS = {
    "half a head": HEAD,
    "no body": HEAD + b"Content-Length: 100\r\n\r\n",
    "half a body": HEAD + b"Content-Length: 100\r\n\r\n" + b'{"model": ',
    "half a body in chunks": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n12",
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_request_is_told_so_and_closed_in_time(serve, dial, hurried, until, part):
    running = serve()
    began = time.monotonic()
    answer = rest(dial(running, PARTS[part]))
    assert 0.2 < time.monotonic() - began < 5
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n")
    message = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert message == "a request must arrive complete within 0.3 s, got a part"
    until(lambda: not running.server.server_state.connections)


def test_a_connection_without_a_request_is_closed_in_time(serve, dial, hurried):
    assert rest(dial(serve())) == b""


def test_a_body_that_drips_has_no_more_time(serve, dial, hurried):
    dripping = dial(serve(), HEAD + b"Content-Length: 1000\r\n\r\n")
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        for _ in range(100):
            dripping.sendall(b" ")
            time.sleep(0.05)
    assert time.monotonic() - began < 3


def test_what_is_left_of_a_body_that_was_refused_is_read_no_longer_than_any(serve, dial, hurried):
    answer = rest(dial(serve(), HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 100_000))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_and_a_connection_that_is_kept_have_their_time(serve, dial, hurried, gate, monkeypatch):
    running = serve()
    kept = dial(running, WHOLE)
    gate.clear()
    time.sleep(0.6)
    monkeypatch.setattr(connection, "READ_SECONDS", 30.0)  # from now on; a busy machine may pause for 0.3 s
    gate.set()
    assert status(kept) == 200
    kept.sendall(WHOLE)
    assert status(kept) == 200


def test_the_second_of_two_requests_that_come_together_has_to_be_whole_too(serve, dial, hurried):
    answer = rest(dial(serve(), WHOLE + PARTS["half a body"]))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 408 " in answer


def test_where_there_are_too_many_connections_the_slowest_half_request_makes_room(serve, dial):
    running = serve(connections=8)
    halves = [dial(running, PARTS["half a body"]) for _ in range(40)]
    for _ in range(3):
        assert status(dial(running, WHOLE)) == 200
    assert len(running.server.server_state.connections) <= 8
    assert rest(halves[0]) == b""
    halves[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        halves[-1].recv(1)


def test_where_every_connection_is_being_answered_one_more_is_refused(serve, dial, gate, until):
    running = serve(connections=2)
    gate.clear()
    asked = []
    for count in (1, 2):
        asked.append(dial(running, WHOLE))
        until(lambda count=count: sum(running.scheduler.counts) == count)
    assert status(dial(running, WHOLE)) == 503
    assert any(": connections must be at most 2 that wait for an answer, got one" in line for line in running.lines)
    for route in (b"/metrics", b"/health", b"/health/live", b"/health/ready"):
        assert status(dial(running, b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n" % route)) == 200
    gate.set()
    assert [status(each) for each in asked] == [200] * 2


@pytest.fixture
def small_buffers(monkeypatch):
    """Make the operating system buffer less than one page of metrics for each connection."""
    made = connection.Connection.connection_made

    def shrink(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        made(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", shrink)


UNREAD = {"one after the other": (METRICS + b"\r\n") * 20, "and closed": METRICS + b"Connection: close\r\n\r\n"}


@pytest.mark.parametrize("data", UNREAD.values(), ids=UNREAD)
def test_answers_that_are_not_read_in_time_end_their_connection(serve, dial, small_buffers, until, monkeypatch, data):
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.3)
    running = serve()
    unread = dial(running, data, buffer=1)
    until(lambda: running.server.server_state.connections)
    until(lambda: not running.server.server_state.connections)
    assert not rest(unread).endswith(b"# EOF\n")


def test_a_client_that_reads_slowly_gets_its_answer(serve, dial, small_buffers, monkeypatch):
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.5)
    slow, parts = dial(serve(), UNREAD["and closed"], buffer=1), []
    while part := slow.recv(500):
        parts.append(part)
        time.sleep(0.02)
    body = b"".join(parts).partition(b"\r\n\r\n")[2]
    assert body.startswith(b"# HELP ")
    assert body.count(b"mft_base_bytes") == 3
    assert len(parts) > 10


def test_clients_that_do_not_read_make_room_before_those_that_still_send(serve, dial, small_buffers, until):
    running = serve(connections=4)
    half = dial(running, PARTS["half a body"])
    for _ in range(3):
        dial(running, UNREAD["one after the other"], buffer=1)
    connections = running.server.server_state.connections
    until(lambda: sum(each.flow.write_paused for each in connections) == 3)
    for _ in range(3):
        assert status(dial(running, WHOLE)) == 200
    assert len(connections) <= 4
    half.sendall(b" " * 89 + b"}")
    assert status(half) == 400


TWO_LENGTHS = HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + METRICS + b"\r\n"


def test_a_request_with_two_lengths_is_refused_and_nothing_after_it_is_answered(serve, dial):
    answer = rest(dial(serve(), TWO_LENGTHS))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"connection: close\r\n" in answer.lower()
    assert b"a request must have Content-Length or Transfer-Encoding, got both: send one" in answer
    assert answer.count(b"HTTP/1.1") == 1
