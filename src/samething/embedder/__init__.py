"""Model folder to embeddings, on onnxruntime or a faster device: neither torch nor timm is needed.

Layout of a model folder (written by ``export``)::

    models/NAME/
      model.onnx            uint8 pixels (b, 3, size, size) to unit-length vectors (b, d)
      model.safetensors     the same weights, for torch
      codes.npz             how vectors are kept in fewer bytes, where that was asked for
      config.json           backbone, preprocessing, head, training data, metrics, versions, licences
      README.md             the model card
      manifest.json         written last
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
from PIL import Image

from samething.arrays import Embeddings, Float, PixelBatch, Pixels, UInt8
from samething.checksums import require_whole
from samething.embedder.devices import (
    LEAST_IMAGES,
    SAMPLE,
    VARIABLE,
    Choice,
    Device,
    drawn_images,
    pays,
    require_parity,
    say_choice,
)
from samething.embedder.graph_repositories import (
    NormalisedGraph,
    description,
    graph_of,
    is_graph_repository,
    preprocessing_of,
)
from samething.embedder.hub import model_folder
from samething.errors import ArtefactError, ImageError, InputError, SamethingError
from samething.files import Json, Manifest, read_json, read_manifest
from samething.images import Box, ImageLike, Preprocessing, decode, in_threads, least_side, prepare
from samething.images.decoding import MAX_PIXELS
from samething.images.parts import Place, cut_out
from samething.images.preparing import as_it_is
from samething.retrieval.codes import Coder, Codes
from samething.sessions import open_session

KIND: Final = "model"
FORMAT_VERSION: Final = 2
"""Version 1 had no ``form`` in its configuration and no sizes in its manifest; it is read as it is."""

PLAIN_FORM: Final[Mapping[str, Json]] = {
    "format": "folder",
    "input": "pixels",
    "precision": "float32",
    "dim": None,
    "codes": "float32",
    "head_only": False,
}
"""How a model was written: that of version 1, and the default of today."""
WITH_GRAPH: Final = frozenset({"folder", "hub", "sentence-transformers"})
"""Formats whose folder holds ``model.onnx``."""


@dataclasses.dataclass(frozen=True)
class EmbeddedBatch:
    """Embeddings of some of the images given, and the reasons why others have none."""

    positions: list[int]
    """Which of the images given the vectors belong to, counted from 0."""
    vectors: Embeddings
    """Unit-length float32, one row a position."""
    unreadable: dict[int, ImageError]
    """Position of each image that could not be read, with the error."""
    kept: list[Any] = dataclasses.field(default_factory=list)
    """What ``keep`` made of the image at each of the positions."""
    regions: list[tuple[Sequence[Place], Float[np.ndarray, "_ d"]]] = dataclasses.field(default_factory=list)
    """The parts of the image at each of the positions, and their vectors."""


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model that turns images into unit-length vectors."""

    folder: Path
    manifest: Manifest
    config: Mapping[str, Json]
    session: Any = dataclasses.field(repr=False)
    coder: Coder | None = None
    """How this model's vectors are kept in fewer bytes; None where they stay float32."""
    max_pixels: int = MAX_PIXELS
    """Larger images are refused before they are unpacked."""
    decoding: Literal["exact", "scaled"] = "exact"
    """``scaled``: of a large JPEG file only as much is unpacked as neighbours need (:attr:`least_side`)."""
    num_threads: int | None = None
    """Threads for one image's arithmetic; None: all cores."""
    device: str = "cpu"
    """What computes (:mod:`samething.embedder.devices`); ``cpu`` is onnxruntime's own."""
    is_forced: bool = False
    """Whether the device was asked for, and is not to be chosen."""

    @classmethod
    def load(
        cls, model: Path | str, *, num_threads: int | None = None, device: str | None = None
    ) -> Embedder:
        """Load a model.

        Args:
            model: a model folder, or the id ``owner/name[@revision]`` of one on the Hugging Face hub; or of a
                repository with an image encoder's ONNX graph (:mod:`samething.embedder.graph_repositories`).
            num_threads: threads for one image's arithmetic; by default all cores.
            device: what computes, by default what SAMETHING_DEVICE names; auto, or without either: the CPU,
                which starts soonest, until :meth:`fastest` is asked for.

        Raises:
            ArtefactError: a file is missing, cut short, damaged or of a newer format, the folder is
                unfinished or of a format without a graph, or the hub has no such model.
            InputError: the device is not here, or its vectors are not the CPU's.
            MissingExtraError: a hub id, and huggingface_hub is not installed; or the device's package is not.
        """
        folder = model_folder(model)
        coder = None
        if is_graph_repository(folder):
            session = _session(folder, num_threads)
            made_from, config = description(folder, session)
            manifest = Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made_from)
        else:
            manifest = read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION)
            require_whole(folder, manifest, ["config.json"])
            config = read_json(folder / "config.json")
            form = form_of(config)
            if form["format"] not in WITH_GRAPH:
                raise ArtefactError(
                    f"{folder} was exported with --format {form['format']}, which has no model.onnx",
                    expected=f"a model of the format {', '.join(sorted(WITH_GRAPH))}",
                    next_step="export the run again without --format",
                )
            listed = manifest.content.get("sha256", {})
            parts = {name for name in listed if name.startswith("model.onnx") or name == "codes.npz"}
            require_whole(folder, manifest, sorted({"model.onnx", *parts}))
            session = open_session(folder / "model.onnx", num_threads=num_threads)
            if form["codes"] != "float32":
                coder = Coder.read(folder / "codes.npz")
        loaded = cls(folder, manifest, config, session, coder, num_threads=num_threads)
        wanted = device or os.environ.get(VARIABLE)
        return loaded.on(wanted) if wanted else loaded

    def on(self, device: str) -> Embedder:
        """This model on one device, which :meth:`fastest` then leaves; auto frees the choice again.

        Raises:
            InputError: no such name, or the device is not here, cannot compute the model, or its vectors are
                not the CPU's.
            MissingExtraError: its package is not installed.
        """
        if device not in get_args(Device):
            raise InputError(
                f"the device {device!r}",
                expected=f"one of {', '.join(get_args(Device))}",
                next_step="choose one of these; auto takes the fastest of those that are here",
            )
        made = self._on("cpu" if device == "auto" else device)
        if made.device != "cpu":
            require_parity(
                device, made.embed_prepared, self._on("cpu").embed_prepared, self.preprocessing.shape
            )
        return dataclasses.replace(made, is_forced=device != "auto")

    def fastest(
        self,
        images: Sequence[ImageLike] | Callable[[], Sequence[ImageLike]] = (),
        *,
        num_images: int | None = None,
    ) -> Embedder:
        """This model on the device that embeds the most images per second here, with the CPU's vectors.

        The devices are measured once; the choice is kept beside the model and said where it is not the CPU.
        A device whose least cosine to the CPU's vectors is below 0.9998 is left out. One that was asked for
        stays.

        Args:
            images: some of the job, as :meth:`embed` takes them, or what finds them where they are needed;
                without any that can be read, drawn ones.
            num_images: how many the job has; where they are too few for it to pay, the model stays as it is.
                None: very many.
        """
        if self.is_forced or (num_images is not None and num_images < LEAST_IMAGES):
            return self
        choice = Choice(self.folder, self.fingerprint, self.num_threads or os.cpu_count() or 1)
        if choice.here == ["cpu"]:
            return self
        record, on = choice.kept(), functools.cache(self._on)
        if record is None:
            sample = self._sample(images() if callable(images) else images)
            record = choice.measured(lambda device: on(device).embed_prepared, sample, num_images=num_images)
            if record is None:
                return self
            choice.keep(record)
        if not pays(record, num_images):
            return self
        try:
            made = on(record["name"])
        except SamethingError:  # a card that is full or gone since
            return self
        if made is not self:
            say_choice(record)
        return made

    def _on(self, device: str) -> Embedder:
        if device == self.device:
            return self
        session = _session(self.folder, self.num_threads, device)
        return dataclasses.replace(self, session=session, device=device)

    def _sample(self, images: Sequence[ImageLike]) -> list[Pixels]:
        """A few prepared images, evenly out of those given."""
        some = images[:: max(1, len(images) // SAMPLE)][:SAMPLE]
        read = in_threads(lambda image: self.prepare(self.unpacked(image)), some)
        found = [pixels for pixels in read if not isinstance(pixels, ImageError)]
        return found or drawn_images(self.preprocessing.shape, SAMPLE)

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

    @functools.cached_property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared."""
        return Preprocessing.from_json(self.config["backbone"]["preprocessing"])

    @functools.cached_property
    def least_side(self) -> int | None:
        """What the shorter side of a JPEG file keeps when it is unpacked, in pixels; None: all of it."""
        if self.decoding == "exact" or self.form["input"] != "pixels":  # such a graph resizes by itself
            return None
        return least_side(self.preprocessing)

    @functools.cached_property
    def form(self) -> Mapping[str, Json]:
        """How the model was written: format, input, precision, prefix, codes."""
        return form_of(self.config)

    def embed(self, images: Sequence[ImageLike], *, batch_size: int | None = None) -> Embeddings:
        """Unit-length float32 embeddings (n, d), one row per image.

        Args:
            images: paths, URLs, bytes of files, Pillow images or uint8 arrays
                (height, width[, 3]), of any size and in any mixture.
            batch_size: images per batch; by default four per core, from 8 to 32, which was fastest
                where it was measured.

        Raises:
            ImageError: an image cannot be read; use :meth:`embed_stream` to go on past such images.
        """
        result = np.empty((len(images), self.dim), np.float32)
        for batch in self.embed_stream(images, batch_size=batch_size):
            for error in batch.unreadable.values():
                raise error
            result[batch.positions] = batch.vectors
        return result

    def embed_stream(
        self,
        images: Iterable[ImageLike],
        *,
        batch_size: int | None = None,
        keep: Callable[[Image.Image], object] | None = None,
        regions: Callable[[int, Image.Image], Sequence[Place]] | None = None,
    ) -> Iterator[EmbeddedBatch]:
        """Embed any number of images, a batch at a time; one bad image costs only itself.

        Images are decoded in threads while the batch before is computed; at most two batches are in memory.

        Args:
            images: as :meth:`embed` takes them.
            batch_size: images per batch; by default as for :meth:`embed`.
            keep: called with each decoded image, in several threads; what it returns comes with the vector.
            regions: called as well, with the image's position; the parts that it names are embedded too.

        Raises:
            InputError: a batch size below 1.
        """
        if batch_size is None:
            batch_size = min(32, max(8, 4 * (os.cpu_count() or 1)))
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}", expected="at least 1", next_step="leave it out")

        def decoded(numbered: tuple[int, ImageLike]) -> tuple[list[Pixels], Sequence[Place], object]:
            position, image = numbered
            upright = self.unpacked(image)
            places = () if regions is None else regions(position, upright)
            parts = cut_out(upright, places) if places else ()
            pixels = [self.prepare(part) for part in (upright, *parts)]
            return pixels, places, None if keep is None else keep(upright)

        num_threads = os.cpu_count() or 1
        ahead = batch_size if regions is None else num_threads
        results = enumerate(in_threads(decoded, enumerate(images), ahead=ahead, num_threads=num_threads))
        while part := list(_filled(results, batch_size)):
            bad = {position: error for position, error in part if isinstance(error, ImageError)}
            good = {position: result for position, result in part if not isinstance(result, ImageError)}
            pixels = [each for own, _, _ in good.values() for each in own]
            vectors = np.concatenate(
                [
                    self.embed_prepared(pixels[start : start + batch_size])
                    for start in range(0, max(1, len(pixels)), batch_size)
                ]
            )
            first = np.cumsum([0, *(len(own) for own, _, _ in good.values())])
            yield EmbeddedBatch(
                list(good),
                vectors[first[:-1]],
                bad,
                [kept for _, _, kept in good.values()],
                [
                    (places, vectors[start + 1 : start + 1 + len(places)])
                    for start, (_, places, _) in zip(first, good.values(), strict=False)
                ],
            )

    def unpacked(self, image: ImageLike, *, box: Box | None = None) -> Image.Image:
        """An image decoded as this model wants it: :func:`samething.images.decode` with its settings."""
        return decode(image, max_pixels=self.max_pixels, box=box, least_side=self.least_side)

    @functools.cached_property
    def prepare(self) -> Callable[[Image.Image], Pixels]:
        """From a decoded image to what the model's graph takes, uint8 (3, height, width).

        It is a function without the model, which another process can be sent.
        """
        if self.form["input"] == "pixels":
            return functools.partial(prepare, preprocessing=self.preprocessing)
        return as_it_is  # the graph resizes by itself

    def embed_prepared(self, images: Sequence[UInt8[np.ndarray, "3 _ _"]]) -> Embeddings:
        """Vectors of prepared images, whose sizes may differ: one call of the graph for each size."""
        vectors = np.empty((len(images), self.dim), np.float32)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, pixels in enumerate(images):
            by_size.setdefault(pixels.shape, []).append(place)
        for places in by_size.values():
            vectors[places] = self.embed_pixels(np.stack([images[place] for place in places]))
        return vectors

    def embed_pixels(self, pixels: PixelBatch) -> Embeddings:
        """Embed prepared pixels, uint8 (b, 3, size, size); of any size where the graph resizes by itself."""
        if len(pixels) == 0:
            return np.empty((0, self.dim), np.float32)
        vectors: Embeddings = self.session.run(None, {self.form["input"]: pixels})[0]
        return vectors

    def encode(self, vectors: Embeddings) -> Codes:
        """Vectors of this model in the bytes that it was exported with (``--codes``).

        Raises:
            InputError: the model was exported without a coder.
        """
        return self._coder().encode(vectors)

    def decode(self, codes: Codes) -> Embeddings:
        """Approximate unit-length float32 vectors of :meth:`encode`'s bytes."""
        return self._coder().decode(codes)

    def _coder(self) -> Coder:
        if self.coder is None:
            raise InputError(
                f"bytes of {self.name}, whose vectors stay float32",
                expected="a model with a coder",
                next_step="export the run with --codes int8",
            )
        return self.coder


def _session(folder: Path, num_threads: int | None, device: str = "cpu") -> Any:
    """The graph of a model folder, or of a repository in transformers.js' or optimum's layout."""
    if is_graph_repository(folder):
        graph = graph_of(folder)
        session = open_session(graph, device, num_threads=num_threads)
        return NormalisedGraph(session, preprocessing_of(folder), graph.name)
    return open_session(folder / "model.onnx", device, num_threads=num_threads)


def _filled(results: Iterator[tuple[int, Any]], batch_size: int) -> Iterator[tuple[int, Any]]:
    """Results until there are so many prepared images among them."""
    count = 0
    while count < batch_size and (result := next(results, None)) is not None:
        count += 1 if isinstance(result[1], ImageError) else len(result[1][0])
        yield result


def form_of(config: Mapping[str, Json]) -> Mapping[str, Json]:
    """How a model was written, from its configuration; a model of version 1 has the plain form."""
    return {**PLAIN_FORM, **config.get("form", {})}
