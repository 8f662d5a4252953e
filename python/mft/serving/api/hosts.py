"""The names by which a service may be asked, from a request's Host header.

A page of a stranger's site can have its own name resolve to 127.0.0.1 (DNS rebinding): the browser of whoever opens it
then takes a service on loopback for a part of that site, and lets the page read its answers. The Host header keeps the
site's name, so a service on loopback answers to names of loopback alone.
"""

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mft.checks import shown
from mft.serving.api.exchange import refuse
from mft.serving.refusal import Refused

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")  # a name or an IPv6 address in brackets, and perhaps a port


def known_hosts(address: str, host: str, allowed: Collection[str]) -> frozenset[str] | None:
    """Names besides loopback's, or None for any.

    Args: address: that is listened on; host: as the user wrote it; allowed: by the user, * for any.
    """
    if "*" in allowed or not (allowed or is_loopback(address)):
        return None
    return frozenset(name.lower() for name in (host, *allowed))


class HostCheck:
    """ASGI middleware: refuses, with 403, what is asked by another name. hosts: of known_hosts."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and self._hosts is not None:
            given = Headers(scope=scope).get("host", "")
            matched = _HOST.fullmatch(given)
            name = matched[1].lower().removesuffix(".") if matched else ""
            if not (is_loopback(name.strip("[]")) or name in self._hosts):
                refused = Refused(
                    "Host must be a name of this machine's loopback, such as localhost, or one that --allow-host "
                    f"names, got {shown(given)}",
                    status=403,
                )
                app = refuse(scope, refused)
        await app(scope, receive, send)


def is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
