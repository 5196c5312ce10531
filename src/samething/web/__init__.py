"""An index as a page and a REST interface: search, look around, keep it current."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from samething.errors import InputError

if TYPE_CHECKING:
    from samething.web.app import create_app
    from samething.web.guards import Limits

__all__ = ["TOKEN_VARIABLE", "Limits", "create_app", "serve"]

TOKEN_VARIABLE: Final = "SAMETHING_TOKEN"
"""Environment variable that the token is taken from where none is given."""
_LEAST_TOKEN: Final = 16


def __getattr__(name: str) -> object:
    """The parts that need a web framework, imported when they are asked for."""
    if name == "create_app":
        from samething.web.app import create_app

        return create_app
    if name == "Limits":
        from samething.web.guards import Limits

        return Limits
    raise AttributeError(name)


def serve(
    index: str | Path = "index",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    model: str | Path | None = None,
    device: str | None = None,
    allow_urls: bool = False,
    uploads: Path | None = None,
    host_name: list[str] | None = None,
    max_megabytes: int = 20,
    max_waiting: int = 64,
    timeout: float = 30.0,
    browser: bool = False,
) -> None:
    """Serve an index as a page and a REST interface, until interrupted.

    Only this machine reaches it, and it only answers questions, unless a token is given: then who has it may
    add and delete images, and the server may be bound elsewhere, where everything needs the token.

    Args:
        index: the index folder, or the URL of a distributed engine.
        host: address to bind to; another than this machine's own needs a token.
        port: port to bind to; 0 takes a free one.
        token: secret of at least 16 characters; by default the environment variable SAMETHING_TOKEN.
        model: the model folder, if it was moved since the index was made.
        device: what computes the model: cpu, cuda, tensorrt, coreml, directml, openvino, openvino-bfloat16 or
            auto; by default what SAMETHING_DEVICE names. Auto, or without either: the CPU, until the fastest
            that is here and gives its vectors is found.
        allow_urls: let queries be addresses of images on the public internet, which the server fetches.
        uploads: folder that keeps the images which are added; by default one in the index folder.
        host_name: further names under which the server may be addressed, such as that of a proxy before it.
        max_megabytes: largest upload.
        max_waiting: uploads at work at once; more are told to come back.
        timeout: seconds for an upload to come and for its answer to be made.
        browser: open the page in the browser.

    Raises:
        InputError: bound elsewhere without a token, a token that is too short, a port that is taken, or a
            device that is not here.
        FingerprintError: the model is not the index's own.
    """
    # read when NumPy is loaded: idle threads of its matrix library sleep, and leave the cores to the model
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the same of FAISS
    from samething.search import Searcher
    from samething.web.app import LOOPBACK_NAMES, create_app
    from samething.web.guards import Limits, is_loopback
    from samething.web.running import listen, run

    token = token if token is not None else os.environ.get(TOKEN_VARIABLE) or None
    is_public = not is_loopback(host)
    _require_token(token, host, is_public=is_public)
    if max_megabytes < 1 or max_waiting < 1 or not timeout > 0:
        raise InputError(
            f"max_megabytes={max_megabytes}, max_waiting={max_waiting}, timeout={timeout}",
            expected="at least 1, at least 1, more than 0",
            next_step="leave them out",
        )
    limits = Limits(max_bytes=max_megabytes * 2**20, max_waiting=max_waiting, timeout_s=timeout)
    names = None if is_public and not host_name else LOOPBACK_NAMES | {host} | set(host_name or ())
    with listen(host, port) as listening:
        app = create_app(
            Searcher.open(index, model=model, device=device),
            token=token,
            is_public=is_public,
            allow_urls=allow_urls,
            uploads=uploads,
            limits=limits,
            host_names=names,
        )
        app.app.state.service.seek_fastest()
        run(app, listening, host, browser=browser)


def _require_token(token: str | None, host: str, *, is_public: bool) -> None:
    if token is not None and len(token) < _LEAST_TOKEN:
        raise InputError(
            f"a token of {len(token)} characters",
            expected=f"at least {_LEAST_TOKEN}, hard to guess",
            next_step="make one: python -c 'import secrets; print(secrets.token_urlsafe())'",
        )
    if is_public and token is None:
        raise InputError(
            f"the host {host}, which others can reach, without a token",
            expected="a token",
            next_step=f"set {TOKEN_VARIABLE}, or leave --host out",
        )
