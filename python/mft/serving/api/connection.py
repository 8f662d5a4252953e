"""One connection: its client must send and read in time. If there are too many, the slowest one is closed."""

import asyncio
import json

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from mft.serving.api.api_keys import GUARDED
from mft.serving.refusal import Refused

READ_SECONDS = 30.0  # for a request's headers and body together: enough for 4 MB (128,000 tokens) at 1.1 Mbit/s
WRITE_SECONDS = 30.0  # for the client to read what the operating system does not buffer for it
_CONNECTION = "connection"  # in a scope's state


class Connection(H11Protocol):
    """uvicorn's connection, with time limits for sending a request and for reading the answer, which uvicorn lacks.

    A connection is idle while the server waits for its client, and busy while the client waits for the server. If
    there are more than ``most`` connections, the one that has been idle longest is closed, first among those whose
    client does not read. So clients that neither send nor read cannot keep others out.
    """

    most = 200
    _due: asyncio.TimerHandle | None = None  # the time limit, while the connection is idle
    _awaited: str | None = None  # what the client must do meanwhile: send or read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(0)  # pause_writing is then called as soon as the client does not read
        super().connection_made(transport)
        self.app_state = {_CONNECTION: self}
        if len(self.connections) > self.most:
            idle = (each for each in self.connections if isinstance(each, Connection) and each._due)
            slowest = min(
                idle, key=lambda each: (each._awaited != "read", each._due and each._due.when()), default=None
            )
            if slowest is not None:
                slowest._stop_waiting()
                slowest.transport.abort()
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def check_room(self) -> None:
        """Raise Refused if ``most`` other connections are busy."""
        others = (each for each in self.connections if isinstance(each, Connection) and each is not self)
        if sum(not each._due and not each.transport.is_closing() for each in others) >= self.most:
            raise Refused(
                f"connections must be at most {self.most} that wait for an answer, got one more: try again later",
                status=503,
            )

    def _watch(self) -> None:
        """Start the clock when the connection becomes idle, and stop it when it becomes busy."""
        awaited = None
        if self.flow.write_paused:  # perhaps of a connection that is closing, which ends when all has been read
            awaited = "read"
        elif not self.transport.is_closing() and self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            awaited = "send"
        if awaited == self._awaited:
            return
        self._stop_waiting()
        self._awaited = awaited
        if awaited == "read":
            self._due = self.loop.call_later(WRITE_SECONDS, self.transport.abort)
        elif awaited == "send":
            self._due = self.loop.call_later(READ_SECONDS, self._expire)

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = self._awaited = None

    def _expire(self) -> None:
        self._stop_waiting()
        # No answer if the client has sent nothing, like a browser that connects in advance, or if a response has begun.
        has_begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if has_begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refused = Refused(f"a request must arrive complete within {READ_SECONDS:g} s, got a part", status=408)
            data = json.dumps(refused.body()).encode()
            head = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Type: application/json\r\n"
            self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.transport.close()


def check_room(scope: Scope) -> None:
    """Raise Refused (503) if too many connections wait for an answer. Health and metrics are always answered."""
    connection = scope["state"].get(_CONNECTION)
    if connection is not None and scope["path"].startswith(GUARDED):
        connection.check_room()
