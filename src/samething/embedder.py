"""Model folder to embeddings, on onnxruntime alone: neither torch nor timm is needed here.

Layout of a model folder (written by ``export``)::

    models/NAME/
      model.onnx            uint8 pixels (b, 3, size, size) to unit-length vectors (b, d)
      model.safetensors     the same weights, for torch
      config.json           backbone, preprocessing, head, training data, metrics, versions, licences
      README.md             the model card
      manifest.json         written last
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from samething.arrays import Embeddings, PixelBatch, Pixels
from samething.errors import ArtefactError, ImageError, InputError
from samething.files import Json, Manifest, file_sha256, read_json, read_manifest
from samething.images import Picture, Preprocessing, decode, prepare

if TYPE_CHECKING:
    import onnxruntime

KIND: Final = "model"
FORMAT_VERSION: Final = 1


@dataclasses.dataclass(frozen=True)
class EmbeddedBatch:
    """Embeddings of some of the pictures given, and the reasons why others have none."""

    positions: list[int]
    """Which of the pictures given the vectors belong to, counted from 0."""
    vectors: Embeddings
    """Unit-length float32, one row a position."""
    unreadable: dict[int, ImageError]
    """Position of each picture that could not be read, with the error."""


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model that turns pictures into unit-length vectors."""

    folder: Path
    manifest: Manifest
    config: Mapping[str, Json]
    session: onnxruntime.InferenceSession = dataclasses.field(repr=False)

    @classmethod
    def load(cls, folder: Path | str, *, num_threads: int | None = None) -> Embedder:
        """Load a model folder.

        Args:
            folder: the model folder.
            num_threads: threads for one picture's arithmetic; by default all cores.

        Raises:
            ArtefactError: a file is missing, unfinished, damaged or of a newer format.
        """
        import onnxruntime

        folder = Path(folder)
        manifest = read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION)
        _require_whole(folder, manifest)
        graph = folder / "model.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or os.cpu_count() or 1
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen kinds of its own
            raise ArtefactError(
                f"{graph} cannot be loaded ({str(error).splitlines()[0][:200]})",
                expected="an ONNX model that onnxruntime reads",
                next_step="export the model again, or copy the whole folder; the file may be cut short",
            ) from error
        return cls(folder, manifest, read_json(folder / "config.json"), session)

    @property
    def dim(self) -> int:
        """Numbers in an embedding."""
        return int(self.config["embedding_dim"])

    @property
    def name(self) -> str:
        """Name of the model."""
        return str(self.config["name"])

    @property
    def fingerprint(self) -> str:
        """Identity of the model; an index is tied to it."""
        return self.manifest.fingerprint

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures are prepared."""
        return Preprocessing.from_json(self.config["backbone"]["preprocessing"])

    def embed(self, pictures: Sequence[Picture], *, batch_size: int = 32) -> Embeddings:
        """Unit-length float32 embeddings (n, d), one row a picture.

        Args:
            pictures: paths, bytes of files, Pillow images or uint8 arrays (height, width[, 3]).
            batch_size: pictures a batch.

        Raises:
            ImageError: a picture cannot be read; use :meth:`embed_stream` to go on past such pictures.
        """
        result = np.empty((len(pictures), self.dim), np.float32)
        for batch in self.embed_stream(pictures, batch_size=batch_size):
            for error in batch.unreadable.values():
                raise error
            result[batch.positions] = batch.vectors
        return result

    def embed_stream(self, pictures: Iterable[Picture], *, batch_size: int = 32) -> Iterator[EmbeddedBatch]:
        """Embed any number of pictures, a batch at a time; one bad picture costs only itself.

        Pictures are decoded in threads while the batch before is computed; at most two batches are in memory.

        Raises:
            InputError: a batch size below 1.
        """
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}", expected="at least 1", next_step="leave it at 32")
        preprocessing, numbered = self.preprocessing, enumerate(pictures)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            waiting = [pool.submit(_prepared, *item, preprocessing) for item in islice(numbered, batch_size)]
            while waiting:
                done = [future.result() for future in waiting]
                waiting = [
                    pool.submit(_prepared, *item, preprocessing) for item in islice(numbered, batch_size)
                ]
                good = [(position, pixels) for position, pixels in done if isinstance(pixels, np.ndarray)]
                bad = {position: error for position, error in done if isinstance(error, ImageError)}
                vectors = self.embed_pixels(
                    np.stack([pixels for _, pixels in good])
                    if good
                    else np.empty((0, 3, *preprocessing.shape), np.uint8)
                )
                yield EmbeddedBatch([position for position, _ in good], vectors, bad)

    def embed_pixels(self, pixels: PixelBatch) -> Embeddings:
        """Embed prepared pixels, uint8 (b, 3, height, width)."""
        if len(pixels) == 0:
            return np.empty((0, self.dim), np.float32)
        vectors: Embeddings = self.session.run(None, {"pixels": pixels})[0]
        return vectors


def _require_whole(folder: Path, manifest: Manifest) -> None:
    """Check the files that embedding needs: one wrong bit in the weights would give wrong vectors."""
    checksums = manifest.content.get("sha256", {})
    for name in sorted({"model.onnx", "config.json", *checksums} - {"model.safetensors", "README.md"}):
        path = folder / name
        if not path.is_file():
            raise ArtefactError(
                f"{path} does not exist",
                expected="a whole model folder",
                next_step="export the model again, or copy the whole folder",
            )
        if file_sha256(path) != checksums.get(name):
            raise ArtefactError(
                f"{path} was changed or damaged since the model was exported",
                expected=f"the SHA-256 that {folder / 'manifest.json'} names",
                next_step="export the model again, or copy the whole folder again",
            )


def _prepared(
    position: int, picture: Picture, preprocessing: Preprocessing
) -> tuple[int, Pixels | ImageError]:
    try:
        return position, prepare(decode(picture), preprocessing)
    except ImageError as error:
        return position, error
