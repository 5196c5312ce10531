"""Which images an index is made of: folders and catalogs, and what a file looks like from outside."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

from samething.errors import InputError, visible
from samething.files import Json
from samething.images import Box, Source, as_they_are, disk_state, find_files, keyed, thumbnail
from samething.images.finding import EXCLUDED, is_excluded
from samething.index import AbstractIndex, ColumnKind
from samething.progress import say

if TYPE_CHECKING:
    from samething.catalog import Catalog
else:
    Catalog = Any  # catalogs need pyarrow, which takes 0.2 s to import; folders do not

THUMBNAIL_SIDE: Final = 224
"""Pixels. Even black and white noise fits the 65,535 bytes of a text of Milvus then."""

_ONE_COLOUR: Final = 3
"""Of 255: as much differs after compression in a thumbnail of one colour."""

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

CAPTURE_COLUMNS: Final[Mapping[str, ColumnKind]] = {
    "taken": "number",  # seconds since 1970, of the camera's clock
    "camera": "text",
    "latitude": "number",  # degrees north
    "longitude": "number",  # degrees east
}
"""What an index keeps of EXIF data; less where it was made before, or has other columns of these names."""


@dataclasses.dataclass(frozen=True)
class Collection:
    """A folder of images, or a catalog, that an index follows."""

    location: Path
    """The folder, or the catalog's file."""
    domain: str = "default"
    """Domain of a folder's images."""
    root: Path | None = None
    """Folder of a catalog's images, if they were moved."""
    exclude: tuple[str, ...] = ()
    """Names, or paths below the folder, that are passed over."""
    passed_over: Counter[str] = dataclasses.field(default_factory=Counter, compare=False, repr=False)
    """What the last listing passed over: other files by suffix, folders by what they are."""

    def key(self, index: str | Path) -> str:
        """How an index names it: its path relative to an index folder, so both can move; else as it is."""
        place, folder = self.location.resolve(), str(index).removeprefix("sqlite://")
        return str(place) if "://" in folder else os.path.relpath(place, Path(folder).resolve())

    def files(self, index: str | Path | None = None) -> list[Source]:
        """Every image file, in a fixed order; nothing is read but the names and what the disk says of them.

        Args:
            index: whose files they are to be; they name this collection as it does.

        Raises:
            InputError: the folder or catalog is not there.
            ArtefactError: a catalog that is damaged, or whose images have moved.
        """
        self.require_there()
        key = "" if index is None else self.key(index)
        if not self.location.is_dir():
            return self._of_catalog(key)
        folder = Path(os.path.abspath(self.location))  # noqa: PTH100 - links stay as the user named them
        start = len(str(folder).rstrip("/")) + 1
        self.passed_over.clear()
        found = []
        for file in find_files(folder, self.exclude):
            if file.is_image:
                label = file.path[start:].rpartition("/")[0]
                state = disk_state(file.path, file.status)
                found.append(Source(file.path, label=label, domain=self.domain, collection=key, **state))
            else:
                self.passed_over[visible(file.passed_over)] += 1
        return found

    def excludes(self, file: Source) -> bool:
        """Whether a file of this collection is one that is to be passed over."""
        top = self.location if self.location.is_dir() else self.root or self.location.parent
        start = f"{os.path.abspath(top)}/"  # noqa: PTH100 - links stay as the user named them
        return file.location.startswith(start) and is_excluded(file.location[len(start) :], self.exclude)

    def some_files(self, index: str | Path) -> list[Source]:
        """As :meth:`files`, of which there must be some.

        Raises:
            InputError: there is none.
        """
        found = self.files(index)
        if not found:
            raise InputError(
                f"no images in {self.location}",
                expected="a folder with JPEG, PNG, WebP or other images, also in sub-folders",
                next_step="check the path",
            )
        return found

    def require_there(self) -> None:
        """Refuse a place that is not there.

        Raises:
            InputError: it is not.
        """
        if not self.location.exists():
            raise InputError(
                f"{self.location} does not exist",
                expected="a folder of images, or a catalog",
                next_step="check the path; nothing was changed. A folder on another disk may not be mounted",
            )

    def _of_catalog(self, key: str) -> list[Source]:
        from samething.catalog import Catalog

        catalog = Catalog.read(self.location, root=self.root)
        catalog.require_files()
        searchable = catalog.has_role("index", "query+index")
        if searchable.any():
            catalog = catalog.take(searchable)
        if self.exclude:
            out = np.array([is_excluded(image, self.exclude) for image in catalog.strings("image")], bool)
            self.passed_over.clear()
            if out.any():
                self.passed_over[EXCLUDED] = int(out.sum())
            catalog = catalog.take(~out)
        columns = {name: catalog.table[name].to_pylist() for name in _metadata_columns(catalog)}
        found = []
        for row, source in enumerate(catalog.sources):
            place = source.location
            found.append(
                dataclasses.replace(
                    source,
                    location=place if source.is_remote else os.path.abspath(place),  # noqa: PTH100
                    collection=key,
                    metadata={
                        name: value
                        for name, values in columns.items()
                        if (value := values[row]) is not None and value == value  # SQLite knows no NaN
                    },
                )
            )
        return list(as_they_are(found))

    def to_json(self, relative_to: Path) -> dict[str, Json]:
        """For the index's list of what it follows; paths relative to the index, so that both can move."""
        places = {"location": self.location, "root": self.root}
        excluded = {"exclude": list(self.exclude)} if self.exclude else {}
        return {"domain": self.domain, **excluded} | {
            name: Collection(path).key(relative_to) for name, path in places.items() if path is not None
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Json], relative_to: Path) -> Collection:
        """The inverse of :meth:`to_json`."""
        root = value.get("root")
        return cls(
            Path(os.path.normpath(relative_to.resolve() / value["location"])),
            value["domain"],
            None if root is None else Path(os.path.normpath(relative_to.resolve() / root)),
            tuple(value.get("exclude", ())),
        )


UPLOADS: Final = "uploads"
"""Notes of an index: label and domain of each uploaded image, by its path relative to the index."""
UPLOADED: Final = ":uploads"
"""The collection of these images."""


def uploaded_files(index: AbstractIndex) -> list[Source]:
    """The images that were uploaded to an index."""
    found = []
    for name, kept in index.notes(UPLOADS).items():
        path = os.path.normpath(Path(index.location).absolute() / name)
        found.append(uploaded(path, kept))
    return found


def uploaded(path: str, kept: Mapping[str, Json]) -> Source:
    """An uploaded image, of which label and domain are kept."""
    return Source(path, label=kept["label"], domain=kept["domain"], collection=UPLOADED, **disk_state(path))


def _metadata_columns(catalog: Catalog) -> list[str]:
    """A catalog's further columns of texts and numbers."""
    import pyarrow as pa

    from samething.catalog import BOX_COLUMNS, SCHEMA

    own = {*SCHEMA.names, *BOX_COLUMNS, "labels", "version", *FILE_COLUMNS}
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_floating)
    return [
        field.name
        for field in catalog.table.schema
        if field.name not in own and any(kind(field.type) for kind in kinds)
    ]


_KINDS: Final[Mapping[type, ColumnKind]] = {int: "integer", float: "number", str: "text"}


def fitted(files: Sequence[Source], columns: Mapping[str, str]) -> tuple[list[Source], dict[str, ColumnKind]]:
    """Files whose further values all fit a column of their name, and the kinds of these columns.

    A value that does not fit goes under another name, which is said when it is new: a text in a number's
    column ``taken`` under ``taken_text``.

    Args:
        files: those of catalogs have further values.
        columns: of the index, with their kinds; it need not have all.
    """
    kinds: dict[str, Any] = {}
    for file in files:
        for name, value in file.metadata.items():  # in the alphabet the wider kind comes later
            kinds[name] = columns.get(name) or max(kinds.get(name, ""), _KINDS[type(value)])
    result = []
    for file in files:
        named = {}
        for name, value in file.metadata.items():
            own, kind = name, _KINDS[type(value)]
            while not _fits(value, kinds.setdefault(own, columns.get(own, kind))):
                own = f"{own}_{kind}"
                if own not in kinds and own not in columns:
                    say(f"{name} is a column of another kind here: what does not fit it is kept as {own}")
            named[own] = value
        result.append(dataclasses.replace(file, metadata=named) if named != file.metadata else file)
    return result, kinds


def _fits(value: str | int | float, kind: str) -> bool:
    if isinstance(value, str):
        return kind == "text"
    return kind == "number" or (kind == "integer" and float(value).is_integer())


def content_id(sha256: str, box: Box | None) -> str:
    """Identity of what an image shows: the SHA-256 of its file, and with a box of file and box."""
    return sha256 if box is None else hashlib.sha256(keyed(sha256, box).encode()).hexdigest()


def place_of(file: Source) -> str:
    """Identity of an entry in an index: two collections that list one file have an entry each."""
    return f"{file.collection}\x1e{file.key}"


_KEPT: Final = (
    "label", "domain", "size_bytes", "modified", "mark", "box", "region", "collection", "metadata",
)  # fmt: skip


def row_of(content_id: str, files: list[Source]) -> dict[str, Any]:
    """The columns of a row that say which files show its content; the first of them gives path and label.

    It also gives the further columns of a catalog; what it does not say is taken from the others.
    """
    files = sorted(files, key=lambda file: (file.key, file.collection))
    first = files[0]
    modified = [file.modified for file in files if file.modified is not None]
    noted = []
    for file in files:
        kept = {name: getattr(file, name) for name in _KEPT}
        said = {name: value for name, value in kept.items() if value not in (None, "", {})}
        noted.append({"path": file.location, **said})
    return {
        **{name: value for file in reversed(files) for name, value in file.metadata.items()},
        "id": content_id,
        "path": first.location,
        "label": first.label,
        "domain": first.domain,
        "sha256": content_id if first.box is None else None,
        "files": json.dumps(noted, ensure_ascii=False),
        "paths": list(dict.fromkeys(file.location for file in files)),
        "labels": sorted({file.label for file in files}),
        "domains": sorted({file.domain for file in files}),
        "folders": sorted({folder for file in files for folder in folders_above(file.location)}),
        "size_bytes": first.size_bytes,
        "modified": max(modified, default=None),
    }


def looks_of(image: Image.Image, columns: Mapping[str, str]) -> dict[str, Any]:
    """The columns of a row that a decoded image gives: its sides, a thumbnail, when and where it was taken.

    Args:
        image: decoded by :func:`samething.images.decode`.
        columns: those of the index, with their kinds.
    """
    width, height = image.info.get("full_size", image.size)
    capture: Mapping[str, Any] = image.info.get("capture", {})
    return {
        **{name: value for name, value in capture.items() if columns.get(name) == CAPTURE_COLUMNS[name]},
        "width": width,
        "height": height,
        "thumbnail": thumbnail(image, longer_side=THUMBNAIL_SIDE),
    }


def is_blank(row: Mapping[str, Any]) -> bool:
    """Whether an image is of one colour all over, by its thumbnail: all such images are alike."""
    with Image.open(io.BytesIO(row["thumbnail"])) as small:
        bands = (band.getextrema() for band in small.convert("RGB").split())
        return all(high - low <= _ONE_COLOUR for low, high in bands)  # type: ignore[operator]


def files_of(text: str) -> list[Source]:
    """The files of a row, from its column ``files``."""
    found = []
    for value in json.loads(text):
        value |= {name: Box(*value[name]) for name in ("box", "region") if name in value}
        found.append(Source(value.pop("path"), **value))
    return found


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
