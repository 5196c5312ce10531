"""The catalog: one table that says which pictures there are, what each one shows and what it is used for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from jaxtyping import Bool, Int

from samething.errors import ArtefactError, InputError
from samething.files import Json, atomic_path, fingerprint

FORMAT_VERSION: Final = 1

Role: TypeAlias = Literal["train", "val", "query", "index", "query+index"]
ROLES: Final = ("train", "val", "query", "index", "query+index")

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
    """Pictures with their instance labels, domains and roles.

    Columns: ``image`` (path relative to ``root``), ``label`` (instance, unique across domains), ``domain``,
    ``dataset``, ``role`` (``train``, ``val``, ``query``, ``index`` or ``query+index``), ``width`` and
    ``height`` (pixels, may be null), ``sha256`` (of the file, may be null). Further columns are kept.
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

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, object]], *, root: Path) -> Catalog:
        """Build a catalog from one mapping a picture.

        Only ``image`` and ``label`` are needed; ``domain`` and ``dataset`` default to ``"default"``, ``role``
        to ``"train"``. A label that occurs in several domains becomes ``domain/label`` in each, because an
        instance belongs to one domain.
        """
        rows = list(rows)
        extra = [
            name for name in dict.fromkeys(key for row in rows for key in row) if name not in SCHEMA.names
        ]
        defaults = {"domain": "default", "dataset": "default", "role": "train"}
        columns: dict[str, pa.Array] = {}
        for field in SCHEMA:
            values = [row.get(field.name, defaults.get(field.name)) for row in rows]
            columns[field.name] = pa.array(values, field.type)
        for name in extra:
            columns[name] = pa.array([row.get(name) for row in rows])
        return cls(_with_unique_labels(pa.table(columns)), Path(root))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def strings(self, column: str) -> np.ndarray:
        """One text column as an array of Python strings (nulls become the empty string)."""
        return np.asarray(self.table[column].fill_null("").to_pylist(), dtype=object)

    @property
    def paths(self) -> list[Path]:
        """Absolute path of every picture, in catalog order."""
        return [self.root / image for image in self.table["image"].to_pylist()]

    @property
    def domains(self) -> list[str]:
        """The domains, sorted."""
        return sorted(set(self.strings("domain")))

    def class_ids(self) -> Int[np.ndarray, " n"]:
        """Instances as integers 0…, numbered by (domain, label) in sorted order."""
        keys = np.char.add(
            np.char.add(self.strings("domain").astype(str), "\x1f"), self.strings("label").astype(str)
        )
        return np.unique(keys, return_inverse=True)[1].astype(np.int64)

    def has_role(self, *roles: Role) -> Bool[np.ndarray, " n"]:
        """Rows whose role is one of those given."""
        return np.isin(self.strings("role").astype(str), roles)

    def take(self, rows: Sequence[int] | np.ndarray) -> Catalog:
        """The rows of a boolean mask or an index array, in its order."""
        rows = np.asarray(rows)
        if rows.dtype == bool:
            rows = np.flatnonzero(rows)
        return Catalog(self.table.take(pa.array(rows, pa.int64())), self.root)

    def with_column(self, name: str, values: Sequence[object] | np.ndarray) -> Catalog:
        """The catalog with one column replaced or added."""
        kind = SCHEMA.field(name).type if name in SCHEMA.names else None
        column = pa.array(list(values), kind)
        if name in self.table.column_names:
            position = self.table.column_names.index(name)
            return Catalog(self.table.set_column(position, name, column), self.root)
        return Catalog(self.table.append_column(name, column), self.root)

    @property
    def fingerprint(self) -> str:
        """Identity of the content: every column but not the root, so a moved folder keeps it."""
        columns: dict[str, Json] = {name: self.table[name].to_pylist() for name in SCHEMA.names}
        return fingerprint(columns)

    # ---- reading and writing

    @classmethod
    def read(cls, source: Path, *, root: Path | None = None) -> Catalog:
        """Read a Parquet catalog, or a CSV with at least ``img_path`` (or ``image``) and ``label``.

        Args:
            source: the file.
            root: folder of the pictures; by default the one the catalog names, for a CSV its own folder.

        Raises:
            ArtefactError: the file is missing or unreadable.
            InputError: columns are missing or a role is unknown.
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
                return cls._from_csv(source, root)
            table = pq.read_table(source)
        except (pa.ArrowException, OSError) as error:
            raise ArtefactError(
                f"{source} cannot be read ({error})",
                expected="a Parquet or CSV table",
                next_step="make the catalog again, or check that the file is whole",
            ) from error
        return cls._from_parquet(source, table, root)

    @classmethod
    def _from_parquet(cls, source: Path, table: pa.Table, root: Path | None) -> Catalog:
        metadata = table.schema.metadata or {}
        version = int(metadata.get(b"samething.format_version", b"0"))
        if version > FORMAT_VERSION:
            raise ArtefactError(
                f"{source} has catalog format version {version}",
                expected=f"version {FORMAT_VERSION} or older",
                next_step="pip install --upgrade samething",
            )
        if version == 0:
            return cls._from_foreign_table(source, table, root)
        stored_root = Path(metadata.get(b"samething.root", b".").decode())
        return cls(table.replace_schema_metadata(None), root or source.parent / stored_root)

    @classmethod
    def _from_csv(cls, source: Path, root: Path | None) -> Catalog:
        with source.open(encoding="utf-8-sig") as stream:
            header = stream.readline().rstrip("\r\n").split(",")
        text_columns = {name.strip('"'): pa.string() for name in header}
        for name in ("width", "height"):
            text_columns.pop(name, None)
        options = pa.csv.ConvertOptions(column_types=text_columns, strings_can_be_null=False)
        return cls._from_foreign_table(source, pa.csv.read_csv(source, convert_options=options), root)

    @classmethod
    def _from_foreign_table(cls, source: Path, table: pa.Table, root: Path | None) -> Catalog:
        names = [
            "image" if name == "img_path" and "image" not in table.column_names else name
            for name in table.column_names
        ]
        table = table.rename_columns(names)
        missing = [name for name in ("image", "label") if name not in names]
        if missing:
            raise InputError(
                f"{source} has the columns {', '.join(table.column_names)}",
                expected="img_path (or image) and label, and optionally domain, dataset, role",
                next_step=f"rename or add: {', '.join(missing)}",
            )
        table = table.set_column(names.index("label"), "label", table["label"].cast(pa.string()))
        defaults = {"domain": "default", "dataset": source.stem, "role": "train"}
        for field in SCHEMA:
            if field.name not in table.column_names:
                filler = pa.array([defaults.get(field.name)] * table.num_rows, field.type)
                table = table.append_column(field.name, filler)
        table = table.select(
            [*SCHEMA.names, *(name for name in table.column_names if name not in SCHEMA.names)]
        )
        catalog = cls(_with_unique_labels(table), root or source.parent)
        catalog._check_roles(source)
        return catalog

    def _check_roles(self, source: Path) -> None:
        roles = self.strings("role")
        for row, role in enumerate(roles):
            if role not in ROLES:
                raise InputError(
                    f"{source}, row {row}: role {role!r}",
                    expected=f"one of {', '.join(ROLES)}",
                    next_step="correct the role column",
                )

    def write(self, target: Path) -> Path:
        """Write the catalog as Parquet, atomically; the root is kept relative to the file where it can be."""
        target = Path(target)
        metadata = {
            "samething.format_version": str(FORMAT_VERSION),
            "samething.root": _relative(self.root.resolve(), target.parent.resolve()),
            "samething.fingerprint": self.fingerprint,
        }
        with atomic_path(target) as partial:
            pq.write_table(self.table.replace_schema_metadata(metadata), partial, compression="zstd")
        return target

    # ---- checking, counting, splitting

    def problems(self, *, check_files: bool = True) -> list[Problem]:
        """What is wrong with the catalog, in row order.

        Errors: a missing file, an empty label, the same path twice. Warnings: the same picture (by SHA-256)
        under two labels.
        """
        found: list[Problem] = []
        labels, images, hashes = self.strings("label"), self.strings("image"), self.strings("sha256")
        first_row_of_image: dict[str, int] = {}
        first_row_of_hash: dict[str, int] = {}
        for row, (image, label, sha256) in enumerate(zip(images, labels, hashes, strict=True)):
            if not label.strip():
                found.append(Problem(row, "error", f"{image} has an empty label"))
            if image in first_row_of_image:
                message = f"{image} is listed twice (first in row {first_row_of_image[image]})"
                found.append(Problem(row, "error", message))
            first_row_of_image.setdefault(image, row)
            if check_files and not (self.root / image).is_file():
                found.append(Problem(row, "error", f"{self.root / image} does not exist"))
            if sha256:
                other = first_row_of_hash.setdefault(sha256, row)
                if labels[other] != label:
                    message = (
                        f"{image} is the same picture as {images[other]} (row {other}), which has the label"
                    )
                    found.append(Problem(row, "warning", f"{message} {labels[other]!r}, not {label!r}"))
        return found

    def require_files(self) -> None:
        """Refuse a catalog whose pictures have moved.

        Raises:
            ArtefactError: none of the first pictures is under the root.
        """
        sample = self.paths[:100]
        if sample and not any(path.exists() for path in sample):
            raise ArtefactError(
                f"none of the first {len(sample)} pictures of the catalog is under {self.root} "
                f"(for instance {sample[0]})",
                expected="the folder the catalog was made from",
                next_step="if the pictures were moved, give their new folder with --root",
            )

    def counts(self) -> list[dict[str, object]]:
        """Rows of ``domain``, ``role``, ``instances`` and ``pictures``, sorted."""
        table = self.table.group_by(["domain", "role"]).aggregate(
            [("label", "count_distinct"), ("label", "count")]
        )
        rows = [
            {
                "domain": row["domain"],
                "role": row["role"],
                "instances": row["label_count_distinct"],
                "pictures": row["label_count"],
            }
            for row in table.to_pylist()
        ]
        return sorted(rows, key=lambda row: (str(row["domain"]), ROLES.index(str(row["role"]))))

    def split_by_class(self, *, val: float, test: float, seed: int = 0) -> Catalog:
        """Give whole instances to training, validation and test, in every domain by the same shares.

        Instances with one picture only can neither be trained on nor found, so they go to training, where
        they are dropped with a notice. Validation pictures get the role ``val``, test pictures
        ``query+index``: each is searched for among the others.

        Args:
            val: share of each domain's instances for validation, in [0, 1).
            test: share for the test, in [0, 1); ``val + test`` must be below 1.
            seed: the split is a pure function of labels and seed.
        """
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise InputError(
                f"val={val}, test={test}",
                expected="shares in [0, 1) whose sum is below 1",
                next_step="give smaller shares",
            )
        classes = self.class_ids()
        sizes = np.bincount(classes)
        domains = self.strings("domain").astype(str)
        roles = np.full(len(self), "train", dtype=object)
        for number, domain in enumerate(self.domains):
            members = np.unique(classes[domains == domain])
            members = members[sizes[members] > 1]
            order = np.random.default_rng([seed, number]).permutation(members)
            num_val, num_test = round(val * len(order)), round(test * len(order))
            roles[np.isin(classes, order[:num_val])] = "val"
            roles[np.isin(classes, order[num_val : num_val + num_test])] = "query+index"
        return self.with_column("role", roles)


def _with_unique_labels(table: pa.Table) -> pa.Table:
    """Prefix the labels that occur in several domains with their domain."""
    labels = table["label"].fill_null("")
    domains = table["domain"].fill_null("")
    pairs = pa.table({"label": labels, "domain": domains}).group_by(["label", "domain"]).aggregate([])
    per_label = pairs.group_by("label").aggregate([("domain", "count")])
    shared = per_label.filter(pc.greater(per_label["domain_count"], 1))["label"]
    if len(shared) == 0:
        return table.set_column(table.column_names.index("label"), "label", labels)
    prefixed = pc.binary_join_element_wise(domains, labels, "/")
    unique = pc.if_else(pc.is_in(labels, value_set=shared.combine_chunks()), prefixed, labels)
    return table.set_column(table.column_names.index("label"), "label", unique)


def _relative(root: Path, folder: Path) -> str:
    """``root`` as seen from ``folder`` when one holds the other, else absolute."""
    if root.is_relative_to(folder):
        return str(root.relative_to(folder))
    if folder.is_relative_to(root):
        return "/".join([".."] * len(folder.relative_to(root).parts))
    return str(root)
