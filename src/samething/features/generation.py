"""One catalog's features in the making: which images are to be described, and the blocks that are done."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float

from samething.catalog import Catalog
from samething.errors import InputError
from samething.features.folder import FORMAT_VERSION, KIND, FeatureSet, Unreadable, write_unreadable
from samething.features.workers import Batch
from samething.files import Json, Manifest, atomic_path, file_sha256, read_json, write_json, write_manifest

RUNTIME_NAME: Final = "runtime.json"


@dataclasses.dataclass(frozen=True)
class Generation:
    """One catalog's features in the making."""

    catalog: Catalog
    folder: Path
    data: Path
    previous: FeatureSet | None
    keys: np.ndarray
    """Identity of each catalog row's image: its SHA-256, or its path where there was no file to hash."""
    reused: dict[str, int]
    """Key to row of the previous generation."""
    todo: list[int]
    """Catalog rows to compute: the first row of each image that is not reused."""
    copies: dict[int, list[int]]
    """Rows that show the same image as a row to compute, itself included; only where there are several."""
    batch_size: int

    @classmethod
    def of(
        cls,
        catalog: Catalog,
        *,
        folder: Path,
        batch_size: int,
        previous: FeatureSet | None,
        write: bool = True,
    ) -> Generation:
        """What is to be done for a catalog, given what the folder holds; makes the place for it.

        With ``write=False`` nothing is touched.
        """
        name = f"data-{catalog.fingerprint}"
        if previous is not None and previous.manifest.content["data"] == name:
            name += "-again"  # images that could not be read are tried again; what is finished stays whole
        data = folder / name
        batch_size = _pinned_batch_size(data / "blocks", batch_size, write=write)
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
        """The file of a batch."""
        return self.data / "blocks" / f"{number:07d}.npz"

    def missing(self) -> dict[int, list[int]]:
        """Batches that are not done, by their number."""
        return {number: rows for number, rows in enumerate(self.batches) if not _is_whole(self.block(number))}

    @property
    def pinned_runtime(self) -> str | None:
        """The runtime that this folder began with, so that all its rows are alike."""
        if self.runtime.exists():
            return str(read_json(self.runtime)["name"])
        if self.previous is not None:
            pinned: str | None = self.previous.manifest.content.get("runtime")
            return pinned
        return None

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


def _pinned_batch_size(blocks: Path, batch_size: int, *, write: bool) -> int:
    """The batch size the run began with: blocks of a resumed run must be those of the first."""
    path = blocks / "batch_size.json"
    if path.exists():
        return int(read_json(path))
    if write:
        blocks.mkdir(parents=True, exist_ok=True)
        write_json(path, batch_size)
    return batch_size


def _is_whole(block: Path) -> bool:
    """Whether a block is there, and not cut short by a loss of power."""
    try:
        with block.open("rb") as stream, np.load(stream) as content:
            return len(content["rows"]) == len(content["features"]) and "reasons" in content
    except FileNotFoundError:
        return False
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return False


# ---- the end of a run


def finish(
    generation: Generation,
    job: dict[str, Json],
    computed: set[str],
    reasons: dict[int, str],
    *,
    num_parameters: int,
    images_per_second: float | None,
) -> None:
    """Gather blocks and reused rows in catalog order, switch the manifest, then remove what is left over."""
    readable = np.array([key in computed or key in generation.reused for key in generation.keys])
    images = generation.catalog.strings("image")
    unreadable = [Unreadable(images[row], reasons[int(row)]) for row in np.flatnonzero(~readable)]
    if not readable.any():
        shutil.rmtree(generation.data)  # so that the next run looks at the files again
        raise InputError(
            f"none of the {len(readable):,} images could be read (the first: {unreadable[0]})",
            expected="at least one readable image",
            next_step="check the files; images that were moved are found again with --root",
        )
    if images_per_second is None and generation.previous is not None:
        images_per_second = generation.previous.manifest.content.get("images_per_second")
    _gather(generation, np.flatnonzero(readable), job["backbone"]["width"])
    generation.catalog.take(readable).write(generation.data / "catalog.parquet")
    write_unreadable(generation.data / "unreadable.csv", unreadable)
    content = {
        "data": generation.data.name,
        "num_rows": int(readable.sum()),
        "num_unreadable": len(unreadable),
        "sha256": file_sha256(generation.data / "features.npy"),
        "num_backbone_parameters": num_parameters,
        "images_per_second": images_per_second,
        **_runtime_of(generation),
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


def _runtime_of(generation: Generation) -> dict[str, Json]:
    """What computed, and what was measured when it was chosen."""
    if generation.runtime.exists() or generation.previous is None:
        record = read_json(generation.runtime)
        return {"runtime": record["name"], "runtime_record": record}
    content = generation.previous.manifest.content
    return {key: content[key] for key in ("runtime", "runtime_record") if key in content}


def computed_keys(generation: Generation) -> tuple[set[str], dict[int, str]]:
    """Images that the blocks hold a feature of, and for the other catalog rows the reasons."""
    computed: set[str] = set()
    reasons: dict[int, str] = {}
    for number in range(len(generation.batches)):
        with np.load(generation.block(number)) as block:
            computed.update(generation.keys[block["rows"]])
            reasons.update(zip(block["bad_rows"].tolist(), block["reasons"].tolist(), strict=True))
    return computed, reasons


def _gather(generation: Generation, kept: np.ndarray, width: int) -> None:
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
