"""Bind a port of this machine, before the seconds in which a model is loaded."""

import socket

from mft.checks import check_rule

_UNREAD = 1 << 16  # bytes that Linux buffers (doubled) for each client that does not read; by default up to 4 MB


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to a port here, not yet served. Raises: ValueError without a host; OSError if not free."""
    # The operating system takes an empty host for every address.
    check_rule(
        bool(host.strip()),
        "--host",
        "name an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all",
        repr(host),
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _UNREAD)  # its connections inherit it
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        reason = error.strerror or error
        raise OSError(f"--host and --port must be free here, got {host} and {port}: {reason}") from None
    return bound
