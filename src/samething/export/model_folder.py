"""The model folder in the making: what it is made from, its files in the form asked for, its manifest."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from samething.arrays import PixelBatch
from samething.backbones import Backbone, weights_fingerprint, write_onnx
from samething.backbones.graphs import write_with_head
from samething.backbones.whole_numbers import CALIBRATION_BATCH, NUM_CALIBRATION, quantise
from samething.checksums import checksums_of, require_whole
from samething.embedder import FORMAT_VERSION, KIND, WITH_GRAPH, Embedder
from samething.errors import ArtefactError, InputError
from samething.export.card import card, configuration
from samething.export.embedding_model import EmbeddingModel, Source, UnitHead, first_dims, source_of
from samething.export.exported import Exported
from samething.export.form import Form
from samething.export.guiec import write_submission
from samething.export.onnx_forms import halve_weights, with_preprocessing_inside
from samething.export.quality import measured, no_match, prepared_images
from samething.export.sentence_transformer import write_sentence_transformer
from samething.export.soups import Mix, mixed_source
from samething.features import FeatureSet
from samething.files import (
    MANIFEST_NAME,
    Json,
    Manifest,
    atomic_path,
    disk_errors,
    file_sha256,
    fingerprint,
    is_finished,
    only_one_writer,
    read_json,
    read_manifest,
    require_same,
    write_json,
    write_manifest,
    write_text,
)
from samething.heads import Head, HeadConfig, HeadKind, build_head
from samething.retrieval.codes import Coder, StoredCodes
from samething.sessions import open_session
from samething.training.run import Run, write_tensors

_REFUSED_NAME: Final = "refused.json"
"""Notes what a form that lost too much was made from, so that allowing it computes nothing again."""
_OURS: Final = re.compile(
    r"model\.(onnx|onnx\.data|safetensors|pt2)|codes\.npz|config\.json|README\.md|submission\.zip|"
    r"refused\.json|modules\.json|config_sentence_transformers\.json|\d_(Transformer|Normalize|Dense)"
)
"""Names that an export writes, or wrote in an earlier version."""
_WORK: Final = ".work"
"""Folder inside the model's for graphs in the making; removed at the end."""
LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of any number between the exported model's vectors and torch's."""
_NUM_CHECKED: Final = 16
"""Images that the exported model is checked on."""
_GIT_ATTRIBUTES: Final = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.onnx", "*.onnx.data", "*.safetensors", "*.npz")
)


def write_model(
    trained: Run,
    output: Path,
    form: Form,
    mix: Mix,
    *,
    name: str | None,
    weights: Path | None,
    features: Sequence[Path],
    tolerance: float,
    allow_quality_loss: bool,
) -> Exported:
    """Write a model folder; see :func:`samething.export.export`."""
    others = [Run.open(other, moved=features) for other in mix.runs]
    made_from: dict[str, Json] = {
        "run": trained.manifest.fingerprint,
        "backbone": dict(trained.features().backbone),
        "head": file_sha256(trained.folder / "head.safetensors"),
        **form.made_from,
    }
    if mix.mixes:
        fingerprints = [other.manifest.fingerprint for other in others]
        made_from["mix"] = {"runs": fingerprints, "soup": mix.soup, "interpolate": mix.interpolate}

    def source() -> Source:
        if mix.mixes:
            return mixed_source((trained, *others), mix, weights=weights)
        return source_of(trained, weights=weights)

    return _write(
        output, source, form, made_from,
        name=name, tolerance=tolerance, allow_quality_loss=allow_quality_loss,
    )  # fmt: skip


def write_backbone(
    backbone: Backbone,
    features: FeatureSet,
    output: Path,
    *,
    dim: int | None,
    codes: StoredCodes = "float32",
) -> Exported:
    """Write the model folder of a backbone without training: its feature as it is, or principal components.

    Args:
        backbone: the network.
        features: of this backbone. Components are fitted to the training images, or to all where there are
            none; test images give metrics, and validation images the calibration.
        output: the model folder.
        dim: numbers in an embedding; None for the feature as it is.
        codes: how its vectors are kept.

    Raises:
        InputError: fewer images than numbers.
    """
    rows = np.flatnonzero(features.catalog.has_role("train"))
    rows = rows if len(rows) else np.arange(len(features.catalog))
    if dim is not None and not 1 <= dim <= min(len(rows), backbone.width):
        raise InputError(
            f"--dim {dim} with {len(rows):,} images and {backbone.width:,} numbers per feature",
            expected="from 1 to the smaller of the two: principal components are fitted to the images",
            next_step="leave --dim out for the feature as it is, or name more images",
        )
    kind: HeadKind = "none" if dim is None else "pca"
    config = HeadConfig(kind=kind, embedding_dim=dim or backbone.width, standardise=dim is not None)
    head = build_head(config, backbone.width)
    head.fit(features.rows, rows)
    form = Form(codes=codes)
    made_from: dict[str, Json] = {
        "backbone": backbone.metadata(),
        "head": {"kind": kind, "weights": weights_fingerprint(head)},
        **form.made_from,
    }
    source = Source(run=None, features=features, backbone=backbone, head=head.eval(), codes=codes)
    return _write(output, lambda: source, form, made_from)


def _write(
    output: Path,
    source: Callable[[], Source],
    form: Form,
    made_from: dict[str, Json],
    *,
    name: str | None = None,
    tolerance: float = 0.0,
    allow_quality_loss: bool = False,
) -> Exported:
    with only_one_writer(output), disk_errors(output):
        if is_finished(output):
            return _finished(output, made_from)
        made = _refused_before(output, made_from) if allow_quality_loss else None
        if made is None:
            _clear(output)
            name = name or output.resolve().name
            made = _write_files(output, source(), form, name=name, tolerance=tolerance)
            if made.parity is not None and not made.parity.within_tolerance and not allow_quality_loss:
                record = {"made_from": fingerprint(made_from), "difference": made.largest_difference}
                write_json(output / _REFUSED_NAME, {**record, **checksums_of(output)})
                raise made.parity.refusal(output)
        (output / _REFUSED_NAME).unlink(missing_ok=True)
        write_manifest(
            output,
            Manifest(
                kind=KIND, format_version=FORMAT_VERSION, made_from=made_from, content=checksums_of(output)
            ),
        )
        if form.format in WITH_GRAPH:
            try:
                Embedder.load(output, num_threads=1)
            except ArtefactError:
                (output / MANIFEST_NAME).unlink()
                raise
        return made


def _finished(output: Path, made_from: Mapping[str, Json]) -> Exported:
    """A folder that was there already, if it is this very model."""
    manifest = read_manifest(output, kind=KIND, format_version=FORMAT_VERSION)
    require_same(
        made_from,
        manifest.made_from,
        what=f"{output} is another model",
        next_step="choose another folder with -o, or remove this one",
    )
    require_whole(output, manifest)
    return Exported(output, read_json(output / "config.json"), None)


def _refused_before(output: Path, made_from: Mapping[str, Json]) -> Exported | None:
    """What was found out of a form that lost too much, if its files are still those of this model."""
    if not (output / _REFUSED_NAME).exists():
        return None
    record = read_json(output / _REFUSED_NAME)
    there = {name: sha256 for name, sha256 in checksums_of(output)["sha256"].items() if name != _REFUSED_NAME}
    if record["made_from"] != fingerprint(made_from) or record["sha256"] != there:
        return None
    return Exported(output, read_json(output / "config.json"), float(record["difference"]))


def _clear(output: Path) -> None:
    """Remove what an unfinished export of another form left, so that the folder holds one model alone.

    Raises:
        ArtefactError: the folder holds files that no export writes.
    """
    entries = [entry for entry in output.iterdir() if not entry.name.startswith(".") or entry.name == _WORK]
    strangers = sorted(
        entry.name for entry in entries if entry.name != _WORK and not _OURS.fullmatch(entry.name)
    )
    if strangers:
        raise ArtefactError(
            f"{output} is not a model folder and holds {', '.join(strangers[:3])}",
            expected="a new or empty folder, or an unfinished model",
            next_step="choose another folder with -o",
        )
    for entry in entries:
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write_files(output: Path, source: Source, form: Form, *, name: str, tolerance: float) -> Exported:
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
    pixels = prepared_images(source.features.catalog, preprocessing, _NUM_CHECKED)
    if len(pixels) < 2:  # the images may have moved since; noise still compares the arithmetic
        shape = (_NUM_CHECKED, 3, *preprocessing.shape)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    coder = None
    if form.format == "guiec":
        difference = write_submission(model, output / "submission.zip", pixels)
        result, parity = measured(source, head, None, None, form, tolerance)
    else:
        try:
            graph = output / _WORK / "model" / "model.onnx"
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
            shutil.rmtree(output / _WORK, ignore_errors=True)
    config = configuration(name, source, head, form, result, parity, no_match(source, head, form, coder))
    if form.format == "hub":
        write_text(output / ".gitattributes", _GIT_ATTRIBUTES)
        write_text(
            output / ".gitignore", ".lock\n.devices\n"
        )  # the hub follows it while it takes the folder in
    write_json(output / "config.json", config)
    write_text(output / "README.md", card(config))
    return Exported(output, config, difference)


def _write_checked_graph(model: EmbeddingModel, graph: Path, pixels: PixelBatch) -> float:
    """Write the float32 graph and compare it with torch; returns the largest difference.

    Raises:
        ArtefactError: they differ by more than :data:`LARGEST_DIFFERENCE`.
    """
    graph.parent.mkdir(parents=True)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()

    def difference() -> float:
        found = open_session(graph).run(None, {"pixels": pixels})[0]
        return float(np.abs(found - expected).max())

    is_joined = write_with_head(model.backbone, UnitHead(model.head), graph)
    largest = difference() if is_joined else math.inf
    # a kept graph may be older than the code of one's own backbone; then both are exported as a whole
    if largest > LARGEST_DIFFERENCE:
        write_onnx(model, graph, size=model.backbone.preprocessing.shape)
        largest = difference()
    if largest > LARGEST_DIFFERENCE:
        raise ArtefactError(
            f"the exported model's vectors differ from torch's by up to {largest:.1e}",
            expected=f"at most {LARGEST_DIFFERENCE:.0e}",
            next_step="report this with the backbone's name; the run itself is unharmed",
        )
    return largest


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
    session = open_session(graph, num_threads=torch.get_num_threads())
    return Embedder(graph.parent, manifest, config, session, coder)
