"""Check a request's Host header against the names by which the service may be addressed.

A website can make its own name resolve to 127.0.0.1 (DNS rebinding). The browser of a user who opens it then takes a
service on loopback for a part of that site, and lets the page read the service's answers. The Host header still has the
site's name, so a service on loopback answers only to names of loopback.
"""

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import Scope

from mft.checks import shown
from mft.serving.refusal import Refused

_HOST = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")  # a name or an IPv6 address in brackets, and perhaps a port


def known_hosts(address: str, host: str, allowed: Collection[str]) -> frozenset[str] | None:
    """Return the names that are allowed in addition to loopback's, given the address listened on, or None for any."""
    if "*" in allowed or not (allowed or is_loopback(address)):
        return None
    return frozenset(name.lower() for name in (host, *allowed))


def check_host(scope: Scope, hosts: frozenset[str] | None, other: str = "") -> None:
    """Raise Refused (403) if a request is to another name. other: words that say how to allow a name."""
    if hosts is None:
        return
    given = Headers(scope=scope).get("host", "")
    matched = _HOST.fullmatch(given)
    name = matched[1].lower().removesuffix(".") if matched else ""
    if not (is_loopback(name.strip("[]")) or name in hosts):
        raise Refused(
            f"Host must be a name of this machine's loopback, such as localhost{other}, got {shown(given)}", status=403
        )


def is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
