"""The streaming pipeline: decode in worker processes, describe in batches, keep each batch as it is done."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.utils.data import DataLoader, Dataset

from samething.backbones import Backbone, load_backbone
from samething.backbones.runtimes import Describe, RuntimeName, choose_runtime
from samething.catalog import Catalog
from samething.errors import ImageError, InputError
from samething.features.folder import (
    FORMAT_VERSION,
    JOB_NAME,
    KIND,
    FeatureSet,
    Unreadable,
    made_from,
    write_unreadable,
)
from samething.files import (
    Json,
    Manifest,
    atomic_path,
    claim_folder,
    disk_errors,
    file_sha256,
    is_finished,
    only_one_writer,
    read_json,
    write_json,
    write_manifest,
)
from samething.images import Preprocessing, ResizePolicy, decode, prepare
from samething.progress import progress_bar

RUNTIME_NAME: Final = "runtime.json"


def extract(
    catalog: Catalog,
    *,
    backbone_name: str,
    folder: Path,
    weights: Path | None,
    resize: ResizePolicy | None,
    batch_size: int,
    num_workers: int | None,
    runtime: RuntimeName,
) -> FeatureSet:
    """Compute the features of a catalog into a folder; see :func:`samething.features.features`."""
    if len(catalog) == 0:
        raise InputError(
            "a catalog without pictures",
            expected="at least one picture",
            next_step="make another with: samething catalog FOLDER",
        )
    if batch_size < 1 or (num_workers is not None and num_workers < 0):
        raise InputError(
            f"batch_size={batch_size}, num_workers={num_workers}",
            expected="a batch of at least 1 picture, and no or some worker processes",
            next_step="give other numbers, or leave them out",
        )
    backbone = load_backbone(backbone_name, weights=weights, resize=resize)
    job = made_from(backbone.describe())
    with only_one_writer(folder), disk_errors(folder):
        claim_folder(
            folder,
            JOB_NAME,
            job,
            kind=KIND,
            next_step="choose another folder with -o, or remove this one",
        )
        catalog = _with_hashes(catalog)
        previous = FeatureSet.open(folder) if is_finished(folder) else None
        same = previous is not None and previous.manifest.made_from["catalog"] == catalog.fingerprint
        if previous is not None and same and not previous.unreadable:
            shutil.rmtree(folder / str(previous.manifest.content["data"]) / "blocks", ignore_errors=True)
            return previous
        if not same:
            catalog.require_files()
        generation = _Generation.of(catalog, folder=folder, batch_size=batch_size, previous=previous)
        num_computed = _compute_blocks(generation, backbone, num_workers=num_workers, runtime=runtime)
        computed, reasons = _computed_keys(generation)
        if previous is not None and same and not computed:  # what could not be read still cannot
            shutil.rmtree(generation.data)
            return previous
        _finish(generation, job, computed, reasons, num_parameters=backbone.num_parameters)
    return dataclasses.replace(FeatureSet.open(folder), num_computed=num_computed)


def _with_hashes(catalog: Catalog) -> Catalog:
    """Fill in the SHA-256 of the files where the catalog has none: a path does not tell what it leads to."""
    hashes = catalog.strings("sha256")
    rows = np.flatnonzero(hashes == "")
    if not len(rows):
        return catalog
    catalog.require_files()
    with ThreadPoolExecutor() as pool:
        hashes[rows] = list(pool.map(_hash_or_nothing, catalog.take(rows).paths))
    return catalog.with_column("sha256", [sha256 or None for sha256 in hashes])


def _hash_or_nothing(path: Path) -> str:
    try:
        return file_sha256(path) if path.is_file() else ""  # a pipe would never end
    except OSError:
        return ""  # the picture is listed with its reason later


# ---- which pictures have to be described


@dataclasses.dataclass(frozen=True)
class _Generation:
    """One catalog's features in the making."""

    catalog: Catalog
    folder: Path
    data: Path
    previous: FeatureSet | None
    keys: np.ndarray
    """Identity of each catalog row's picture: its SHA-256, or its path where there was no file to hash."""
    reused: dict[str, int]
    """Key to row of the previous generation."""
    todo: list[int]
    """Catalog rows to compute: the first row of each picture that is not reused."""
    copies: dict[int, list[int]]
    """Rows that show the same picture as a row to compute, itself included; only where there are several."""
    batch_size: int

    @classmethod
    def of(
        cls, catalog: Catalog, *, folder: Path, batch_size: int, previous: FeatureSet | None
    ) -> _Generation:
        name = f"data-{catalog.fingerprint}"
        if previous is not None and previous.manifest.content["data"] == name:
            name += "-again"  # pictures that could not be read are tried again; what is finished stays whole
        data = folder / name
        (data / "blocks").mkdir(parents=True, exist_ok=True)
        batch_size = _pinned_batch_size(data / "blocks", batch_size)
        keys = _keys(catalog)
        wanted = set(keys)
        reused = {}
        if previous is not None:
            reused = {key: row for row, key in enumerate(_keys(previous.catalog)) if key in wanted}
        todo: dict[str, int] = {}
        copies: dict[int, list[int]] = {}
        for row, key in enumerate(keys):
            if key not in reused and (first := todo.setdefault(key, row)) != row:
                copies.setdefault(first, [first]).append(row)
        return cls(catalog, folder, data, previous, keys, reused, list(todo.values()), copies, batch_size)

    @property
    def batches(self) -> list[list[int]]:
        """Catalog rows of each block; they depend on the job alone, so a resumed run makes the same ones."""
        return [
            self.todo[start : start + self.batch_size] for start in range(0, len(self.todo), self.batch_size)
        ]

    @property
    def runtime(self) -> Path:
        """Where the runtime is noted that the blocks were computed with."""
        return self.data / "blocks" / RUNTIME_NAME

    def block(self, number: int) -> Path:
        return self.data / "blocks" / f"{number:07d}.npz"


def _pinned_batch_size(blocks: Path, batch_size: int) -> int:
    """The batch size the run began with: blocks of a resumed run must be those of the first."""
    path = blocks / "batch_size.json"
    if path.exists():
        return int(read_json(path))
    write_json(path, batch_size)
    return batch_size


def _keys(catalog: Catalog) -> np.ndarray:
    hashes, images = catalog.strings("sha256"), catalog.strings("image")
    return np.where(hashes == "", images, hashes)


# ---- decoding, in worker processes


@dataclasses.dataclass(frozen=True)
class _Pictures(Dataset[tuple[int, UInt8[np.ndarray, "3 height width"] | dict[int, str]]]):
    """Prepared pixels of a catalog row, or the reasons why neither it nor a copy of it can be read."""

    catalog: Catalog
    copies: Mapping[int, Sequence[int]]
    preprocessing: Preprocessing

    def __getitem__(self, row: int) -> tuple[int, UInt8[np.ndarray, "3 height width"] | dict[int, str]]:
        reasons = {}
        for place in self.copies.get(row, (row,)):
            pixels = self._pixels(place)
            if not isinstance(pixels, str):
                return row, pixels
            reasons[place] = pixels
        return row, reasons

    def _pixels(self, row: int) -> UInt8[np.ndarray, "3 height width"] | str:
        path = self.catalog.root / (self.catalog.table["image"][row].as_py() or "")
        sha256 = self.catalog.table["sha256"][row].as_py()
        try:
            if sha256 and path.is_file() and file_sha256(path) != sha256:
                return "changed since the catalog was made; make the catalog again"
            return prepare(decode(path), self.preprocessing)
        except OSError as error:
            return error.strerror or str(error)
        except ImageError as error:
            return error.given.removeprefix(str(path)).lstrip(": ")  # the list names the file beside it

    def __len__(self) -> int:
        return len(self.catalog)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What the workers send home of one block."""

    rows: list[int]
    pixels: UInt8[np.ndarray, "b 3 height width"]
    """Not a tensor: those travel through shared memory, of which containers have little."""
    reasons: dict[int, str]


def _collate(items: list[tuple[int, Any]]) -> _Batch:
    good = [(row, pixels) for row, pixels in items if not isinstance(pixels, dict)]
    pixels = np.stack([pixels for _, pixels in good]) if good else np.empty((0, 3, 1, 1), np.uint8)
    bad = [reasons for _, reasons in items if isinstance(reasons, dict)]
    return _Batch(
        [row for row, _ in good], pixels, {row: why for reasons in bad for row, why in reasons.items()}
    )


def _one_thread(worker: int) -> None:
    del worker
    torch.set_num_threads(1)


# ---- describing


def _choose_runtime(
    backbone: Backbone,
    runtime: RuntimeName,
    generation: _Generation,
    sample: UInt8[torch.Tensor, "b 3 height width"],
) -> Describe:
    """The runtime asked for; a folder keeps the one it began with, so that all rows are alike."""
    record = generation.runtime
    if record.exists():
        runtime = read_json(record)
    elif generation.previous is not None:
        runtime = generation.previous.manifest.content.get("runtime", runtime)
    chosen = choose_runtime(backbone, sample, runtime=runtime, num_pictures=len(generation.todo))
    write_json(record, chosen.name)
    return chosen.describe


def _compute_blocks(
    generation: _Generation,
    backbone: Backbone,
    *,
    num_workers: int | None,
    runtime: RuntimeName,
) -> int:
    """Write the blocks that are missing; returns how many pictures were described."""
    batches = generation.batches
    missing = [number for number in range(len(batches)) if not generation.block(number).exists()]
    if not missing:
        return 0
    loader = DataLoader(
        _Pictures(generation.catalog, generation.copies, backbone.preprocessing),
        batch_sampler=[batches[number] for number in missing],
        num_workers=max(1, (os.cpu_count() or 2) - 1) if num_workers is None else num_workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
    )
    describe: Describe | None = None
    num_described = 0
    with progress_bar("pictures") as progress:
        task = progress.add_task("features", total=len(generation.todo))
        progress.advance(task, len(generation.todo) - sum(len(batches[number]) for number in missing))
        for number, batch in zip(missing, loader, strict=True):
            rows = np.empty((0, backbone.width), np.float32)
            if batch.rows:
                pixels = torch.from_numpy(batch.pixels)
                if describe is None:
                    describe = _choose_runtime(backbone, runtime, generation, pixels[:8])
                rows = describe(pixels)
            _write_block(generation, number, batch, rows)
            num_described += len(batch.rows)
            progress.advance(task, len(batches[number]))
    return num_described


def _write_block(
    generation: _Generation, number: int, batch: _Batch, features: Float[np.ndarray, "b w"]
) -> None:
    """Keep a batch. Rows that float16 cannot hold count as unreadable rather than as infinity."""
    with np.errstate(over="ignore"):
        rows = features.astype(np.float16)
    finite = np.isfinite(rows).all(axis=1)
    reasons = dict(batch.reasons)
    for row in np.asarray(batch.rows, np.int64)[~finite]:
        for place in generation.copies.get(int(row), (int(row),)):
            reasons[place] = "its feature is not finite in float16"
    with atomic_path(generation.block(number)) as partial, partial.open("wb") as stream:
        np.savez(
            stream,
            rows=np.asarray(batch.rows, np.int64)[finite],
            features=rows[finite],
            bad_rows=np.asarray(list(reasons), np.int64),
            reasons=np.asarray(list(reasons.values()), np.str_),
        )


# ---- the end of a run


def _finish(
    generation: _Generation,
    job: dict[str, Json],
    computed: set[str],
    reasons: dict[int, str],
    *,
    num_parameters: int,
) -> None:
    """Gather blocks and reused rows in catalog order, switch the manifest, then remove what is left over."""
    readable = np.array([key in computed or key in generation.reused for key in generation.keys])
    images = generation.catalog.strings("image")
    unreadable = [Unreadable(images[row], reasons[int(row)]) for row in np.flatnonzero(~readable)]
    if not readable.any():
        shutil.rmtree(generation.data)  # so that the next run looks at the files again
        raise InputError(
            f"none of the {len(readable):,} pictures could be read (the first: {unreadable[0]})",
            expected="at least one readable picture",
            next_step="check the files; pictures that were moved are found again with --root",
        )
    _gather(generation, np.flatnonzero(readable), job["backbone"]["width"])
    generation.catalog.take(readable).write(generation.data / "catalog.parquet")
    write_unreadable(generation.data / "unreadable.csv", unreadable)
    content = {
        "data": generation.data.name,
        "num_rows": int(readable.sum()),
        "num_unreadable": len(unreadable),
        "sha256": file_sha256(generation.data / "features.npy"),
        "num_backbone_parameters": num_parameters,
        "runtime": _runtime_of(generation),
    }
    made = {**job, "catalog": generation.catalog.fingerprint}
    write_manifest(
        generation.folder,
        Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made, content=content),
    )
    shutil.rmtree(generation.data / "blocks")
    for old in generation.folder.glob("data-*"):
        if old != generation.data:
            shutil.rmtree(old)


def _runtime_of(generation: _Generation) -> Json:
    if generation.runtime.exists() or generation.previous is None:
        return read_json(generation.runtime)
    return generation.previous.manifest.content["runtime"]


def _computed_keys(generation: _Generation) -> tuple[set[str], dict[int, str]]:
    """Pictures that the blocks hold a feature of, and for the other catalog rows the reasons."""
    computed: set[str] = set()
    reasons: dict[int, str] = {}
    for number in range(len(generation.batches)):
        with np.load(generation.block(number)) as block:
            computed.update(generation.keys[block["rows"]])
            reasons.update(zip(block["bad_rows"].tolist(), block["reasons"].tolist(), strict=True))
    return computed, reasons


def _gather(generation: _Generation, kept: np.ndarray, width: int) -> None:
    """Write features.npy, one block after another, so that memory holds a block at a time.

    With ordinary writes: through a memory map, a full disk would end the process without a word.
    """
    places: dict[str, list[int]] = {}
    for place, row in enumerate(kept):
        places.setdefault(generation.keys[row], []).append(place)
    with atomic_path(generation.data / "features.npy") as partial, partial.open("rb+") as stream:
        header = {"descr": "<f2", "fortran_order": False, "shape": (len(kept), width)}
        np.lib.format.write_array_header_1_0(stream, header)
        start = stream.tell()

        def put(key: str, feature: Float[np.ndarray, " w"]) -> None:
            content = feature.astype("<f2").tobytes()
            for place in places[key]:
                stream.seek(start + place * len(content))
                stream.write(content)

        if generation.previous is not None:
            for key, row in generation.reused.items():
                put(key, generation.previous.rows[row])
        for number in range(len(generation.batches)):
            with np.load(generation.block(number)) as block:
                for row, feature in zip(block["rows"], block["features"], strict=True):
                    put(generation.keys[row], feature)
