"""A folder served as an S3 bucket: enough of the protocol for s3fs to list, look at and read objects."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
import urllib.parse
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from xml.sax.saxutils import escape


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Serve every sub-folder of a folder as a bucket; yields the endpoint. Requests must be signed."""

    class Objects(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            url = urllib.parse.urlsplit(self.path)
            query = urllib.parse.parse_qs(url.query, keep_blank_values=True)
            bucket, _, key = urllib.parse.unquote(url.path).lstrip("/").partition("/")
            path = folder / bucket / key
            if not self.headers.get("Authorization", "").startswith("AWS4-HMAC-SHA256 "):
                self._refuse(403, "AccessDenied")
            elif not key and (folder / bucket).is_dir():
                self._answer(
                    200, _listing(folder / bucket, query).encode(), {"Content-Type": "application/xml"}
                )
            elif not path.is_file():
                self._refuse(404, "NoSuchKey")
            else:
                self._send_object(path)

        def _send_object(self, path: Path) -> None:
            content = path.read_bytes()
            headers = {"ETag": _etag(path), "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True)}
            wanted = self.headers.get("Range")
            if wanted is None:
                self._answer(200, content, headers)
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._answer(206, content[start:stop], headers)

        def _refuse(self, status: int, code: str) -> None:
            self._answer(status, f"<Error><Code>{code}</Code></Error>".encode(), {})

        def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Objects) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            running.shutdown()
            thread.join()


def _etag(path: Path) -> str:
    return f'"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}"'


def _listing(bucket: Path, query: dict[str, list[str]]) -> str:
    """The answer to ListObjectsV2."""
    prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
    objects, folders = [], {}
    for path in sorted(path for path in bucket.rglob("*") if path.is_file()):
        key = path.relative_to(bucket).as_posix()
        if not key.startswith(prefix):
            continue
        rest = key[len(prefix) :]
        if delimiter and delimiter in rest:
            folders[prefix + rest.partition(delimiter)[0] + delimiter] = None
            continue
        objects.append(
            f"<Contents><Key>{escape(key)}</Key><Size>{path.stat().st_size}</Size><ETag>{escape(_etag(path))}"
            f"</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
        )
    common = "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in folders)
    return (
        f"<ListBucketResult><Name>{escape(bucket.name)}</Name><Prefix>{escape(prefix)}</Prefix>"
        f"<KeyCount>{len(objects) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{''.join(objects)}{common}</ListBucketResult>"
    )
