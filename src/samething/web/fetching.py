"""Images from addresses that a stranger gave: from the public internet alone, bounded in bytes and time."""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from typing import Final

from samething.errors import ImageError

_PORTS: Final = {"http": 80, "https": 443}
_MOST_REDIRECTS: Final = 3
_PUBLIC_V6: Final = ipaddress.ip_network("2000::/3")
"""All of the public internet. IPv4 addresses in IPv6 ones (mapped, NAT64, ``::127.0.0.1``) are outside."""


def fetch_public(url: str, *, max_bytes: int, timeout_s: float) -> bytes:
    """The bytes behind a URL of the public internet.

    The host's address is looked up once, must be public, and is the one connected to: a name that leads to
    this machine or its network is refused, at every redirect anew. The time limit is for all of it.

    Raises:
        ImageError: another scheme or port, a private address, an answer that is too large or slow, or none.
    """
    deadline = time.monotonic() + timeout_s
    for _ in range(_MOST_REDIRECTS + 1):
        found = _ask(url, max_bytes=max_bytes, deadline=deadline)
        if isinstance(found, bytes):
            return found
        url = found
    raise _not_fetched(url, "too many redirects")


def _ask(url: str, *, max_bytes: int, deadline: float) -> bytes | str:
    """The content of an address, or the address that it leads to."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:
        raise _not_fetched(url, str(error)) from error
    if parts.scheme not in _PORTS or not parts.hostname or parts.username:
        raise _not_fetched(url, "only plain http and https addresses are fetched")
    if port not in _PORTS.values():
        raise _not_fetched(url, "only the ports 80 and 443 are asked")
    try:
        address = public_address(parts.hostname, port)
        with socket.create_connection((address, port), _left(deadline)) as plain:
            ending = threading.Timer(_left(deadline), _shut, [plain])  # also of an answer that drips
            ending.daemon = True
            ending.start()
            try:
                found = _answer(plain, parts, port, max_bytes=max_bytes)
                _left(deadline)  # an answer without a length looks whole when it is cut off
                return found
            finally:
                ending.cancel()
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        raise _not_fetched(url, str(error) or type(error).__name__) from error


def _answer(
    plain: socket.socket, parts: urllib.parse.SplitResult, port: int, *, max_bytes: int
) -> bytes | str:
    host, url = str(parts.hostname), parts.geturl()
    connection = http.client.HTTPConnection(host, port)
    connection.sock = plain
    if parts.scheme == "https":
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "samething", "Accept": "image/*"})
        answer = connection.getresponse()
        location = answer.getheader("location")
        if answer.status in (301, 302, 303, 307, 308) and location:
            return urllib.parse.urljoin(url, location)
        if answer.status != 200:
            raise _not_fetched(url, f"the server answered {answer.status}")
        content = answer.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise _not_fetched(url, f"more than {max_bytes:,} bytes")
        return content
    finally:
        connection.close()


def _shut(plain: socket.socket) -> None:
    with contextlib.suppress(OSError):
        plain.shutdown(socket.SHUT_RDWR)


def public_address(host: str, port: int) -> str:
    """The address of a host, where all that it has are public.

    Raises:
        OSError: one is not, or the host is not known.
    """
    found = sorted({str(item[4][0]) for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
    for text in found:
        address = ipaddress.ip_address(text.partition("%")[0])
        is_translated = isinstance(address, ipaddress.IPv6Address) and (
            address not in _PUBLIC_V6 or address.sixtofour is not None or address.teredo is not None
        )
        if is_translated or not address.is_global or address.is_multicast:
            raise OSError("the address is not public")
    return found[0]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return left


def _not_fetched(url: str, reason: str) -> ImageError:
    return ImageError(
        f"{url[:200]} was not fetched: {reason}",
        expected="the public address of an image",
        next_step="download the image and upload it",
    )
