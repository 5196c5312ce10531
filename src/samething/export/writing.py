"""The files of a model: tensors, the graph in the form asked for, configuration and card."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Final

import numpy as np
import torch

from samething.arrays import PixelBatch
from samething.backbones import write_onnx
from samething.backbones.graphs import write_with_head
from samething.backbones.whole_numbers import CALIBRATION_BATCH, NUM_CALIBRATION, quantise
from samething.embedder import FORMAT_VERSION, KIND, Embedder
from samething.errors import ArtefactError, InputError
from samething.export.card import card, configuration
from samething.export.embedding_model import EmbeddingModel, Source, UnitHead, first_dims
from samething.export.exported import Exported
from samething.export.form import Form
from samething.export.guiec import write_submission
from samething.export.onnx_forms import halve_weights, num_threads, with_preprocessing_inside
from samething.export.parity import Parity
from samething.export.quality import measured, metrics_on_test, no_match, prepared_images
from samething.export.sentence_transformer import write_sentence_transformer
from samething.files import Manifest, atomic_path, write_json, write_text
from samething.heads import Head
from samething.retrieval.codes import Coder
from samething.sessions import open_session
from samething.training.run import write_tensors

WORK: Final = ".work"
"""Folder inside the model's for graphs in the making; removed at the end."""
LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of any number between the exported model's vectors and torch's."""
NUM_CHECKED: Final = 16
"""Images that the exported model is checked on."""
_GIT_ATTRIBUTES: Final = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.onnx", "*.onnx.data", "*.safetensors", "*.npz")
)


def write_files(output: Path, source: Source, form: Form, *, name: str, tolerance: float) -> Exported:
    """Everything but the manifest.

    Args:
        output: the model folder.
        source: backbone and head.
        form: how they are written.
        name: of the model.
        tolerance: largest accepted fall of mMP@5, which the parity says.

    Raises:
        InputError: the form cannot hold this backbone, head or preprocessing.
        ArtefactError: vectors differ from torch's, or images have moved.
    """
    head = source.head if form.dim is None else first_dims(source.head, form.dim)
    model = EmbeddingModel(source.backbone, head).eval()
    preprocessing = source.backbone.preprocessing
    if preprocessing.views and (form.format == "guiec" or form.input == "images"):
        raise InputError(
            f"--format {form.format} with features of several views per image",
            expected="features of one view: this form prepares images by itself",
            next_step="use --format folder without --preprocessing-inside, or features of one view",
        )
    if preprocessing.any_shape:
        raise InputError(
            "features of --views whole",
            expected="features of images of one shape: a model's graph computes no other",
            next_step="extract features with --views pad, train on them, and export that",
        )
    pixels = prepared_images(source.features.catalog, preprocessing, NUM_CHECKED)
    if len(pixels) < 2:  # the images may have moved since; noise still compares the arithmetic
        shape = (NUM_CHECKED, 3, *preprocessing.shape)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    parity: Parity | None = None
    if form.format == "guiec":
        difference = write_submission(model, output / "submission.zip", pixels)
        result, coder = metrics_on_test(source, head, None), None
    else:
        try:
            graph = output / WORK / "model" / "model.onnx"
            difference = _write_checked_graph(model, graph, pixels)
            embedder, reference = _written_form(output, graph, source, head, form, pixels)
            coder = embedder.coder
            result, parity = measured(source, head, embedder, reference, form, tolerance)
            if form.format == "sentence-transformers":
                write_sentence_transformer(model, output)
            else:
                halved = form.precision == "float16"
                state = {
                    name: own.half() if halved and own.is_floating_point() else own
                    for name, own in model.state_dict().items()
                }
                write_tensors(output / "model.safetensors", state)
            for file in sorted(graph.parent.iterdir(), reverse=True):  # the weights beside the graph first
                file.replace(output / file.name)
        finally:
            shutil.rmtree(output / WORK, ignore_errors=True)
    config = configuration(name, source, form.to_json(), result, no_match(source, head, form, coder))
    config["embedding_dim"] = config["head"]["embedding_dim"] = head.embedding_dim
    config["parity"] = parity.to_json() if parity else None
    if form.format == "hub":
        write_text(output / ".gitattributes", _GIT_ATTRIBUTES)
        write_text(
            output / ".gitignore", ".lock\n.devices\n"
        )  # the hub follows it while it takes the folder in
    write_json(output / "config.json", config)
    write_text(output / "README.md", card(config))
    return Exported(output, config, difference, parity)


def _write_checked_graph(model: EmbeddingModel, graph: Path, pixels: PixelBatch) -> float:
    """Write the float32 graph and compare it with torch; returns the largest difference.

    Raises:
        ArtefactError: they differ by more than :data:`LARGEST_DIFFERENCE`.
    """
    graph.parent.mkdir(parents=True)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    difference = math.inf
    # a kept graph may be older than the code of one's own backbone; then both are exported as a whole
    for write in (_write_joined, _write_at_once):
        if difference > LARGEST_DIFFERENCE and write(model, graph):
            found = open_session(graph).run(None, {"pixels": pixels})[0]
            difference = float(np.abs(found - expected).max())
    if difference > LARGEST_DIFFERENCE:
        raise ArtefactError(
            f"the exported model's vectors differ from torch's by up to {difference:.1e}",
            expected=f"at most {LARGEST_DIFFERENCE:.0e}",
            next_step="report this with the backbone's name; the run itself is unharmed",
        )
    return difference


def _write_joined(model: EmbeddingModel, graph: Path) -> bool:
    return write_with_head(model.backbone, UnitHead(model.head), graph)


def _write_at_once(model: EmbeddingModel, graph: Path) -> bool:
    write_onnx(model, graph, size=model.backbone.preprocessing.shape)
    return True


def _written_form(
    output: Path, graph: Path, source: Source, head: Head, form: Form, pixels: PixelBatch
) -> tuple[Embedder, Embedder | None]:
    """Turn the float32 graph into the form asked for; it and what it is measured against, opened."""
    preprocessing = source.backbone.preprocessing
    catalog = source.features.catalog
    reference = None
    if form.loses(source.codes):
        whole = graph.parent.parent / "reference" / "model.onnx"
        _write_checked_graph(source.model, whole, pixels)
        reference = _opened(whole, source, source.head.embedding_dim, Form())
    if form.precision == "float16":
        halve_weights(graph)
    elif form.precision == "int8":
        catalog.require_files()
        training = catalog.take(catalog.has_role("train"))
        seen = prepared_images(training, preprocessing, NUM_CALIBRATION)
        if len(seen) < CALIBRATION_BATCH:
            raise ArtefactError(
                f"{len(seen)} training images can be read",
                expected=f"at least {CALIBRATION_BATCH}, which decide the ranges of whole numbers",
                next_step="put the images back where the catalog says they are, or use --precision float16",
            )
        quantise(graph, seen)
    if form.input == "images":
        with_preprocessing_inside(graph, preprocessing)
    coder = None
    if form.codes != "float32":
        coder = Coder.fit(head.embed(source.training), form.codes)
        with atomic_path(output / "codes.npz") as partial:
            coder.write(partial)
    return _opened(graph, source, head.embedding_dim, form, coder), reference


def _opened(graph: Path, source: Source, dim: int, form: Form, coder: Coder | None = None) -> Embedder:
    """An embedder of a graph whose folder is not finished yet."""
    config = {
        "name": "unfinished",
        "embedding_dim": dim,
        "form": form.to_json(),
        "backbone": {"preprocessing": source.backbone.preprocessing.to_json()},
    }
    manifest = Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from={})
    return Embedder(graph.parent, manifest, config, open_session(graph, num_threads=num_threads()), coder)
