"""The model folder in the making: what it is made from, its files, and the manifest last."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from samething.backbones import Backbone, weights_fingerprint
from samething.checksums import checksums_of, require_whole
from samething.embedder import FORMAT_VERSION, KIND, WITH_GRAPH, Embedder
from samething.errors import ArtefactError, InputError
from samething.export.embedding_model import Source, source_of
from samething.export.exported import Exported
from samething.export.form import Form
from samething.export.parity import Parity
from samething.export.soups import Mix, mixed_source
from samething.export.writing import WORK, write_files
from samething.features import FeatureSet
from samething.files import (
    MANIFEST_NAME,
    Json,
    Manifest,
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
)
from samething.heads import HeadConfig, HeadKind, build_head
from samething.retrieval.codes import StoredCodes
from samething.training.run import Run

REFUSED_NAME: Final = "refused.json"
"""Notes what a form that lost too much was made from, so that allowing it computes nothing again."""
_OURS: Final = re.compile(
    r"model\.(onnx|onnx\.data|safetensors|pt2)|codes\.npz|config\.json|README\.md|submission\.zip|"
    r"refused\.json|modules\.json|config_sentence_transformers\.json|\d_(Transformer|Normalize|Dense)"
)
"""Names that an export writes, or wrote in an earlier version."""


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
            return mixed_source(trained, others, mix, weights=weights)
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
            made = write_files(output, source(), form, name=name, tolerance=tolerance)
            if made.parity is not None and not made.parity.within_tolerance and not allow_quality_loss:
                record = {"made_from": fingerprint(made_from), "difference": made.largest_difference}
                write_json(output / REFUSED_NAME, {**record, **checksums_of(output)})
                raise made.parity.refusal(output)
        (output / REFUSED_NAME).unlink(missing_ok=True)
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
    config = read_json(output / "config.json")
    parity = config.get("parity")
    return Exported(output, config, None, Parity.from_json(parity) if parity else None)


def _refused_before(output: Path, made_from: Mapping[str, Json]) -> Exported | None:
    """What was found out of a form that lost too much, if its files are still those of this model."""
    if not (output / REFUSED_NAME).exists():
        return None
    record = read_json(output / REFUSED_NAME)
    there = {name: sha256 for name, sha256 in checksums_of(output)["sha256"].items() if name != REFUSED_NAME}
    if record["made_from"] != fingerprint(made_from) or record["sha256"] != there:
        return None
    config = read_json(output / "config.json")
    return Exported(output, config, float(record["difference"]), Parity.from_json(config["parity"]))


def _clear(output: Path) -> None:
    """Remove what an unfinished export of another form left, so that the folder holds one model alone.

    Raises:
        ArtefactError: the folder holds files that no export writes.
    """
    entries = [entry for entry in output.iterdir() if not entry.name.startswith(".") or entry.name == WORK]
    strangers = sorted(
        entry.name for entry in entries if entry.name != WORK and not _OURS.fullmatch(entry.name)
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
