"""Read a request's body as bytes, and check that its type is JSON, its size is allowed and it is complete."""

from starlette.requests import ClientDisconnect, Request

from mft.checks import shown
from mft.serving.refusal import Refused


async def json_bytes(request: Request, most: int, why: str = "") -> bytes:
    """Return the body's bytes. why: words for the limit of most bytes.

    Raises: Refused; the rest of the body is then read and dropped for READ_SECONDS.
    """
    kind = request.headers.get("content-type", "")
    # A page of another site can send a form or plain text here without a CORS preflight, but not JSON.
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise Refused(f"Content-Type must be application/json, got {shown(kind)}", status=415)
    told = request.headers.get("content-length", "0")
    if told.isdecimal() and int(told) > most:
        raise _too_long(most, why, told)
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > most:
                raise _too_long(most, why, "more")
    except ClientDisconnect:
        raise Refused("the body must arrive complete, got a part") from None
    return bytes(data)


def _too_long(most: int, why: str, got: str) -> Refused:
    return Refused(f"the body must be at most {most} bytes{why}, got {got}", status=413)
