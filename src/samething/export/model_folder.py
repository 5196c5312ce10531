"""The model folder in the making: what it is made from, its files, and the manifest last."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from samething.embedder import FORMAT_VERSION, KIND, WITH_GRAPH, Embedder, require_whole
from samething.errors import ArtefactError
from samething.export.embedding_model import source_of
from samething.export.exported import Exported
from samething.export.form import Form
from samething.export.parity import Parity
from samething.export.soups import Mix, mixed_source
from samething.export.writing import WORK, write_files
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
from samething.training.run import Run

REFUSED_NAME: Final = "refused.json"
"""Notes what a form that lost too much was made from, so that allowing it computes nothing again."""
_OURS: Final = re.compile(
    r"model\.(onnx|onnx\.data|safetensors|pt2)|codes\.npz|config\.json|README\.md|submission\.zip|"
    r"refused\.json|modules\.json|config_sentence_transformers\.json|\d_(Transformer|Normalize|Dense)"
)
"""Names that an export writes, or wrote in an earlier version."""


def write_model(
    run: Path,
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
    trained = Run.open(run, moved=features)
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
    with only_one_writer(output), disk_errors(output):
        if is_finished(output):
            return _finished(output, made_from)
        made = _refused_before(output, made_from) if allow_quality_loss else None
        if made is None:
            _clear(output)
            source = (
                mixed_source(trained, others, mix, weights=weights)
                if mix.mixes
                else source_of(trained, weights=weights)
            )
            made = write_files(output, source, form, name=name or output.resolve().name, tolerance=tolerance)
            if made.parity is not None and not made.parity.within_tolerance and not allow_quality_loss:
                record = {"made_from": fingerprint(made_from), "difference": made.largest_difference}
                write_json(output / REFUSED_NAME, {**record, **_content(output)})
                raise made.parity.refusal(output)
        (output / REFUSED_NAME).unlink(missing_ok=True)
        write_manifest(
            output,
            Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made_from, content=_content(output)),
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
    require_whole(output, manifest, sorted(manifest.content["sha256"]))
    config = read_json(output / "config.json")
    parity = config.get("parity")
    return Exported(output, config, None, Parity.from_json(parity) if parity else None)


def _refused_before(output: Path, made_from: Mapping[str, Json]) -> Exported | None:
    """What was found out of a form that lost too much, if its files are still those of this model."""
    if not (output / REFUSED_NAME).exists():
        return None
    record = read_json(output / REFUSED_NAME)
    if record["made_from"] != fingerprint(made_from) or record["sha256"] != _content(output)["sha256"]:
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


def _content(folder: Path) -> dict[str, Json]:
    """Checksum and size of every file of the model."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.relative_to(folder).parts[0].startswith(WORK)
        and path.name not in (MANIFEST_NAME, REFUSED_NAME, ".lock")
    }
    return {
        "sha256": {name: file_sha256(path) for name, path in files.items()},
        "bytes": {name: path.stat().st_size for name, path in files.items()},
    }
