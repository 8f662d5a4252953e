"""One connection: a request has to come whole in time, and where there are too many, the slowest makes room."""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mft.serving.refusal import Refused

READ_SECONDS = 30.0  # for a request's headers and body together: 4 MB, of 128,000 tokens, at 1.1 Mbit/s


class Connection(H11Protocol):
    """uvicorn's, which itself waits without end for a request's headers and body.

    Where there are ``most`` connections, a new one takes the place of the one that has waited longest for a request:
    half a request holds no place that a whole one could have.
    """

    most = 200
    _due: asyncio.TimerHandle | None = None  # while the next request, or the rest of one, is awaited

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
        """Start the clock where a request or a part of one is awaited, stop it where one is whole."""
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
        # One that has sent nothing awaits no answer, as a browser's that connects ahead; another may have had its own.
        has_begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if has_begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            refused = Refused(f"a request must come whole within {READ_SECONDS:g} s, got a part", status=408)
            data = json.dumps(refused.body()).encode()
            head = "HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Type: application/json\r\n"
            self.transport.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.transport.close()
