"""What stands between the network and the application: who may ask what, how much, and for how long.

The checks are made before a body is read: the host's name, the site a browser's request comes from, the
token, the length, the number of requests at work. While the body comes, its bytes and its time are counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import http.cookies
import ipaddress
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

COOKIE: Final = "samething_token"
OPEN_PATHS: Final = (
    "/health",
    "/login",
    "/static/",
    "/static-bokeh/",
    "/docs",
    "/openapi.json",
    "/favicon.ico",
)
"""What is answered without a token: nothing in it comes from the index."""
WRITES: Final = ("/add", "/delete", "/sync")
_MAX_GUESSES: Final = 10
_GUESSES_S: Final = 60.0
_MAX_SENDERS: Final = 10_000
_log: Final = logging.getLogger(__name__)

_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "geolocation=(), microphone=()",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' blob: data:; font-src 'self' data:; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
}

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much one request, and all of them, may take."""

    max_bytes: int = 20 * 2**20
    """Of a request's body."""
    max_pixels: int = 50_000_000
    """Of an image, counted before it is unpacked."""
    max_images: int = 8
    """In one query."""
    max_results: int = 500
    """Matches of one query."""
    timeout_s: float = 30.0
    """For the body to come, and for the answer to be made."""
    max_waiting: int = 64
    """Uploads at work, and images waiting for the model; more are told to come back (429)."""


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may do what."""

    token: str | None = None
    reads_need_token: bool = False
    """True where others than this machine's users reach the server."""
    host_names: frozenset[str] | None = None
    """Names under which the server may be addressed; None: any. A page of another site that makes its own
    name lead to this machine (DNS rebinding) is refused by this."""

    guesses: Guesses = dataclasses.field(default_factory=lambda: Guesses(), compare=False)
    """Wrong tokens so far."""

    def refusal(self, scope: Message) -> tuple[int, str, str] | None:
        """Status, reason and what to do, of a request that is not let through; None for one that is."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path, method = scope["path"], scope["method"]
        if self.host_names is not None and host_of(headers.get("host", "")) not in self.host_names:
            return 421, "this host name is not the server's", "use localhost, or start with --host-name"
        if method != "GET" and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return 403, "a request from another site", "send it from the server's own page or a program"
        bearer = headers.get("authorization", "").partition(" ")
        given = bearer[2].strip() if bearer[0].lower() == "bearer" else ""
        if path in WRITES and method != "GET":
            if self.token is None:
                return 403, "this server only answers questions", "start it with --token to allow changes"
            return self.guesses.refusal(given, self.token, sender_of(scope), what="changes need the token")
        if self.reads_need_token and not (path == "/" or path.startswith(OPEN_PATHS)):
            morsel = http.cookies.SimpleCookie(headers.get("cookie", "")[:4096]).get(COOKIE)
            given = given or (morsel.value if morsel else "")
            return self.guesses.refusal(given, self.token, sender_of(scope), what="this server needs a token")
        return None


class Guesses:
    """Wrong tokens of the last minute, by sender: each is logged, and after ten no other is looked at."""

    def __init__(self) -> None:
        self._wrong: dict[str, dict[str, float]] = {}

    def refusal(
        self, given: str, token: str | None, sender: str, *, what: str
    ) -> tuple[int, str, str] | None:
        """Status, reason and what to do where the token is not the right one; None where it is.

        Args:
            given: what was sent; empty: nothing.
            token: the right one.
            sender: where it comes from.
            what: what needs the token.
        """
        since = time.monotonic() - _GUESSES_S
        recent = {wrong: moment for wrong, moment in self._wrong.get(sender, {}).items() if moment > since}
        if given and len(recent) >= _MAX_GUESSES:
            return 429, "too many wrong tokens", f"wait {_GUESSES_S:.0f} seconds"
        if same_token(given, token):
            return None
        name = hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()
        if given and name not in recent:  # a page that goes on with an old token guesses once
            if len(self._wrong) >= _MAX_SENDERS:
                del self._wrong[next(iter(self._wrong))]
            self._wrong[sender] = {**recent, name: time.monotonic()}
            _log.warning("wrong token %d of this minute from %s", len(recent) + 1, sender or "unknown")
        return 401, what, "send it as: Authorization: Bearer TOKEN"


class Guard:
    """ASGI middleware: refuses what may not come in, bounds what does, and adds the headers.

    Args:
        app: the application.
        access: who may do what.
        limits: how much.
        on_answer: told the request's scope, the status and the seconds of each answer.
    """

    def __init__(
        self,
        app: Any,
        *,
        access: Access,
        limits: Limits,
        on_answer: Callable[[Message, int, float], object] = lambda scope, status, seconds: None,
    ) -> None:
        self.app = app
        self._access = access
        self._limits = limits
        self._on_answer = on_answer
        self._num_uploads = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 0
        is_head = scope["method"] == "HEAD"
        if is_head:  # answered wherever GET is, without the body
            scope = {**scope, "method": "GET"}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                added = [(k.encode(), v.encode()) for k, v in _HEADERS.items() if k.encode() not in present]
                message["headers"] = [*message["headers"], *added]
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        refusal = self._access.refusal(scope) or self._too_much(scope)
        is_upload = scope["method"] != "GET"
        try:
            if refusal is None:
                self._num_uploads += is_upload
                try:
                    refusal = await self._bounded(scope, receive, send_with_headers)
                finally:
                    self._num_uploads -= is_upload
            if refusal is not None and not status:
                await _refuse(send_with_headers, *refusal)
        finally:
            self._on_answer(scope, status, time.perf_counter() - began)

    def _too_much(self, scope: Message) -> tuple[int, str, str] | None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.max_bytes:
            return self._too_large
        if scope["method"] != "GET" and self._num_uploads >= self._limits.max_waiting:
            return 429, "too many requests at once", "try again in a second"
        return None

    @property
    def _too_large(self) -> tuple[int, str, str]:
        return 413, f"an upload of more than {self._limits.max_bytes:,} bytes", "send a smaller image"

    async def _bounded(self, scope: Message, receive: Receive, send: Send) -> tuple[int, str, str] | None:
        """Run the application while its body is counted; the refusal where it is too much or too slow."""
        limits = self._limits
        deadline = asyncio.get_running_loop().time() + limits.timeout_s
        num_bytes = 0
        is_whole = False
        too_much: tuple[int, str, str] | None = None

        async def counted() -> Message:
            nonlocal num_bytes, is_whole, too_much
            if is_whole:  # waiting for the client to go away has no time limit
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                too_much = 408, f"an upload that took more than {limits.timeout_s:g} s", "send it faster"
                raise _EndedError from None
            num_bytes += len(message.get("body", b""))
            if num_bytes > limits.max_bytes:
                too_much = self._too_large
                raise _EndedError
            is_whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        async def send_unless_ended(message: Message) -> None:
            if too_much is None:  # the application may have made something else of the ended body
                await send(message)

        with contextlib.suppress(_EndedError):
            await self.app(scope, counted, send_unless_ended)
        return too_much


class _EndedError(Exception):
    """The body of a request is too large or too slow."""


async def _refuse(send: Send, status: int, reason: str, next_step: str) -> None:
    content = json.dumps({"error": reason, "next_step": next_step}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 429:
        headers.append((b"retry-after", b"1"))
    if status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def host_of(header: str) -> str:
    """The name in a Host header, without the port.

    >>> host_of("LOCALHOST:8000"), host_of("[::1]:8000"), host_of("example.org")
    ('localhost', '::1', 'example.org')
    """
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def sender_of(scope: Message) -> str:
    """The address that a request comes from; empty if it is not known."""
    return str((scope.get("client") or ("",))[0])


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
    """Whether a token was given and is the right one; the time it takes tells nothing.

    >>> same_token("abc", "abc"), same_token("abc", "abd"), same_token("", ""), same_token(None, None)
    (True, False, False, False)
    """
    return bool(given) and bool(token) and hmac.compare_digest(str(given).encode(), str(token).encode())
