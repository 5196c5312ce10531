"""Which images an index is made of: folders and catalogs, and what a file looks like from outside."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from samething.catalog import Catalog
from samething.errors import ImageError, InputError
from samething.files import Json, file_sha256
from samething.images import Box, Source, find_image_files, is_url
from samething.index import ColumnKind

FILE_COLUMNS: Final[Mapping[str, ColumnKind]] = {
    "files": "text",  # JSON: every file with this content
    "paths": "texts",
    "labels": "texts",
    "domains": "texts",
    "folders": "texts",  # every folder above any of the files
    "size_bytes": "integer",
    "modified": "number",  # seconds since 1970, of the newest file
}
"""What an index keeps of the files behind a row, besides the columns that every index has."""

_CATALOG_OWN: Final = frozenset(
    {"image", "label", "domain", "dataset", "role", "width", "height", "sha256", "labels", "version"}
) | {f"box_{side}" for side in ("left", "top", "right", "bottom")}


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """One file (or URL) of a collection, as it looks without being read."""

    path: str
    """Absolute path, or URL."""
    label: str = ""
    domain: str = "default"
    size_bytes: int | None = None
    modified: float | None = None
    """Seconds since 1970."""
    mark: str = ""
    """Changes when the content does: size and time of change, or what a server says; empty: unknown."""
    box: tuple[int, int, int, int] | None = None
    """The part of the image that is meant."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    """Further columns of a catalog."""

    @property
    def source(self) -> Source:
        """What ``decode`` reads."""
        return Source(self.path, None if self.box is None else Box(*self.box))

    @property
    def place(self) -> str:
        """Identity of the entry: path and box."""
        return self.path if self.box is None else f"{self.path}\x1f{','.join(map(str, self.box))}"

    def to_json(self) -> dict[str, Json]:
        """What the index keeps of it."""
        kept = dataclasses.asdict(self)
        del kept["metadata"]
        return {name: value for name, value in kept.items() if value not in (None, "")}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> ImageFile:
        """The inverse of :meth:`to_json`."""
        box = value.get("box")
        return cls(**{**value, "box": tuple(box) if box else None, "label": value.get("label", "")})


@dataclasses.dataclass(frozen=True)
class Collection:
    """A folder of images, or a catalog, that an index follows."""

    location: Path
    """The folder, or the catalog's file."""
    domain: str = "default"
    """Domain of a folder's images."""
    root: Path | None = None
    """Folder of a catalog's images, if they were moved."""

    def files(self) -> list[ImageFile]:
        """Every image file, in a fixed order; nothing is read but the names and what the disk says of them.

        Raises:
            InputError: the folder is not there or holds no image.
        """
        if self.location.is_dir():
            return self._of_folder()
        if not self.location.exists():
            raise InputError(
                f"{self.location} does not exist",
                expected="a folder of images, or a catalog",
                next_step="check the path; nothing was changed. A folder on another disk may not be mounted",
            )
        return self._of_catalog()

    def _of_folder(self) -> list[ImageFile]:
        folder = Path(os.path.abspath(self.location))  # noqa: PTH100 - links stay as the user named them
        start = len(str(folder).rstrip("/")) + 1
        found = [
            _on_disk(path, status, label=path[start:].rpartition("/")[0], domain=self.domain)
            for path, status in find_image_files(folder)
        ]
        if not found:
            raise InputError(
                f"no images in {self.location}",
                expected="a folder with JPEG, PNG, WebP or other images, also in sub-folders",
                next_step="check the path",
            )
        return found

    def _of_catalog(self) -> list[ImageFile]:
        catalog = Catalog.read(self.location, root=self.root)
        catalog.require_files()
        searchable = catalog.has_role("index", "query+index")
        if searchable.any():
            catalog = catalog.take(searchable)
        columns = {name: catalog.table[name].to_pylist() for name in metadata_columns(catalog)}
        labels, domains = catalog.strings("label"), catalog.strings("domain")
        found = []
        for row, source in enumerate(catalog.sources):
            metadata = {name: values[row] for name, values in columns.items()}
            place = {"label": labels[row], "domain": domains[row], "metadata": metadata}
            place["box"] = None if source.box is None else tuple(source.box)
            if is_url(source.location):
                found.append(ImageFile(source.location, mark=source.version(), **place))
            else:
                path = os.path.abspath(source.location)  # noqa: PTH100
                found.append(_on_disk(path, _status(path), **place))
        return found

    def metadata_kinds(self) -> dict[str, ColumnKind]:
        """Further columns of a catalog that an index can keep, and their kinds."""
        if self.location.is_dir():
            return {}
        return metadata_columns(Catalog.read(self.location, root=self.root))

    def to_json(self, relative_to: Path) -> dict[str, Json]:
        """For the index's list of what it follows; paths relative to the index, so that both can move."""
        paths = {"location": self.location, "root": self.root}
        return {"domain": self.domain} | {
            name: os.path.relpath(Path(path).resolve(), relative_to.resolve())
            for name, path in paths.items()
            if path is not None
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Json], relative_to: Path) -> Collection:
        """The inverse of :meth:`to_json`."""
        root = value.get("root")
        return cls(
            Path(os.path.normpath(relative_to.resolve() / value["location"])),
            value["domain"],
            None if root is None else Path(os.path.normpath(relative_to.resolve() / root)),
        )


def metadata_columns(catalog: Catalog) -> dict[str, ColumnKind]:
    """A catalog's further columns of texts and numbers, with their kinds."""
    import pyarrow as pa

    kinds: dict[str, ColumnKind] = {}
    for field in catalog.table.schema:
        if field.name in _CATALOG_OWN or field.name in FILE_COLUMNS:
            continue
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            kinds[field.name] = "text"
        elif pa.types.is_integer(field.type):
            kinds[field.name] = "integer"
        elif pa.types.is_floating(field.type):
            kinds[field.name] = "number"
    return kinds


def content_ids(files: Iterable[ImageFile]) -> Iterator[tuple[ImageFile, str | ImageError]]:
    """Each file with the identity of what it shows: SHA-256 of its bytes, and box. Reads in threads."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(_with_content_id, files)


def _with_content_id(file: ImageFile) -> tuple[ImageFile, str | ImageError]:
    try:
        if is_url(file.path):
            sha256 = hashlib.sha256(file.source.read()).hexdigest()
        else:
            sha256 = file_sha256(Path(file.path))
    except ImageError as error:
        return file, error
    except OSError as error:
        reason = error.strerror or str(error)
        return file, ImageError(f"{file.path}: {reason}", expected="a readable file", next_step="check it")
    return file, content_id(sha256, file.box)


def content_id(sha256: str, box: tuple[int, ...] | None) -> str:
    """Identity of what an image shows: the SHA-256 of its file, and with a box of file and box."""
    if box is None:
        return sha256
    return hashlib.sha256(f"{sha256}\x1f{','.join(map(str, box))}".encode()).hexdigest()


def row_of(content_id: str, files: list[ImageFile]) -> dict[str, Any]:
    """The columns of a row that say which files show its content; the first of them gives path and label."""
    files = sorted(files, key=lambda file: file.place)
    first = files[0]
    modified = [file.modified for file in files if file.modified is not None]
    return {
        **first.metadata,
        "id": content_id,
        "path": first.path,
        "label": first.label,
        "domain": first.domain,
        "sha256": content_id if first.box is None else None,
        "files": json.dumps([file.to_json() for file in files], ensure_ascii=False),
        "paths": list(dict.fromkeys(file.path for file in files)),
        "labels": sorted({file.label for file in files}),
        "domains": sorted({file.domain for file in files}),
        "folders": sorted({folder for file in files for folder in folders_above(file.path)}),
        "size_bytes": first.size_bytes,
        "modified": max(modified, default=None),
    }


def files_of(text: str) -> list[ImageFile]:
    """The files of a row, from its column ``files``."""
    return [ImageFile.from_json(value) for value in json.loads(text)]


def folders_above(path: str) -> list[str]:
    """Every folder that a file is in, the nearest first.

    >>> folders_above("/a/b/c.jpg"), folders_above("s3://bucket/x/y.jpg")
    (['/a/b', '/a'], ['s3://bucket/x', 's3://bucket'])
    """
    scheme, sign, rest = path.rpartition("://")
    found = []
    while "/" in rest.rstrip("/"):
        rest = rest.rstrip("/").rpartition("/")[0]
        if rest:
            found.append(scheme + sign + rest)
    return found


def on_disk(path: str, **place: Any) -> ImageFile:
    """A file as the disk describes it, without reading it."""
    return _on_disk(path, _status(path), **place)


def _on_disk(path: str, status: os.stat_result | None, **place: Any) -> ImageFile:
    if status is None:  # it is listed with its reason when it is read
        return ImageFile(path, **place)
    return ImageFile(
        path,
        size_bytes=status.st_size,
        modified=status.st_mtime,
        mark=f"{status.st_size}:{status.st_mtime_ns}",
        **place,
    )


def _status(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116 - a million times
    except OSError:
        return None
