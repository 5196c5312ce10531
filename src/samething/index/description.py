"""What a row of an index is: its columns, its vector, and the checks that both must pass."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from samething.arrays import Float, Shaped
from samething.errors import InputError
from samething.images.parts import Place
from samething.retrieval.codes import Coder, StoredCodes

if TYPE_CHECKING:
    import pyarrow as pa

    Table: TypeAlias = pa.Table
    RecordBatch: TypeAlias = pa.RecordBatch
    Schema: TypeAlias = pa.Schema
else:
    # pyarrow takes 0.3 s to import, so it is imported by the functions that use it
    Table = RecordBatch = Schema = Any

ColumnKind: TypeAlias = Literal["text", "texts", "integer", "number"]
"""``texts`` is a list of texts; a filter lets a row through that has any of the values."""

Items: TypeAlias = Table | Iterable[Mapping[str, Any]]
"""Metadata, one row per image: an Arrow table or a mapping per row. All but ``id`` may be absent or null."""

NORM_TOLERANCE: Final = 1e-3
"""How far from 1 a vector's length may be. Rounding to float16 moves it by less than 5e-4."""

COLUMNS: Final[Mapping[str, str]] = {
    "id": "text",  # identity of the image, such as the SHA-256 of its file
    "path": "text",
    "label": "text",
    "domain": "text",
    "width": "integer",  # pixels
    "height": "integer",  # pixels
    "sha256": "text",  # of the file
    "thumbnail": "bytes",  # a small JPEG
}
"""Metadata columns every index has. Extra ones are named when it is made."""

_COLUMN_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")
_RESERVED: Final = frozenset({"vector", "vector_crc32", "score"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexDescription:
    """What an index is bound to for life."""

    dim: int
    """Number of dimensions of a vector, at least 1."""
    model_name: str
    """Name of the model that made the vectors, for people."""
    model_fingerprint: str
    """Identity of that model, for the program."""
    extra_columns: Mapping[str, ColumnKind] = dataclasses.field(default_factory=dict)
    """Further metadata columns and their kinds: ``text``, ``texts`` (a list of them), ``integer`` (64 bits)
    or ``number`` (float64)."""
    coder: Coder | None = None
    """What turns vectors into the bytes that are kept; None: float32 as they are."""
    regions: str | None = None
    """How the parts of an image are chosen that have vectors of their own; None: only the whole has one."""

    def __post_init__(self) -> None:
        if self.coder is not None and len(self.coder.step) != self.dim:
            raise InputError(
                f"codes of {len(self.coder.step)} numbers for vectors of {self.dim}",
                expected="a coder of the same dimension",
                next_step="give the model's own coder",
            )
        if self.dim < 1:
            raise InputError(
                f"dim={self.dim}", expected="at least 1 dimension", next_step="give the model's dimension"
            )
        for name in ("model_name", "model_fingerprint"):
            if not getattr(self, name):
                raise InputError(
                    f"{name}=''", expected="a text that is not empty", next_step="give the model's own"
                )
        for name, kind in self.extra_columns.items():
            if not _COLUMN_NAME.fullmatch(name) or name in COLUMNS or name in _RESERVED:
                raise InputError(
                    f"the extra column {name!r}",
                    expected="lower-case letters, digits and underscores, and none of "
                    + ", ".join([*COLUMNS, *sorted(_RESERVED)]),
                    next_step="give the column another name",
                )
            if kind not in ("text", "texts", "integer", "number"):
                raise InputError(
                    f"the extra column {name!r} of kind {kind!r}",
                    expected="text, texts, integer or number",
                    next_step="give one of these kinds",
                )

    @property
    def codes(self) -> StoredCodes:
        """How vectors are kept."""
        return "float32" if self.coder is None else self.coder.kind

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector as it is kept."""
        return 4 * self.dim if self.coder is None else self.coder.num_bytes

    @property
    def columns(self) -> dict[str, str]:
        """All metadata columns and their kinds, in order."""
        return {**COLUMNS, **self.extra_columns}

    def chosen(self, columns: Sequence[str] | None) -> list[str]:
        """The columns to bring along: the id and those named; None: all but the thumbnail.

        Raises:
            InputError: there is none of a name.
        """
        known = self.columns
        if columns is None:
            return [name for name in known if name != "thumbnail"]
        if isinstance(columns, str):
            columns = [columns]
        for name in columns:
            if name not in known:
                raise InputError(
                    f"the column {name!r}",
                    expected=f"columns of this index: {', '.join(known)}",
                    next_step="correct the name",
                )
        return list(dict.fromkeys(["id", *columns]))

    @property
    def item_schema(self) -> Schema:
        """Arrow types of the metadata columns."""
        import pyarrow as pa

        types = {
            "text": pa.string(),
            "texts": pa.list_(pa.string()),
            "integer": pa.int64(),
            "number": pa.float64(),
            "bytes": pa.binary(),
        }
        return pa.schema(
            [pa.field(name, types[kind], nullable=name != "id") for name, kind in self.columns.items()]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Regions:
    """Parts of an image, each with a vector. A search scores the image by the best of these and the whole."""

    places: Sequence[Place]
    vectors: Shaped[np.ndarray, "r _"]


def checked_regions(
    ids: Sequence[str], regions: Sequence[Regions] | None, description: IndexDescription
) -> dict[str, Regions]:
    """Regions by the id of their row, their vectors scaled to length 1.

    Raises:
        InputError: an index without regions, parts outside of the image, or vectors that do not fit.
    """
    if regions is None:
        return {}
    if description.regions is None:
        raise InputError(
            "regions for an index of whole images",
            expected="an index that was made with regions",
            next_step="make it again: samething index FOLDER --regions grid",
        )
    for name, own in zip(ids, regions, strict=True):
        if len(own.places) != len(own.vectors):
            raise InputError(
                f"{len(own.places)} regions and {len(own.vectors)} vectors of {name!r}",
                expected="a vector per region",
                next_step="check how the two were made",
            )
        for left, top, right, bottom in own.places:
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise InputError(
                    f"the region {left:g},{top:g},{right:g},{bottom:g} of {name!r}",
                    expected="left, top, right and bottom as shares of the sides, from 0 to 1",
                    next_step="divide pixels by the image's sides",
                )
    return {
        name: Regions(
            [
                (float(left), float(top), float(right), float(bottom))
                for left, top, right, bottom in own.places
            ],
            unit_vectors(own.vectors, dim=description.dim),
        )
        for name, own in zip(ids, regions, strict=True)
        if len(own.places)
    }


def unit_vectors(vectors: Float[np.ndarray, "n d"], *, dim: int) -> Float[np.ndarray, "n d"]:
    """Vectors checked and scaled to length 1, as float32.

    Raises:
        InputError: another dimension, a number that is not finite, or a length that is not 1; says which row.
    """
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise InputError(
            f"vectors of shape {vectors.shape}",
            expected=f"one row per image and {dim} columns, the dimension of this index",
            next_step="check that the vectors come from the model of this index",
        )
    if not np.issubdtype(vectors.dtype, np.floating):
        raise InputError(
            f"vectors of type {vectors.dtype}", expected="floating point numbers", next_step="convert them"
        )
    wide = vectors.astype(np.float64)
    lengths = np.sqrt((wide * wide).sum(axis=1))
    is_unit = np.abs(lengths - 1) <= NORM_TOLERANCE  # false for NaN
    if not is_unit.all():
        wrong = np.flatnonzero(~is_unit)
        row = int(wrong[0])
        finite = bool(np.isfinite(vectors[row]).all())
        raise InputError(
            f"vector {row} "
            + (f"has the length {lengths[row]:.4g}" if finite else "holds NaN or infinity")
            + (f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""),
            expected=f"finite vectors of length 1 within {NORM_TOLERANCE}",
            next_step="divide every vector by its length; an embedder's output is of length 1 already",
        )
    scaled: Float[np.ndarray, "n d"] = (vectors / lengths[:, None]).astype(np.float32)
    return scaled


def vector_crc32(ids: Sequence[str], vectors: Shaped[np.ndarray, "n _"]) -> list[int]:
    """CRC-32 over id and kept vector of each row; it changes with certainty when a single byte does."""
    rows = np.ascontiguousarray(vectors)
    return [zlib.crc32(row, zlib.crc32(name.encode())) for name, row in zip(ids, rows, strict=True)]


def item_table(items: Items, description: IndexDescription) -> Table:
    """Metadata as a table with all columns of an index, in order; absent ones are null.

    Raises:
        InputError: an unknown column, a value of the wrong kind, or a missing id.
    """
    import pyarrow as pa

    schema = description.item_schema
    try:
        if isinstance(items, pa.Table):
            table = items
        else:
            rows = list(items)
            names = dict.fromkeys(name for row in rows for name in row)
            table = pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
        unknown = [name for name in table.column_names if name not in schema.names]
        if unknown:
            raise InputError(
                f"metadata with the columns {', '.join(unknown)}",
                expected=f"columns of this index: {', '.join(schema.names)}",
                next_step="leave them out, or make the index with extra_columns",
            )
        columns = [
            table[field.name].cast(field.type)
            if field.name in table.column_names
            else pa.nulls(table.num_rows, field.type)
            for field in schema
        ]
        # an id that is null is refused just below, in words
        table = pa.table(columns, names=schema.names)
    except (pa.ArrowException, UnicodeError, OverflowError) as error:
        raise InputError(
            f"metadata that does not fit ({error})",
            expected="; ".join(f"{name}: {kind}" for name, kind in description.columns.items()),
            next_step="convert the values",
        ) from error
    for row, name in enumerate(table["id"].to_pylist()):
        if not name:
            raise InputError(
                f"row {row} of the metadata has no id",
                expected="an id that is not empty",
                next_step="give each row an id, such as the SHA-256 of its file",
            )
    return table.cast(schema)


def item_rows(rows: list[dict[str, Any]], columns: list[str], description: IndexDescription) -> Table:
    """Metadata that an engine keeps, as a table of some columns."""
    import pyarrow as pa

    schema = pa.schema([description.item_schema.field(name) for name in columns])
    return pa.Table.from_pylist(rows, schema=schema)
