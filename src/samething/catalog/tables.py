"""The catalog's columns, and foreign tables brought to them."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from samething.checksums import CATALOG_KEY, require_whole_catalog
from samething.errors import ArtefactError, InputError

FORMAT_VERSION: Final = 1

Role: TypeAlias = Literal["train", "val", "query", "index", "query+index"]
ROLES: Final = ("train", "val", "query", "index", "query+index")

# What stands for a domain, data set or role that is not given.
DEFAULTS: Final = {"domain": "default", "dataset": "default", "role": "train"}

SCHEMA: Final = pa.schema(
    [
        ("image", pa.string()),
        ("label", pa.string()),
        ("domain", pa.string()),
        ("dataset", pa.string()),
        ("role", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
    ]
)

BOX_COLUMNS: Final = ("box_left", "box_top", "box_right", "box_bottom")

# Columns that a catalog may have; they decide what a row shows, so they are part of its fingerprint.
OPTIONAL: Final = pa.schema([*((name, pa.int32()) for name in BOX_COLUMNS), ("version", pa.string())])
TYPES: Final = pa.schema([*SCHEMA, *OPTIONAL])


def read_table(source: Path) -> pa.Table:
    """Read a ``.csv`` or Parquet file.

    In a CSV file a further column of numbers alone is one of numbers; ``007`` stays ``007``, a text. Names
    of columns become small letters, digits and underscores; the index of a pandas table is left out.

    Raises:
        ArtefactError: the file is missing or unreadable.
    """
    source = Path(source)
    if not source.is_file():
        raise ArtefactError(
            f"{source} does not exist" if not source.exists() else f"{source} is not a file",
            expected="a catalog (.parquet) or a table with img_path,label[,domain,role] (.csv)",
            next_step="make one with: samething catalog FOLDER -o catalog.parquet",
        )
    try:
        if source.suffix.lower() == ".csv":
            return _with_plain_names(_with_numbers(_read_csv(source)))
        # a foreign table, or one of an earlier version, holds no checksum
        stored = (pq.read_metadata(source).metadata or {}).get(CATALOG_KEY.encode())
        if stored is not None:
            require_whole_catalog(source, stored.decode())
        table = pq.read_table(source)
        return table if is_own_format(table) else _with_plain_names(table)
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(source, error) from error


def _unreadable(source: Path, error: Exception) -> ArtefactError:
    return ArtefactError(
        f"{source} cannot be read ({error})",
        expected="a Parquet table, or a CSV table in UTF-8 whose rows all have the header's columns",
        next_step="make the catalog again, or check that the file is whole",
    )


def verify_catalog(source: Path) -> None:
    """Read a catalog through and compare it with the checksum that it holds.

    Raises:
        ArtefactError: it was changed, is unreadable, or holds none.
    """
    try:
        stored = (pq.read_metadata(source).metadata or {}).get(CATALOG_KEY.encode(), b"").decode()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(source, error) from error
    if not stored:
        raise ArtefactError(
            f"{source} holds no checksum",
            expected="a catalog that this version wrote",
            next_step=f"write it again: samething catalog {source} -o catalog.parquet",
        )
    require_whole_catalog(source, stored, once=False)


def is_own_format(table: pa.Table) -> bool:
    """Whether a table was written by :meth:`Catalog.write`."""
    return b"samething.format_version" in (table.schema.metadata or {})


def _read_csv(source: Path) -> pa.Table:
    with source.open(encoding="utf-8-sig", newline="") as stream:
        header = next(csv.reader(stream), [])
    if "" in header[1:] or len(set(header)) < len(header):
        raise csv.Error(f"its header is {','.join(header)!r}: empty or doubled names")
    options = pa.csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()),
        strings_can_be_null=False,
        quoted_strings_can_be_null=False,
    )
    return pa.csv.read_csv(
        source, convert_options=options, parse_options=pa.csv.ParseOptions(newlines_in_values=True)
    )


_KNOWN: Final = frozenset({*TYPES.names, "img_path", "labels", "split", "attribute"})


def _plain(name: str) -> str:
    """The name of a column as an index takes it: small letters, digits and underscores.

    >>> _plain(" Größe (EU) "), _plain("img_path")
    ('groe_eu', 'img_path')
    """
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", letters).strip("_")


def _with_plain_names(table: pa.Table) -> pa.Table:
    """A foreign table without the index of a pandas table, its columns named as an index takes them."""
    pandas = [name for name in table.column_names if name in ("", "__index_level_0__", "Unnamed: 0")]
    table = table.drop_columns(pandas).replace_schema_metadata(None)
    plain = [_plain(name) for name in table.column_names]
    return table.rename_columns(
        [
            new if new and plain.count(new) == 1 and ";" not in old else old
            for old, new in zip(table.column_names, plain, strict=True)
        ]
    )


def _with_numbers(table: pa.Table) -> pa.Table:
    """A table of texts, whose further columns are numbers where every cell is one or empty."""
    whole, any_number = r"^-?(0|[1-9][0-9]{0,17})$", r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?$"
    for place, name in enumerate(table.column_names):
        if _plain(name) in _KNOWN:
            continue
        texts = pc.if_else(pc.equal(table[name], ""), None, table[name])
        for pattern, kind in ((whole, pa.int64()), (any_number, pa.float64())):
            if texts.null_count < len(texts) and pc.all(pc.match_substring_regex(texts, pattern)).as_py():
                table = table.set_column(place, name, texts.cast(kind))
                break
    return table


def cast(column: pa.ChunkedArray, field: pa.Field, *, where: str = "the table") -> pa.ChunkedArray:
    """A column with the catalog's type; an empty cell of a number column (CSV) is a missing value."""
    try:
        if field.type != pa.string() and pa.types.is_string(column.type):
            column = pc.if_else(pc.equal(column, ""), None, column)
        return column.cast(field.type)
    except pa.ArrowException as error:
        raise InputError(
            f"{where}: the column {field.name} holds {column.type} ({error})",
            expected=f"values that are {field.type}",
            next_step=f"correct or remove the column {field.name}",
        ) from error


def check_roles(table: pa.Table, *, where: str) -> None:
    """Refuse a role that is unknown.

    Raises:
        InputError: says which.
    """
    known = pc.is_in(table["role"], value_set=pa.array(ROLES))
    row = pc.index(known, False).as_py()
    if row >= 0:
        place = f"{where}, row {row}" if where else f"row {row}"
        raise InputError(
            f"{place}: role {table['role'][row].as_py()!r}",
            expected=f"one of {', '.join(ROLES)}",
            next_step="correct the role column",
        )


def check_boxes(table: pa.Table) -> None:
    """Refuse boxes that lack a side.

    Raises:
        InputError: says which.
    """
    sides = [name for name in BOX_COLUMNS if name in table.column_names]
    if not sides:
        return
    if len(sides) < len(BOX_COLUMNS):
        raise InputError(
            f"a table with the columns {', '.join(sides)}",
            expected=f"all of {', '.join(BOX_COLUMNS)}, or none",
            next_step="add the missing sides, or remove the columns",
        )
    nulls = sum(np.asarray(table[name].is_null().to_numpy(), dtype=np.int8) for name in BOX_COLUMNS)
    odd = np.flatnonzero((nulls > 0) & (nulls < len(BOX_COLUMNS)))
    if len(odd):
        raise InputError(
            f"row {odd[0]} ({table['image'][int(odd[0])].as_py()}) has a box with some sides only",
            expected=f"all of {', '.join(BOX_COLUMNS)}, or none for the whole image",
            next_step="correct the box",
        )


def with_unique_labels(table: pa.Table, *, where: str) -> pa.Table:
    """Prefix the labels that occur in several domains with their domain.

    Raises:
        InputError: a prefixed label is taken already, such as ``a/x`` beside ``x`` in the domain ``a``.
    """
    position = table.column_names.index("label")
    labels, domains = table["label"].fill_null(""), table["domain"]
    pairs = pa.table({"label": labels, "domain": domains}).group_by(["label", "domain"]).aggregate([])
    per_label = pairs.group_by("label").aggregate([("domain", "count")])
    # an empty label is a mistake to be reported, not an instance to be told apart
    several = pc.and_(pc.greater(per_label["domain_count"], 1), pc.not_equal(per_label["label"], ""))
    shared = per_label.filter(several)["label"]
    if len(shared) > 0:
        shared = shared.combine_chunks()
        prefixed = pc.binary_join_element_wise(pairs["domain"], pairs["label"], "/")
        new = pc.if_else(pc.is_in(pairs["label"], value_set=shared), prefixed, pairs["label"])
        clash = next(
            (label for label, count in Counter(new.to_pylist()).items() if label and count > 1), None
        )
        if clash is not None:
            raise InputError(
                f"{where}: labels of several domains become domain/label, and {clash!r} is there already",
                expected="labels that are unique across domains, or at least after that",
                next_step=f"rename the label {clash!r}",
            )
        prefixed = pc.binary_join_element_wise(domains, labels, "/")
        labels = pc.if_else(pc.is_in(labels, value_set=shared), prefixed, labels)
    return table.set_column(position, "label", labels)
