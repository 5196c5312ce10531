"""The server's process: its socket, its connections, and how it ends."""

from __future__ import annotations

import signal
import socket
import webbrowser
from types import FrameType
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from samething.errors import InputError, SamethingError
from samething.progress import Terminal

HEADERS_S: Final = 10.0
"""Seconds in which a connection has to send the headers of a request."""
MAX_HALF_SENT: Final = 256
"""Connections that may wait for headers at once; beyond, the one that waited longest is closed."""
_STOPPING_S: Final = 15


class BoundedProtocol(HttpToolsProtocol):
    """HTTP connections that cannot shut others out by never finishing their headers."""

    config: Config

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for headers; the connection that waited longest makes room."""
        super().connection_made(transport)
        self._await_headers()
        if len(self.config.half_sent) > MAX_HALF_SENT:
            next(iter(self.config.half_sent))._close()

    def on_message_begin(self) -> None:
        """A further request on the same connection: its headers are waited for as well."""
        super().on_message_begin()
        self._await_headers()

    def on_headers_complete(self) -> None:
        """The request goes on; its body has limits of its own."""
        self._stop_waiting()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _await_headers(self) -> None:
        self._stop_waiting()
        self.config.half_sent[self] = self.loop.call_later(HEADERS_S, self._close)

    def _stop_waiting(self) -> None:
        timer = self.config.half_sent.pop(self, None)
        if timer is not None:
            timer.cancel()

    def _close(self) -> None:
        self._stop_waiting()
        self.transport.abort()


class Config(uvicorn.Config):
    """How the application is run. A proxy on this machine, or in FORWARDED_ALLOW_IPS, names the client."""

    def __init__(self, app: Any) -> None:
        self.half_sent: dict[BoundedProtocol, Any] = {}
        """Connections without whole headers, the one that waited longest first."""
        super().__init__(
            app,
            http=BoundedProtocol,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=True,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=_STOPPING_S,
            limit_concurrency=1000,
        )


class _Server(uvicorn.Server):
    """Says where it is; ends with success when all that was asked is answered."""

    def __init__(self, config: uvicorn.Config, address: str, *, browser: bool) -> None:
        super().__init__(config)
        self.address, self.browser = address, browser
        self.num_unanswered = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        Terminal(stderr=True).print(
            f"serving on {self.address} (the API: {self.address}docs); stop with Ctrl-C", soft_wrap=True
        )
        if self.browser:
            webbrowser.open(self.address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; unlike the parent's, without raising the signal again once everything is answered."""
        del frame
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        answering = list(self.server_state.tasks)
        await super().shutdown(sockets)
        self.num_unanswered = sum(task.cancelling() > 0 for task in answering)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: not an address of this machine, or the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"{host} port {port}: {getattr(error, 'strerror', None) or error}",
            expected="an address of this machine and a free port",
            next_step="choose another with --port, or --port 0 for any that is free",
        ) from error
    # connections take it over; without it the end of an answer waits for the client's delayed acknowledgement
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def run(app: Any, listening: socket.socket, host: str, *, browser: bool) -> None:
    """Serve until SIGINT or SIGTERM, and answer what was asked before that.

    Raises:
        SamethingError: some of it could not be answered in time.
    """
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{listening.getsockname()[1]}/"
    server = _Server(Config(app), address, browser=browser)
    server.run(sockets=[listening])
    if server.num_unanswered:
        raise SamethingError(
            f"{server.num_unanswered} requests that were not answered within {_STOPPING_S} s of the end",
            expected="answers to all that was asked",
            next_step="nothing that was acknowledged is lost; ask again",
        )
