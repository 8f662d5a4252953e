"""Refusals of a request in OpenAI's form: a status, and a message that names parameter, rule and value."""

from typing import Any

_KINDS = {429: "requests", 500: "server_error", 503: "server_error", 504: "server_error"}


class Refused(Exception):
    """A refused request. param: the key at fault. code: for programs. closes: whether the connection is closed."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.closes = message, status, param, code, closes

    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def failure() -> Refused:
    """Return the refusal for an unforeseen error. It is a new one each time, since each raise adds to its traceback."""
    return Refused(
        "the server must answer, got an internal error for this request: its log has the traceback", status=500
    )
