"""A client for the server, in the standard library alone.

::

    from samething.web.client import Client
    server = Client("http://127.0.0.1:8000")
    print(server.search("some-image.jpg")["matches"][0]["label"])
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samething.errors import InputError
from samething.files import Json


@dataclasses.dataclass(frozen=True)
class Client:
    """A server that was started with ``samething serve``."""

    address: str = "http://127.0.0.1:8000"
    token: str | None = dataclasses.field(default=None, repr=False)
    timeout_s: float = 60.0

    def search(
        self,
        *images: str | Path | bytes,
        k: int = 5,
        domain: Sequence[str] = (),
        label: Sequence[str] = (),
        where: Sequence[str] = (),
        crop: tuple[int, int, int, int] | None = None,
        combine: str = "mean",
    ) -> dict[str, Json]:
        """What looks like the same thing as in the images: files or their bytes.

        Raises:
            InputError: the server refuses it, or does not answer.
        """
        fields: list[tuple[str, str]] = [("k", str(k)), ("combine", combine)]
        for name, values in (("domain", domain), ("label", label), ("where", where)):
            fields += [(name, value) for value in values]
        if crop is not None:
            fields.append(("crop", ",".join(map(str, crop))))
        return self._json("POST", "/search", *_multipart(fields, images))

    def similar(self, row_id: str, *, k: int = 5) -> dict[str, Json]:
        """What looks like an image of the index."""
        return self._json("GET", f"/similar/{urllib.parse.quote(row_id, safe='')}?k={k}")

    def similar_to_label(self, label: str, *, k: int = 5, combine: str = "mean") -> dict[str, Json]:
        """What looks like the index's own images of a thing, those left out.

        Raises:
            InputError: the index has no such label.
        """
        asked = urllib.parse.urlencode({"to_label": label, "k": k, "combine": combine})
        return self._json("GET", f"/similar?{asked}")

    def image(self, row_id: str) -> bytes:
        """The bytes of an image of the index."""
        return self._ask("GET", f"/images/{urllib.parse.quote(row_id, safe='')}")

    def add(self, image: str | Path | bytes, *, label: str = "", domain: str = "default") -> str:
        """Add an image; its id. Needs the token."""
        fields = [("label", label), ("domain", domain)]
        return str(self._json("POST", "/add", *_multipart(fields, [image]))["id"])

    def delete(self, *ids: str) -> list[str]:
        """Delete images; the ids of those that were there. Needs the token."""
        body = json.dumps({"ids": ids}).encode()
        return list(self._json("POST", "/delete", body, "application/json")["deleted"])

    def sync(self) -> dict[str, Json]:
        """Start to bring the index up to date with its folders; :meth:`status` says how far it is."""
        return self._json("POST", "/sync", b"")

    def info(self) -> dict[str, Json]:
        """Domains, labels, columns, model, limits."""
        return self._json("GET", "/info")

    def status(self) -> dict[str, Json]:
        """Number of images, and what goes on in the background."""
        return self._json("GET", "/status")

    def _json(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> dict[str, Json]:
        found: dict[str, Json] = json.loads(self._ask(method, path, body, kind))
        return found

    def _ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        address = self.address.rstrip("/") + path
        request = urllib.request.Request(address, data=body, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                raise _refused(address, error.code, error.read()) from None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{address} does not answer ({getattr(error, 'reason', error)})",
                expected="a server started with samething serve",
                next_step="start it, or correct the address",
            ) from error


def _refused(address: str, status: int, content: bytes) -> InputError:
    try:
        reason: Mapping[str, Any] = json.loads(content)
    except ValueError:
        reason = {}
    return InputError(
        f"{address} answered {status}: {reason.get('error') or 'no reason given'}",
        expected=str(reason.get("expected") or "a request that the server takes"),
        next_step=str(reason.get("next_step") or "see the server's page /docs"),
    )


def _multipart(fields: Sequence[tuple[str, str]], images: Sequence[str | Path | bytes]) -> tuple[bytes, str]:
    """A form with files as a request's body, and its content type (RFC 7578)."""
    boundary = secrets.token_hex(16)
    parts = [
        f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + value.encode()
        for name, value in fields
    ]
    for image in images:
        try:
            content = image if isinstance(image, bytes) else Path(image).read_bytes()
        except OSError as error:
            raise InputError(
                f"{image!s}: {error.strerror}", expected="a readable image", next_step="check the path"
            ) from error
        head = 'Content-Disposition: form-data; name="image"; filename="image"\r\n'
        parts.append(f"{head}Content-Type: application/octet-stream\r\n\r\n".encode() + content)
    body = b"".join(b"--" + boundary.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return body + b"--" + boundary.encode() + b"--\r\n", f"multipart/form-data; boundary={boundary}"
