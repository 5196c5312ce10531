"""The catalog: one table that says which images there are, what each one shows and what it is used for."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from samething.arrays import Bool, Int
from samething.catalog.tables import (
    BOX_COLUMNS,
    DEFAULTS,
    FORMAT_VERSION,
    OPTIONAL,
    ROLES,
    SCHEMA,
    TYPES,
    Role,
    cast,
    check_boxes,
    check_roles,
    is_own_format,
    read_table,
    with_unique_labels,
)
from samething.checksums import CATALOG_KEY, NO_DIGEST, seal_catalog
from samething.errors import ArtefactError, InputError
from samething.files import atomic_path
from samething.images import Box, Source, container_of, is_url, keyed, located

_SOURCE_COLUMNS: Final = ("image", "label", "domain", *BOX_COLUMNS)

# Rows turned into text together; what there is of them in memory at a time.
_ROWS_AT_A_TIME: Final = 1 << 16


@dataclasses.dataclass(frozen=True)
class Dropped:
    """An image that was left out, and why."""

    image: str
    """Path as in the catalog; bytes that are no UTF-8 appear as ``\\xNN``."""
    reason: str

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong or odd in a catalog."""

    row: int
    """Row number, counted from 0; in a CSV file the line is ``row + 2``."""
    severity: Literal["error", "warning"]
    message: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Catalog:
    """Images with their instance labels, domains and roles.

    Columns: ``image`` (path relative to ``root``), ``label`` (instance, unique across domains), ``domain``,
    ``dataset``, ``role`` (``train``, ``val``, ``query``, ``index`` or ``query+index``), ``width`` and
    ``height`` (pixels, may be null), ``sha256`` (of the file, may be null). Further columns are kept; of
    these ``box_left``, ``box_top``, ``box_right`` and ``box_bottom`` (pixels of the upright image, null
    for the whole of it) say which part a row shows, and ``version`` (such as size and ETag) tells contents
    of one URL apart where there is no ``sha256``. Instead of a path, ``image`` may be a URL or a member of a
    shard (:mod:`samething.images.addresses`).

    Raises:
        InputError: a column is missing or of a type that cannot be cast, a role is unknown, or a box has
            some of its four sides only.
    """

    table: pa.Table
    root: Path
    """Folder that the paths in ``image`` are relative to."""

    def __post_init__(self) -> None:
        missing = [name for name in SCHEMA.names if name not in self.table.column_names]
        if missing:
            raise InputError(
                f"a table without the columns {', '.join(missing)}",
                expected=f"the columns {', '.join(SCHEMA.names)}",
                next_step="build the catalog with Catalog.from_rows or samething catalog",
            )
        table = self.table
        optional = [field for field in OPTIONAL if field.name in table.column_names]
        for field in [*SCHEMA, *optional]:
            if table.schema.field(field.name).type != field.type:
                position = table.column_names.index(field.name)
                table = table.set_column(position, field, cast(table[field.name], field))
        object.__setattr__(self, "table", table)
        check_roles(table, where="")
        check_boxes(table)

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, object]], *, root: Path) -> Catalog:
        """Build a catalog from one mapping per image.

        Only ``image`` and ``label`` are needed; ``domain`` and ``dataset`` default to ``"default"``, ``role``
        to ``"train"``. A label that occurs in several domains becomes ``domain/label`` in each, because an
        instance belongs to one domain.
        """
        rows = list(rows)
        names = [*SCHEMA.names, *dict.fromkeys(name for row in rows for name in row)]
        columns: dict[str, pa.Array] = {}
        for name in dict.fromkeys(names):
            values = [row.get(name) for row in rows]
            if name in TYPES.names and TYPES.field(name).type == pa.string():
                # numbers and paths are common here, and their text is what is meant
                columns[name] = pa.array(
                    [None if value is None else str(value) for value in values], pa.string()
                )
            else:
                columns[name] = pa.array(values, TYPES.field(name).type if name in TYPES.names else None)
        return cls.from_table(pa.table(columns), root=Path(root), where="the rows given")

    @classmethod
    def from_table(cls, table: pa.Table, *, root: Path, where: str, dataset: str = "default") -> Catalog:
        """Build a catalog from a table with at least ``img_path`` (or ``image``) and ``label``.

        Missing columns and empty cells get defaults: domain ``"default"``, role ``"train"``. Labels are made
        unique across domains as in :meth:`from_rows`.

        Args:
            table: any further columns are kept, behind the catalog's own.
            root: folder that relative paths in the table start from.
            where: the table's name in errors.
            dataset: name in the column ``dataset`` where the table has none.

        Raises:
            InputError: columns are missing, doubled or of the wrong type, a role is unknown, or labels clash.
        """
        has_image = "image" in table.column_names
        names = ["image" if name == "img_path" and not has_image else name for name in table.column_names]
        doubled = sorted({name for name in names if names.count(name) > 1})
        missing = [name for name in ("image", "label") if name not in names]
        if missing or doubled:
            raise InputError(
                f"{where} has the columns {', '.join(table.column_names)}",
                expected="img_path (or image) and label once each, and optionally domain, dataset, role; "
                "in a CSV file separated by commas",
                next_step=f"rename or add: {', '.join(missing)}" if missing else f"keep one {doubled[0]}",
            )
        table = table.rename_columns(names).replace_schema_metadata(None)
        defaults = {**DEFAULTS, "dataset": dataset}
        columns: dict[str, pa.ChunkedArray | pa.Array] = {}
        for field in SCHEMA:
            if field.name in names:
                column = cast(table[field.name], field, where=where)
            else:
                column = pa.chunked_array([pa.nulls(table.num_rows, field.type)])
            if field.name in defaults:
                blank = pc.equal(column.fill_null(""), "")
                column = pc.if_else(blank, defaults[field.name], column)
            columns[field.name] = column
        for name in names:
            if name not in columns:
                columns[name] = table[name]
        table = with_unique_labels(pa.table(columns), where=where)
        check_roles(table, where=where)
        return cls(table, Path(root))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def strings(self, column: str) -> np.ndarray:
        """One text column as an array of Python strings (nulls become the empty string)."""
        return np.asarray(self.table[column].fill_null("").to_numpy(), dtype=object)

    @property
    def paths(self) -> list[Path]:
        """Absolute path of every image, in catalog order; of no meaning for URLs: see :attr:`sources`."""
        return [self.root / image for image in self.table["image"].to_pylist()]

    @property
    def sources(self) -> list[Source]:
        """Where each image is, which part of it is meant and what it shows, in catalog order."""
        columns = (self.strings("image"), self.boxes, self.strings("label"), self.strings("domain"))
        root = self.root
        return [
            Source(located(root, image), box, label, domain)
            for image, box, label, domain in zip(*columns, strict=True)
        ]

    def source(self, row: int) -> Source:
        """The source of one row."""
        names = self.table.column_names
        cells = {name: self.table[name][row].as_py() for name in _SOURCE_COLUMNS if name in names}
        sides: list[Any] = [cells.get(name) for name in BOX_COLUMNS]
        box = None if sides[0] is None else Box(*sides)
        return Source(
            located(self.root, cells["image"] or ""), box, cells["label"] or "", cells["domain"] or ""
        )

    @property
    def boxes(self) -> list[Box | None]:
        """The part of its image that each row shows; None for all of it."""
        if BOX_COLUMNS[0] not in self.table.column_names:
            return [None] * len(self)
        sides = zip(*(self.table[name].to_pylist() for name in BOX_COLUMNS), strict=True)
        return [None if box[0] is None else Box(*box) for box in sides]

    def keys(self) -> np.ndarray:
        """Identity of what each row shows: SHA-256 of the file (or location and version) and box."""
        hashes, images = self.strings("sha256"), self.strings("image")
        if "version" in self.table.column_names:
            versions = self.strings("version")
            images = np.where(versions == "", images, images + "\x1f" + versions)
        names = np.where(hashes == "", images, hashes)
        return np.asarray(list(map(keyed, names, self.boxes)), dtype=object)

    @property
    def domains(self) -> list[str]:
        """The domains, sorted."""
        return sorted(pc.unique(self.table["domain"].fill_null("")).to_pylist())

    def class_ids(self) -> Int[np.ndarray, " n"]:
        """Instances as integers 0…, numbered by (domain, label) in sorted order."""
        pairs = pa.chunked_array(
            pc.binary_join_element_wise(
                self.table["domain"].fill_null(""), self.table["label"].fill_null(""), "\x1f"
            )
        )
        encoded = pairs.combine_chunks().dictionary_encode()
        order = pc.array_sort_indices(encoded.dictionary).to_numpy()
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        return np.asarray(rank[encoded.indices.to_numpy()])

    def has_role(self, *roles: Role) -> Bool[np.ndarray, " n"]:
        """Rows whose role is one of those given."""
        found = pc.is_in(self.table["role"], value_set=pa.array(roles, pa.string()))
        return np.asarray(found.to_numpy(), dtype=bool)

    def take(self, rows: Sequence[int] | np.ndarray) -> Catalog:
        """The rows of a boolean mask or an index array, in its order."""
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return Catalog(self.table.take(pa.array(rows, pa.int64())), self.root)

    def with_column(self, name: str, values: Sequence[object] | np.ndarray) -> Catalog:
        """The catalog with one column replaced or added."""
        kind = TYPES.field(name).type if name in TYPES.names else None
        column = pa.array(list(values), kind)
        if name in self.table.column_names:
            position = self.table.column_names.index(name)
            return Catalog(self.table.set_column(position, name, column), self.root)
        return Catalog(self.table.append_column(name, column), self.root)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identity of the content: the catalog's own columns but not the root, so a moved folder keeps it."""
        # that of samething.files, written piece by piece: millions of rows as Python objects take gigabytes
        optional = [
            name
            for name in OPTIONAL.names
            if name in self.table.column_names and self.table[name].null_count < len(self)
        ]
        digest = hashlib.sha256()
        for place, name in enumerate(sorted([*SCHEMA.names, *optional])):
            digest.update(f'{"," if place else "{"}"{name}":['.encode())
            joint = ""
            for chunk in self.table[name].chunks:
                for start in range(0, len(chunk), _ROWS_AT_A_TIME):
                    values = chunk.slice(start, _ROWS_AT_A_TIME).to_pylist()
                    text = json.dumps(values, ensure_ascii=True, separators=(",", ":"))[1:-1]
                    digest.update((joint + text).encode())
                    joint = ","
            digest.update(b"]")
        digest.update(b"}")
        return digest.hexdigest()[:16]

    # ---- reading and writing

    @classmethod
    def read(cls, source: Path, *, root: Path | None = None) -> Catalog:
        """Read a Parquet catalog, or a table with at least ``img_path`` (or ``image``) and ``label``.

        Args:
            source: a ``.parquet`` or ``.csv`` file.
            root: folder of the images; by default the one the catalog names, for a foreign table its own
                folder.

        Raises:
            ArtefactError: the file is missing, unreadable or of a newer format.
            InputError: columns are missing or a role is unknown.
        """
        source = Path(source)
        table = read_table(source)
        if not is_own_format(table):
            return cls.from_table(
                table, root=root or source.parent, where=str(source), dataset=source.stem or "default"
            )
        metadata = table.schema.metadata
        version = int(metadata[b"samething.format_version"])
        if version > FORMAT_VERSION:
            raise ArtefactError(
                f"{source} has catalog format version {version}",
                expected=f"version {FORMAT_VERSION} or older",
                next_step="pip install --upgrade samething",
            )
        stored_root = Path(metadata.get(b"samething.root", b".").decode())
        return cls(table.replace_schema_metadata(None), Path(root or source.parent / stored_root))

    def write(self, target: Path) -> Path:
        """Write the catalog as Parquet, atomically; the root is kept relative to the file where it can be."""
        target = Path(target)
        root, folder = self.root.resolve(), target.parent.resolve()
        if root.is_relative_to(folder) or folder.is_relative_to(root):
            root = Path(os.path.relpath(root, folder))
        metadata = {
            "samething.format_version": str(FORMAT_VERSION),
            "samething.root": root.as_posix(),
            "samething.fingerprint": self.fingerprint,
            CATALOG_KEY: NO_DIGEST,
        }
        with atomic_path(target) as partial:
            # one chunk, so that equal catalogs give equal bytes however they were put together
            table = self.table.combine_chunks().replace_schema_metadata(metadata)
            pq.write_table(table, partial, compression="zstd")
            seal_catalog(partial)
        return target

    # ---- checking, counting, splitting

    def problems(self, *, check_files: bool = True) -> list[Problem]:
        """What is wrong with the catalog, in row order.

        Errors: a missing file, an empty path or label, the same path (of one box, role and domain) twice, an
        empty box. Warnings: the same image (by SHA-256 and box) under two labels.

        Args:
            check_files: look on the disk whether each image is there.
        """
        found: list[Problem] = []
        labels, images, hashes = self.strings("label"), self.strings("image"), self.strings("sha256")
        # an image may be trained on and stand in an index (UnED's Met), or in the index of several domains
        boxes, uses = self.boxes, list(zip(self.strings("role"), self.strings("domain"), strict=True))
        first_row_of_path: dict[tuple[str, Box | None, tuple[str, str]], int] = {}
        first_row_of_hash: dict[tuple[str, Box | None], int] = {}
        for row, (image, label, sha256) in enumerate(zip(images, labels, hashes, strict=True)):
            if not label.strip():
                found.append(Problem(row, "error", f"{image} has an empty label"))
            if not image.strip():
                found.append(Problem(row, "error", "the path is empty"))
                continue
            box = boxes[row]
            place = image if is_url(image) else os.path.normpath(image)
            first = first_row_of_path.setdefault((place, box, uses[row]), row)
            if first != row:
                found.append(Problem(row, "error", f"{image} is listed twice (first in row {first})"))
            if box is not None and (box.left >= box.right or box.top >= box.bottom):
                found.append(Problem(row, "error", f"{image} has the empty box {tuple(box)}"))
            file = container_of(located(self.root, image))
            if check_files and not is_url(file) and not Path(file).is_file():
                found.append(Problem(row, "error", f"{file} does not exist"))
            if not sha256:
                continue
            other = first_row_of_hash.setdefault((sha256, box), row)
            if labels[other] != label:
                message = (
                    f"{image} is the same image as {images[other]} (row {other}), which has the label "
                    f"{labels[other]!r}, not {label!r}"
                )
                found.append(Problem(row, "warning", message))
        return found

    def require_files(self) -> None:
        """Refuse a catalog whose images have moved. What is behind a URL is not looked at.

        Raises:
            ArtefactError: none of the first images is under the root.
        """
        first = self.strings("image")[:100]
        files = dict.fromkeys(container_of(located(self.root, image)) for image in first)
        sample = [] if any(map(is_url, files)) else [Path(file) for file in files]
        if sample and not any(path.exists() for path in sample):
            moved = "if the images were moved, give their new folder with --root"
            raise ArtefactError(
                f"none of the first {len(sample)} images of the catalog is under {self.root}: {sample[0]}",
                expected="the folder the catalog was made from, and paths with / between folders",
                next_step="write / for \\ in the paths of the table" if "\\" in str(sample[0]) else moved,
            )

    def counts(self) -> list[dict[str, object]]:
        """Rows of ``domain``, ``role``, ``instances`` and ``images``, sorted."""
        table = self.table.group_by(["domain", "role"]).aggregate(
            [("label", "count_distinct"), ("label", "count")]
        )
        table = table.select(["domain", "role", "label_count_distinct", "label_count"])
        rows = table.rename_columns(["domain", "role", "instances", "images"]).to_pylist()
        return sorted(rows, key=lambda row: (str(row["domain"]), ROLES.index(str(row["role"]))))

    def split_by_class(self, *, val: float, test: float, seed: int = 0) -> Catalog:
        """Give whole instances to training, validation and test, in every domain by the same shares.

        Instances with one image only can neither be trained on nor found, so they go to training, where
        they are dropped with a notice. Validation images get the role ``val``, test images
        ``query+index``: each is searched for among the others.

        Args:
            val: share of each domain's instances for validation, in [0, 1).
            test: share for the test, in [0, 1); ``val + test`` must be below 1.
            seed: the split of a domain is a pure function of its name, its labels and the seed, whatever the
                order of the rows and whichever other domains there are.
        """
        require_shares(val=val, test=test, seed=seed)
        classes = self.class_ids()
        sizes = np.bincount(classes)
        domains = self.strings("domain")
        roles = np.full(len(self), "train", dtype=object)
        for domain in self.domains:
            members = np.unique(classes[domains == domain])
            members = members[sizes[members] > 1]
            order = np.random.default_rng([seed, *domain.encode()]).permutation(members)
            num_val, num_test = round(val * len(order)), round(test * len(order))
            roles[np.isin(classes, order[:num_val])] = "val"
            roles[np.isin(classes, order[num_val : num_val + num_test])] = "query+index"
        return self.with_column("role", roles)


def require_shares(*, val: float, test: float, seed: int) -> None:
    """Refuse shares of a split that cannot be.

    Raises:
        InputError: a share is outside [0, 1), nothing is left for training, or the seed is negative.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1 and seed >= 0):
        raise InputError(
            f"val={val}, test={test}, seed={seed}",
            expected="shares in [0, 1) whose sum is below 1, and a seed of at least 0",
            next_step="give smaller shares, or another seed",
        )
