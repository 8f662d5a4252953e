"""One connection: a request must arrive in time. If there are too many connections, the slowest one is closed."""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mft.serving.refusal import Refused

READ_SECONDS = 30.0  # for a request's headers and body together: enough for 4 MB (128,000 tokens) at 1.1 Mbit/s


class Connection(H11Protocol):
    """uvicorn's connection, with a time limit for a request's headers and body, which uvicorn does not have.

    If there are more than ``most`` connections, the one that has waited longest for its request is closed. So an
    incomplete request cannot keep a complete one out.
    """

    most = 200
    _due: asyncio.TimerHandle | None = None  # the time limit, while the next request or the rest of one is awaited

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            waiting = (each for each in self.connections if isinstance(each, Connection) and each._due)
            slowest = min(waiting, key=lambda each: each._due.when() if each._due else 0, default=None)
            if slowest is not None:
                slowest._stop_waiting()
                slowest.transport.abort()
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock if a request or a part of one is awaited, and stop it if the request is complete."""
        if self.transport.is_closing() or self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif self._due is None:
            self._due = self.loop.call_later(READ_SECONDS, self._expire)

    def _stop_waiting(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _expire(self) -> None:
        self._due = None
        # No answer if the client has sent nothing, like a browser that connects in advance, or if a response has begun.
        has_begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if has_begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refused = Refused(f"a request must arrive complete within {READ_SECONDS:g} s, got a part", status=408)
            data = json.dumps(refused.body()).encode()
            head = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Type: application/json\r\n"
            self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.transport.close()
