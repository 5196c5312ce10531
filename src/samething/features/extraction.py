"""The streaming pipeline: decode in worker processes, describe in batches, keep each batch as it is done."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import rich.console
import rich.progress
import torch
from jaxtyping import Float, UInt8
from torch.utils.data import DataLoader, Dataset

from samething.backbones import Backbone, load_backbone, write_onnx
from samething.catalog import Catalog
from samething.errors import ArtefactError, ImageError, InputError
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
    disk_errors,
    file_sha256,
    is_finished,
    only_one_writer,
    read_json,
    require_same,
    write_json,
    write_manifest,
)
from samething.images import Preprocessing, ResizePolicy, decode, prepare

RUNTIME_NAME: Final = "runtime.json"

PARITY_COSINE: Final = 0.9998
"""Least cosine between another runtime's features and torch's on the job's own pictures."""


def extract(
    catalog: Catalog,
    *,
    backbone_name: str,
    folder: Path,
    weights: Path | None,
    resize: ResizePolicy | None,
    batch_size: int,
    num_workers: int | None,
    runtime: Literal["auto", "torch", "onnxruntime"],
) -> FeatureSet:
    """Compute the features of a catalog into a folder; see :func:`samething.features.features`."""
    if len(catalog) == 0:
        raise InputError(
            "a catalog without pictures",
            expected="at least one picture",
            next_step="make another with: samething catalog FOLDER",
        )
    backbone = load_backbone(backbone_name, weights=weights, resize=resize)
    job = made_from(backbone.describe())
    with only_one_writer(folder), disk_errors(folder):
        _claim(folder, job)
        previous = FeatureSet.open(folder) if is_finished(folder) else None
        if previous is not None and previous.manifest.made_from["catalog"] == catalog.fingerprint:
            return previous
        catalog.require_files()
        generation = _Generation.of(catalog, folder=folder, batch_size=batch_size, previous=previous)
        num_computed = _compute_blocks(generation, backbone, num_workers=num_workers, runtime=runtime)
        _finish(generation, job, num_parameters=backbone.num_parameters)
    return dataclasses.replace(FeatureSet.open(folder), num_computed=num_computed)


def _claim(folder: Path, job: dict[str, Json]) -> None:
    """Write down what the folder is for, or check that it is for the same."""
    path = folder / JOB_NAME
    if path.exists():
        require_same(
            job,
            read_json(path),
            what=f"{folder} is for other features",
            next_step="choose another folder with -o, or remove this one",
        )
        return
    strangers = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
    if strangers:
        raise ArtefactError(
            f"{folder} is not a feature folder and holds {', '.join(sorted(strangers)[:3])}",
            expected="a feature folder, or a new or empty one",
            next_step="choose another folder with -o",
        )
    write_json(path, job)


# ---- which pictures have to be described


@dataclasses.dataclass(frozen=True)
class _Generation:
    """One catalog's features in the making."""

    catalog: Catalog
    folder: Path
    data: Path
    previous: FeatureSet | None
    keys: np.ndarray
    """Identity of each catalog row's picture: its SHA-256, or its path where the catalog has none."""
    reused: dict[str, int]
    """Key to row of the previous generation."""
    todo: list[int]
    """Catalog rows to compute: the first row of each picture that is not reused."""
    batch_size: int

    @classmethod
    def of(
        cls, catalog: Catalog, *, folder: Path, batch_size: int, previous: FeatureSet | None
    ) -> _Generation:
        data = folder / f"data-{catalog.fingerprint}"
        (data / "blocks").mkdir(parents=True, exist_ok=True)
        batch_size = _pinned_batch_size(data / "blocks", batch_size)
        keys = _keys(catalog)
        wanted = set(keys)
        reused = {}
        if previous is not None:
            reused = {key: row for row, key in enumerate(_keys(previous.catalog)) if key in wanted}
        first_row: dict[str, int] = {}
        for row, key in enumerate(keys):
            first_row.setdefault(key, row)
        todo = [row for key, row in first_row.items() if key not in reused]
        return cls(catalog, folder, data, previous, keys, reused, todo, batch_size)

    @property
    def batches(self) -> list[list[int]]:
        """Catalog rows of each block; they depend on the job alone, so a resumed run makes the same ones."""
        return [
            self.todo[start : start + self.batch_size] for start in range(0, len(self.todo), self.batch_size)
        ]

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
class _Pictures(Dataset[tuple[int, UInt8[np.ndarray, "3 height width"] | str]]):
    """Prepared pixels of a catalog row, or the reason why there are none."""

    paths: list[Path]
    hashes: list[str]
    preprocessing: Preprocessing

    def __getitem__(self, row: int) -> tuple[int, UInt8[np.ndarray, "3 height width"] | str]:
        path = self.paths[row]
        try:
            content = path.read_bytes()
            if self.hashes[row] and hashlib.sha256(content).hexdigest() != self.hashes[row]:
                return row, "changed since the catalog was made; make the catalog again"
            return row, prepare(decode(content), self.preprocessing)
        except OSError as error:
            return row, error.strerror or str(error)
        except ImageError as error:
            return row, error.given.removeprefix("the bytes given ")

    def __len__(self) -> int:
        return len(self.paths)


@dataclasses.dataclass(frozen=True)
class _Batch:
    """What the workers send home of one block."""

    rows: list[int]
    pixels: torch.Tensor
    reasons: dict[int, str]


def _collate(items: list[tuple[int, Any]]) -> _Batch:
    good = [(row, pixels) for row, pixels in items if not isinstance(pixels, str)]
    pixels = np.stack([pixels for _, pixels in good]) if good else np.empty((0, 3, 1, 1), np.uint8)
    reasons = {row: reason for row, reason in items if isinstance(reason, str)}
    return _Batch([row for row, _ in good], torch.from_numpy(pixels), reasons)


def _one_thread(worker: int) -> None:
    del worker
    torch.set_num_threads(1)


# ---- describing


@runtime_checkable
class _Describe(Protocol):
    def __call__(self, pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]: ...


def _with_torch(backbone: Backbone, device: str) -> _Describe:
    network = backbone.to(device).to(memory_format=torch.channels_last)

    def describe(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        with torch.inference_mode():
            batch = pixels.to(device, memory_format=torch.channels_last)
            features: np.ndarray = network(batch).cpu().numpy()
            return features

    return describe


def _with_onnxruntime(backbone: Backbone) -> _Describe:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        graph = write_onnx(backbone, Path(folder) / "backbone.onnx", size=backbone.preprocessing.size)
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def describe(pixels: UInt8[torch.Tensor, "b 3 height width"]) -> Float[np.ndarray, "b w"]:
        features: np.ndarray = session.run(None, {"pixels": pixels.numpy()})[0]
        return features

    return describe


def _agree(
    describe: _Describe, reference: _Describe, pixels: UInt8[torch.Tensor, "b 3 height width"]
) -> bool:
    ours, theirs = describe(pixels).astype(np.float64), reference(pixels).astype(np.float64)
    cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    return bool(np.all(cosine >= PARITY_COSINE))


def _choose_runtime(
    backbone: Backbone,
    runtime: Literal["auto", "torch", "onnxruntime"],
    blocks: Path,
    sample: UInt8[torch.Tensor, "b 3 height width"],
) -> _Describe:
    """The runtime asked for; a resumed run keeps the one it began with, so that all rows are alike."""
    if torch.cuda.is_available():
        return _with_torch(backbone, "cuda")
    record = blocks / RUNTIME_NAME
    if record.exists():
        runtime = read_json(record)
    elif runtime == "auto":
        runtime = "onnxruntime" if len(sample) else "torch"
    if runtime == "onnxruntime":
        try:
            describe = _with_onnxruntime(backbone)
            agrees = _agree(describe, _with_torch(backbone, "cpu"), sample)
        except Exception:  # an architecture that cannot be exported is no reason not to describe pictures
            agrees = False
        if agrees:
            write_json(record, "onnxruntime")
            return describe
    write_json(record, "torch")
    return _with_torch(backbone, "cpu")


def _compute_blocks(
    generation: _Generation,
    backbone: Backbone,
    *,
    num_workers: int | None,
    runtime: Literal["auto", "torch", "onnxruntime"],
) -> int:
    batches = generation.batches
    missing = [number for number in range(len(batches)) if not generation.block(number).exists()]
    if not missing:
        return 0
    loader = DataLoader(
        _Pictures(
            generation.catalog.paths, list(generation.catalog.strings("sha256")), backbone.preprocessing
        ),
        batch_sampler=[batches[number] for number in missing],
        num_workers=max(1, (os.cpu_count() or 2) - 1) if num_workers is None else num_workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
    )
    describe: _Describe | None = None
    with _progress() as progress:
        total = sum(len(batch) for batch in batches)
        task = progress.add_task("features", total=total)
        progress.advance(task, total - sum(len(batches[number]) for number in missing))
        for number, batch in zip(missing, loader, strict=True):
            if describe is None:
                describe = _choose_runtime(backbone, runtime, generation.data / "blocks", batch.pixels[:8])
            rows = describe(batch.pixels) if batch.rows else np.empty((0, backbone.width), np.float32)
            _write_block(generation, number, batch, rows)
            progress.advance(task, len(batches[number]))
    return sum(len(batches[number]) for number in missing)


def _write_block(
    generation: _Generation, number: int, batch: _Batch, features: Float[np.ndarray, "b w"]
) -> None:
    """Keep a batch. Rows that float16 cannot hold count as unreadable rather than as infinity."""
    with np.errstate(over="ignore"):
        rows = features.astype(np.float16)
    finite = np.isfinite(rows).all(axis=1)
    reasons = dict(batch.reasons)
    for row in np.asarray(batch.rows, np.int64)[~finite]:
        reasons[int(row)] = "its feature is not finite in float16"
    with atomic_path(generation.block(number)) as partial, partial.open("wb") as stream:
        np.savez(
            stream,
            rows=np.asarray(batch.rows, np.int64)[finite],
            features=rows[finite],
            bad_rows=np.asarray(list(reasons), np.int64),
            reasons=np.asarray(list(reasons.values()), np.str_),
        )


def _progress() -> rich.progress.Progress:
    return rich.progress.Progress(
        rich.progress.TextColumn("[progress.description]{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("pictures"),
        _Rate(),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(stderr=True),
    )


class _Rate(rich.progress.ProgressColumn):
    """Pictures a second."""

    def render(self, task: rich.progress.Task) -> str:
        return f"{task.speed:.0f}/s" if task.speed else ""


# ---- the end of a run


def _finish(generation: _Generation, job: dict[str, Json], *, num_parameters: int) -> None:
    """Gather blocks and reused rows in catalog order, switch the manifest, then remove what is left over."""
    computed, reasons = _computed_keys(generation)
    readable = np.array([key in computed or key in generation.reused for key in generation.keys])
    if not readable.any():
        first = next(iter(reasons.values()))
        raise InputError(
            f"none of the {len(readable):,} pictures could be read (the first: {first})",
            expected="at least one readable picture",
            next_step="check the files; pictures that were moved are found again with --root",
        )
    images = generation.catalog.strings("image")
    unreadable = [Unreadable(images[row], reasons[generation.keys[row]]) for row in np.flatnonzero(~readable)]
    _gather(generation, np.flatnonzero(readable), job["backbone"]["width"])
    generation.catalog.take(readable).write(generation.data / "catalog.parquet")
    write_unreadable(generation.data / "unreadable.csv", unreadable)
    runtime = generation.data / "blocks" / RUNTIME_NAME
    content = {
        "data": generation.data.name,
        "num_rows": int(readable.sum()),
        "num_unreadable": len(unreadable),
        "sha256": file_sha256(generation.data / "features.npy"),
        "num_backbone_parameters": num_parameters,
        "runtime": read_json(runtime) if runtime.exists() else "none: all rows were there before",
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


def _computed_keys(generation: _Generation) -> tuple[set[str], dict[str, str]]:
    """Pictures that the blocks hold a feature of, and the reasons of those that they do not."""
    computed: set[str] = set()
    reasons: dict[str, str] = {}
    for number in range(len(generation.batches)):
        with np.load(generation.block(number)) as block:
            computed.update(generation.keys[block["rows"]])
            reasons.update(zip(generation.keys[block["bad_rows"]], block["reasons"].tolist(), strict=True))
    return computed, reasons


def _gather(generation: _Generation, kept: np.ndarray, width: int) -> None:
    """Write features.npy, one block after another, so that memory holds a block at a time."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(kept):
        places.setdefault(generation.keys[row], []).append(place)
    with atomic_path(generation.data / "features.npy") as partial:
        target = np.lib.format.open_memmap(partial, "w+", dtype=np.float16, shape=(len(kept), width))
        if generation.previous is not None:
            for key, row in generation.reused.items():
                target[places[key]] = generation.previous.rows[row]
        for number in range(len(generation.batches)):
            with np.load(generation.block(number)) as block:
                for row, feature in zip(block["rows"], block["features"], strict=True):
                    target[places[generation.keys[row]]] = feature
        target.flush()
        del target
