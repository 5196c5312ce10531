"""Where a collection of Milvus is: its URL, read and shown."""

from __future__ import annotations

import dataclasses
import urllib.parse
from typing import Any, Final

from samething.errors import ArtefactError, InputError, first_line, needed

_TIMEOUT_S: Final = 30.0


@dataclasses.dataclass(frozen=True)
class MilvusPlace:
    """Where a collection is."""

    uri: str
    """What pymilvus connects to."""
    collection: str
    database: str = "default"
    token: str = ""
    index: str = "flat"
    ef: int = 128
    """Breadth of a search in an HNSW graph."""

    @classmethod
    def of(cls, location: str) -> MilvusPlace:
        """Read a URL.

        Raises:
            InputError: a part is missing or unknown.

        >>> MilvusPlace.of("milvus://me:secret@box:19530/things").token
        'me:secret'
        """
        try:
            url = urllib.parse.urlsplit(location)
            options = dict(urllib.parse.parse_qsl(url.query, strict_parsing=bool(url.query)))
            *folders, collection = [part for part in url.path.split("/") if part] or [""]
            index, ef, tls = options.pop("index", "flat"), int(options.pop("ef", 128)), options.pop("tls", "")
            if options or not collection.isidentifier() or index not in ("flat", "hnsw") or ef < 1:
                raise ValueError("a part is unknown")
            if url.scheme == "milvus-lite":
                file = location.removeprefix("milvus-lite://").partition("?")[0].rpartition("/")[0]
                if not file.endswith(".db"):
                    raise ValueError("no file")
                return cls(file, collection, index=index, ef=ef)
            if not url.hostname or len(folders) > 1:
                raise ValueError("no host")
            uri = f"{'https' if tls else 'http'}://{url.hostname}:{url.port or 19530}"
        except ValueError as error:
            raise InputError(
                f"the index location {without_password(location)!r} ({error})",
                expected="milvus://HOST:PORT/COLLECTION, or milvus-lite://FILE.db/COLLECTION, with "
                "?index=flat or ?index=hnsw and &ef=NUMBER if need be",
                next_step="correct the URL; a collection's name is of letters, digits and underscores",
            ) from error
        user = urllib.parse.unquote(url.username or "")
        password = urllib.parse.unquote(url.password or "")
        token = f"{user}:{password}" if password else user
        database = folders[0] if folders else "default"
        return cls(uri, collection, database, token=token, index=index, ef=ef)

    def connect(self) -> Any:
        """A client.

        Raises:
            ArtefactError: nothing answers there, or it refuses this user.
        """
        pymilvus = needed("pymilvus", extra="milvus")
        try:
            if self.uri.startswith("http"):
                return pymilvus.MilvusClient(
                    self.uri, token=self.token, db_name=self.database, timeout=_TIMEOUT_S
                )
            return pymilvus.MilvusClient(self.uri)
        except Exception as error:  # the client and Lite raise many kinds
            raise ArtefactError(
                f"no Milvus at {self.uri} ({first_line(error) or type(error).__name__})",
                expected="a server that answers, or a file that no other process has open",
                next_step="check address, user and password, and that the server runs",
            ) from error


def without_password(location: str) -> str:
    """The URL as it may be shown.

    >>> without_password("milvus://me:secret@box/things")
    'milvus://me@box/things'
    """
    scheme, sign, rest = location.partition("://")
    user, at, place = rest.rpartition("@")
    return f"{scheme}{sign}{user.partition(':')[0]}{at}{place}" if at else location
