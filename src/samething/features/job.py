"""One catalog's features in the making: which images are to be computed, and the blocks that are done."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import zipfile
from pathlib import Path
from typing import Final

import numpy as np

from samething.arrays import Float
from samething.catalog import Catalog, Dropped
from samething.checksums import checksums_of
from samething.errors import ImageError, InputError
from samething.features.store import (
    DATA_FILES,
    FORMAT_VERSION,
    INT8_NAME,
    JOB_NAME,
    KIND,
    FeatureSet,
)
from samething.features.worker_pool import Batch
from samething.files import Json, Manifest, atomic_path, read_json, write_csv, write_json, write_manifest
from samething.images import as_they_are, checksum, in_threads

_RUNTIME_NAME: Final = "runtime.json"


def identified(catalog: Catalog) -> Catalog:
    """Fill in what tells contents apart where the catalog does not: SHA-256 of files, versions of URLs.

    A path does not tell what it leads to, and what is behind a URL may change; size, ETag or time of change
    of a URL cost one short request each (of shards, one each shard).
    """
    hashes = catalog.strings("sha256")
    rows = np.flatnonzero(hashes == "")
    if not len(rows):
        return catalog
    catalog.require_files()
    sources = catalog.take(rows).sources
    remote = np.array([source.is_remote for source in sources])
    local = [source for source in sources if not source.is_remote]
    # an image that cannot be read is listed with its reason later
    hashes[rows[~remote]] = [
        "" if isinstance(found, ImageError) else found for found in in_threads(checksum, local)
    ]
    if remote.any() and "version" not in catalog.table.column_names:
        elsewhere = as_they_are(source for source in sources if source.is_remote)
        versions = np.full(len(catalog), None, dtype=object)
        versions[rows[remote]] = [source.mark or None for source in elsewhere]
        catalog = catalog.with_column("version", versions)
    return catalog.with_column("sha256", [sha256 or None for sha256 in hashes])


@dataclasses.dataclass(frozen=True)
class Job:
    """One catalog's features in the making."""

    catalog: Catalog
    folder: Path
    data: Path
    """Where the new features go; the folder's manifest names it when they are done."""
    previous: FeatureSet | None
    """What the folder holds already."""
    keys: np.ndarray
    """Identity of each catalog row's image: its SHA-256, or its path where there was no file to hash."""
    reused: dict[str, int]
    """Key to row of the previous features."""
    batches: list[list[int]]
    """Catalog rows of each block: the first row of each image that is not reused. They depend on the job
    alone, so a resumed run makes the same ones."""
    copies: dict[int, list[int]]
    """Rows that show the same image as a row to compute, itself included; only where there are several."""
    batch_size: int
    is_retry: bool
    """Whether the same catalog was done before, but for images that could not be read."""

    @classmethod
    def of(
        cls,
        catalog: Catalog,
        *,
        folder: Path,
        batch_size: int,
        previous: FeatureSet | None,
        write: bool = True,
    ) -> Job:
        """What is to be done for a catalog, given what the folder holds; makes the place for it.

        With ``write=False`` nothing is touched.
        """
        name = f"data-{catalog.fingerprint}"
        is_retry = previous is not None and previous.manifest.content["data"] == name
        data = folder / (f"{name}-again" if is_retry else name)  # what is finished stays whole
        # blocks of a resumed run must be those of the first
        noted = data / "blocks" / "batch_size.json"
        if noted.exists():
            batch_size = int(read_json(noted))
        elif write:
            noted.parent.mkdir(parents=True, exist_ok=True)
            write_json(noted, batch_size)
        keys = catalog.keys()
        wanted = set(keys)
        reused = {}
        if previous is not None:
            reused = {key: row for row, key in enumerate(previous.catalog.keys()) if key in wanted}
        todo: dict[str, int] = {}
        copies: dict[int, list[int]] = {}
        for row, key in enumerate(keys):
            if key not in reused and (first := todo.setdefault(key, row)) != row:
                copies.setdefault(first, [first]).append(row)
        rows = list(todo.values())
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        return cls(catalog, folder, data, previous, keys, reused, batches, copies, batch_size, is_retry)

    def block(self, number: int) -> Path:
        """The file of a batch."""
        return self.data / "blocks" / f"{number:07d}.npz"

    def missing(self) -> dict[int, list[int]]:
        """Batches that are not done, by their number."""
        missing = dict(enumerate(self.batches))
        for number in range(len(self.batches)):
            # a block may have been cut short by a loss of power
            with (
                contextlib.suppress(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile),
                self.block(number).open("rb") as stream,
                np.load(stream) as content,
            ):
                if len(content["rows"]) == len(content["features"]) and "reasons" in content:
                    del missing[number]
        return missing

    @property
    def runtime(self) -> str | None:
        """The runtime that this folder began with, so that all its rows are alike."""
        noted = self.data / "blocks" / _RUNTIME_NAME
        if noted.exists():
            return str(read_json(noted)["name"])
        return None if self.previous is None else self.previous.manifest.content.get("runtime")

    def note_runtime(self, record: dict[str, Json]) -> None:
        """Keep what computes, and what was measured when it was chosen."""
        write_json(self.data / "blocks" / _RUNTIME_NAME, record)

    def keep(self, batch: Batch, features: Float[np.ndarray, "b w"]) -> None:
        """Write a batch that is done. Rows that float16 cannot hold are unreadable rather than infinite."""
        with np.errstate(over="ignore"):
            rows = features.astype(np.float16)
        finite = np.isfinite(rows).all(axis=1)
        reasons = dict(batch.reasons)
        for row in np.asarray(batch.rows, np.int64)[~finite]:
            for place in self.copies.get(int(row), (int(row),)):
                reasons[place] = "its feature is not finite in float16"
        # not flushed: that would take longer than all else here, and what a loss of power left is looked at
        target = self.block(batch.number)
        with atomic_path(target, durable=False) as partial, partial.open("wb") as stream:
            np.savez(
                stream,
                rows=np.asarray(batch.rows, np.int64)[finite],
                features=rows[finite],
                bad_rows=np.asarray(list(reasons), np.int64),
                reasons=np.asarray(list(reasons.values()), np.str_),
            )

    def finish(
        self, made_from: dict[str, Json], *, num_parameters: int, images_per_second: float | None
    ) -> None:
        """Gather blocks and reused rows in catalog order, switch the manifest, then remove what is left over.

        Where images were tried again and none could be read this time either, the folder stays as it was.
        """
        computed: set[str] = set()
        reasons: dict[int, str] = {}
        for number in range(len(self.batches)):
            with np.load(self.block(number)) as block:
                computed.update(self.keys[block["rows"]])
                reasons.update(zip(block["bad_rows"].tolist(), block["reasons"].tolist(), strict=True))
        if self.is_retry and not computed:
            shutil.rmtree(self.data)
            return
        readable = np.array([key in computed or key in self.reused for key in self.keys])
        images = self.catalog.strings("image")
        unreadable = [Dropped(images[row], reasons[int(row)]) for row in np.flatnonzero(~readable)]
        if not readable.any():
            shutil.rmtree(self.data)  # so that the next run looks at the files again
            raise InputError(
                f"none of the {len(readable):,} images could be read (the first: {unreadable[0]})",
                expected="at least one readable image",
                next_step="check the files; images that were moved are found again with --root",
            )
        self._gather(np.flatnonzero(readable), made_from["backbone"]["width"])
        self.catalog.take(readable).write(self.data / "catalog.parquet")
        listed = [(bad.image, bad.reason) for bad in unreadable]
        write_csv(self.data / "unreadable.csv", ["image", "reason"], listed)
        before = {} if self.previous is None else self.previous.manifest.content
        noted = self.data / "blocks" / _RUNTIME_NAME
        if noted.exists() or not before:
            record = read_json(noted)
            computed_with = {"runtime": record["name"], "runtime_record": record}
        else:
            computed_with = {key: before[key] for key in ("runtime", "runtime_record") if key in before}
        top = [name for name in (JOB_NAME, INT8_NAME) if (self.folder / name).exists()]
        content = {
            "data": self.data.name,
            "num_rows": int(readable.sum()),
            "num_unreadable": len(unreadable),
            "num_backbone_parameters": num_parameters,
            "images_per_second": before.get("images_per_second")
            if images_per_second is None
            else images_per_second,
            **computed_with,
            **checksums_of(self.folder, [*top, *(f"{self.data.name}/{name}" for name in DATA_FILES)]),
        }
        made = {**made_from, "catalog": self.catalog.fingerprint}
        manifest = Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made, content=content)
        write_manifest(self.folder, manifest)
        shutil.rmtree(self.data / "blocks")
        for old in self.folder.glob("data-*"):
            if old != self.data:
                shutil.rmtree(old)

    def _gather(self, kept: np.ndarray, width: int) -> None:
        """Write features.npy, one block after another, so that memory holds a block at a time.

        With ordinary writes: through a memory map, a full disk would end the process without a word.
        """
        places: dict[str, list[int]] = {}
        for place, row in enumerate(kept):
            places.setdefault(self.keys[row], []).append(place)
        with atomic_path(self.data / "features.npy") as partial, partial.open("rb+") as stream:
            header = {"descr": "<f2", "fortran_order": False, "shape": (len(kept), width)}
            np.lib.format.write_array_header_1_0(stream, header)
            start = stream.tell()

            def put(key: str, feature: Float[np.ndarray, " w"]) -> None:
                content = feature.astype("<f2").tobytes()
                for place in places[key]:
                    stream.seek(start + place * len(content))
                    stream.write(content)

            if self.previous is not None:
                for key, row in self.reused.items():
                    put(key, self.previous.rows[row])
            for number in range(len(self.batches)):
                with np.load(self.block(number)) as block:
                    for row, feature in zip(block["rows"], block["features"], strict=True):
                        put(self.keys[row], feature)
