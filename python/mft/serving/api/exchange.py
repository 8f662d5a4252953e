"""One request and its response, with an id that the client finds in X-Request-Id and an operator in the log."""

import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mft.serving.key import NOTHING, Key
from mft.serving.refusal import Refused

_KEY = "exchange"  # in a scope's state
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}  # by a refusal's status


@dataclass
class Exchange:
    """A request and its response. refused: why there is no answer, if so. is_told: whether the log has its line.

    key: what the client may do, nothing until check_key has seen it.
    """

    id: str
    method: str
    path: str
    key: Key = NOTHING
    refused: Refused | None = None
    is_told: bool = False


class Exchanges:
    """ASGI middleware around everything else, which makes an Exchange for each request.

    record: called with exchange and status when a response begins. checks: called with the scope before the app.
    """

    def __init__(
        self, app: ASGIApp, record: Callable[[Exchange, int], None], checks: Sequence[Callable[[Scope], None]]
    ) -> None:
        self._app, self._record, self._checks = app, record, checks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(_request_id(scope), scope["method"], scope["path"])
        scope.setdefault("state", {})[_KEY] = exchange

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = exchange.id
                self._record(exchange, message["status"])
            await send(message)

        app = self._app
        try:
            for check in self._checks:
                check(scope)
        except Refused as refused:
            app = refuse(scope, refused)
        await app(scope, receive, send_with_id)


def check_length(scope: Scope) -> None:
    """Raise Refused if a request has two lengths: a proxy in front may take the other one, and see other requests."""
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in scope["headers"]}:
        raise Refused("a request must have Content-Length or Transfer-Encoding, got both: send one", closes=True)


def exchange_of(scope: Scope) -> Exchange:
    return scope["state"][_KEY]


def refuse(scope: Scope, refused: Refused) -> JSONResponse:
    """Return the response with OpenAI's error object."""
    exchange: Any = scope.get("state", {}).get(_KEY)
    if exchange is not None:
        exchange.refused = refused
    headers = {"Connection": "close"} if refused.closes else _HEADERS.get(refused.status)
    return JSONResponse(refused.body(), refused.status, headers)


def _request_id(scope: Scope) -> str:
    """Return the id that the client or a proxy sent, if it is short and plain, else a new one."""
    given = Headers(scope=scope).get("x-request-id", "")
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", given) else uuid.uuid4().hex
