"""What stands between the network and the index: limits of uploads, headers, the token, and safe downloads."""

from __future__ import annotations

import asyncio
import hmac
import http.client
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from samething.errors import ImageError

COOKIE: Final = "samething_token"

_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' blob: data:; "
        "connect-src 'self'; font-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """ASGI middleware: adds the headers, and ends requests whose body is too large or comes too slowly."""

    def __init__(self, app: Any, *, max_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in present),
                ]
            await send(message)

        num_bytes = 0
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout_s

        async def limited_receive() -> MutableMapping[str, Any]:
            nonlocal num_bytes
            message = await asyncio.wait_for(receive(), max(0.001, deadline - loop.time()))
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes:
                raise _TooLargeError
            return message

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            await _refuse(send_with_headers, 413, f"more than {self.max_bytes // 2**20} MiB")
            return
        body_done = False

        async def receive_body() -> MutableMapping[str, Any]:
            nonlocal body_done
            if body_done:  # waiting for the client to go away has no time limit
                return await receive()
            message = await limited_receive()
            body_done = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        try:
            await self.app(scope, receive_body, send_with_headers)
        except _TooLargeError:
            if not started:
                await _refuse(send_with_headers, 413, f"more than {self.max_bytes // 2**20} MiB")
        except TimeoutError:
            if not started:
                await _refuse(send_with_headers, 408, f"not here within {self.timeout_s:g} s")


class _TooLargeError(Exception):
    """The body of a request has more bytes than allowed."""


async def _refuse(send: Send, status: int, reason: str) -> None:
    content = ('{"error": "the upload is ' + reason + '"}').encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def is_loopback(host: str) -> bool:
    """Whether a server bound there can be reached from this machine alone.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def same_token(given: str | None, token: str | None) -> bool:
    """Whether a token was given and is the right one; the time it takes tells nothing."""
    return bool(given) and bool(token) and hmac.compare_digest(str(given).encode(), str(token).encode())


def fetch_public(url: str, *, max_bytes: int, timeout_s: float, redirects: int = 3) -> bytes:
    """The bytes behind a URL of the public internet.

    The host's address is looked up once, must be public, and is the one connected to: a name that leads to this
    machine or its network is refused, at every redirect anew.

    Raises:
        ImageError: another scheme or port, a private address, an answer that is too large, or none.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise _not_fetched(url, "only plain http and https addresses are fetched")
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    if port not in (80, 443):
        raise _not_fetched(url, "only the ports 80 and 443 are asked")
    try:
        address = _public_address(parts.hostname, port)
        connection = http.client.HTTPConnection(parts.hostname, port, timeout=timeout_s)
        connection.sock = socket.create_connection((address, port), timeout_s)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=parts.hostname)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "samething", "Accept": "image/*"})
        answer = connection.getresponse()
        location = answer.getheader("location")
        if answer.status in (301, 302, 303, 307, 308) and location and redirects:
            connection.close()
            following = urllib.parse.urljoin(url, location)
            return fetch_public(
                following, max_bytes=max_bytes, timeout_s=timeout_s, redirects=redirects - 1
            )
        if answer.status != 200:
            raise _not_fetched(url, f"the server answered {answer.status}")
        content = answer.read(max_bytes + 1)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _not_fetched(url, str(error)) from error
    if len(content) > max_bytes:
        raise _not_fetched(url, f"more than {max_bytes // 2**20} MiB")
    return content


def _public_address(host: str, port: int) -> str:
    found = {item[4][0] for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in found:
        if not ipaddress.ip_address(address).is_global:
            raise OSError("the address is not public")
    return str(sorted(found)[0])


def _not_fetched(url: str, reason: str) -> ImageError:
    return ImageError(
        f"{url} was not fetched: {reason}",
        expected="the public address of a picture",
        next_step="download the picture and upload it",
    )
