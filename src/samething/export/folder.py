"""The model folder in the making: tensors, graph, configuration, card, and the manifest last."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.torch
import torch

from samething.arrays import Embeddings
from samething.backbones import write_onnx
from samething.catalog import Catalog
from samething.embedder import FORMAT_VERSION, KIND, Embedder, open_graph, require_whole
from samething.embedder.codes import Coder
from samething.errors import ArtefactError, InputError
from samething.evaluation import EvaluationResult, evaluate_embeddings
from samething.evaluation.measuring import rows_by_role
from samething.evaluation.no_match import NoMatch, measure_no_match
from samething.export import Exported, graphs
from samething.export.card import card, configuration
from samething.export.form import Form
from samething.export.network import EmbeddingModel, Source, first_dims, source_of
from samething.export.parity import (
    Parity,
    changes_of,
    decoded,
    embed_images,
    evaluate_both,
    images_per_second,
    measured_role,
    prepared_images,
    rows_of,
)
from samething.export.programs import require_guiec_dim, write_program
from samething.export.sentence_transformer import write_sentence_transformer
from samething.export.soups import Soup, mixed_source
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
from samething.training.run import Run

LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of any number between the exported model's vectors and torch's."""
NUM_CHECKED: Final = 16
"""Images that the exported model is checked on."""
NUM_CALIBRATION: Final = 256
"""Training images that decide the ranges of whole numbers."""
LEAST_QUESTIONS: Final = 100
"""Validation queries that scores are calibrated on at least."""
NO_MATCH_PRECISION: Final = 0.5
"""A search says "no match" where its best answer is rather wrong than right."""
REFUSED_NAME: Final = "refused.json"
"""Notes what a form that lost too much was made from, so that allowing it computes nothing again."""
_WORK: Final = ".work"


def write_model(
    run: Path,
    output: Path,
    form: Form,
    *,
    name: str | None,
    weights: Path | None,
    features: Sequence[Path],
    average: Sequence[Path],
    soup: Soup,
    interpolate: float,
    tolerance: float,
    allow_quality_loss: bool,
) -> Exported:
    """Write a model folder; see :func:`samething.export.export`."""
    trained = Run.open(run, moved=features)
    others = [Run.open(other, moved=features) for other in average]
    described = trained.features()
    made_from: dict[str, Json] = {
        "run": trained.manifest.fingerprint,
        "backbone": dict(described.backbone),
        "head": file_sha256(trained.folder / "head.safetensors"),
        **form.made_from,
    }
    mixed = bool(others) or interpolate != 1
    if mixed:
        runs = [other.manifest.fingerprint for other in others]
        made_from["mix"] = {"runs": runs, "soup": soup, "interpolate": interpolate}
    with only_one_writer(output), disk_errors(output):
        if is_finished(output):
            return _finished(output, made_from)
        kept = _refused_before(output, made_from)
        if kept is not None and allow_quality_loss:
            return _finish(output, made_from, read_json(output / "config.json"), kept[0], kept[1])
        _clear(output)
        source = (
            mixed_source(trained, others, soup=soup, interpolate=interpolate, weights=weights)
            if mixed
            else source_of(trained, weights=weights)
        )
        try:
            config, difference, parity = _write_files(
                output, source, form, name=name or output.resolve().name, tolerance=tolerance
            )
        finally:
            shutil.rmtree(output / _WORK, ignore_errors=True)
        if parity is not None and not allow_quality_loss and not parity.within_tolerance:
            record = {"made_from": fingerprint(made_from), "difference": difference, **_content(output)}
            write_json(output / REFUSED_NAME, record)
            parity.require_within_tolerance(output)
        return _finish(output, made_from, config, difference, parity)


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


def _refused_before(output: Path, made_from: Mapping[str, Json]) -> tuple[float, Parity] | None:
    """What was found out of a form that lost too much, if its files are still those of this model."""
    if not (output / REFUSED_NAME).exists():
        return None
    record = read_json(output / REFUSED_NAME)
    if record["made_from"] != fingerprint(made_from) or record["sha256"] != _content(output)["sha256"]:
        return None
    return float(record["difference"]), Parity.from_json(read_json(output / "config.json")["parity"])


def _clear(output: Path) -> None:
    """Remove what an unfinished export of another form left, so that the folder holds one model alone.

    Raises:
        ArtefactError: the folder holds files that no export writes.
    """
    ours = re.compile(
        r"model\.(onnx|onnx\.data|safetensors|pt2)|codes\.npz|config\.json|README\.md|submission\.zip|"
        r"refused\.json|modules\.json|config_sentence_transformers\.json|\d_(Transformer|Normalize|Dense)"
    )
    entries = [entry for entry in output.iterdir() if not entry.name.startswith(".") or entry.name == _WORK]
    strangers = sorted(
        entry.name for entry in entries if entry.name != _WORK and not ours.fullmatch(entry.name)
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


def _finish(
    output: Path,
    made_from: Mapping[str, Json],
    config: dict[str, Json],
    difference: float,
    parity: Parity | None,
) -> Exported:
    (output / REFUSED_NAME).unlink(missing_ok=True)
    manifest = Manifest(
        kind=KIND, format_version=FORMAT_VERSION, made_from=made_from, content=_content(output)
    )
    write_manifest(output, manifest)
    if config["form"]["format"] in ("folder", "hub", "sentence-transformers"):
        try:
            Embedder.load(output, num_threads=1)
        except ArtefactError:
            (output / MANIFEST_NAME).unlink()
            raise
    return Exported(output, config, difference, parity)


def _content(folder: Path) -> dict[str, Json]:
    """Checksum and size of every file of the model."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.relative_to(folder).parts[0].startswith(".work")
        and path.name not in (MANIFEST_NAME, REFUSED_NAME, ".lock")
    }
    return {
        "sha256": {name: file_sha256(path) for name, path in files.items()},
        "bytes": {name: path.stat().st_size for name, path in files.items()},
    }


# ---- the files


def _write_files(
    output: Path, source: Source, form: Form, *, name: str, tolerance: float
) -> tuple[dict[str, Json], float, Parity | None]:
    """Everything but the manifest; returns the configuration, the difference to torch and the parity."""
    head = source.head if form.dim is None else first_dims(source.head, form.dim)
    model = EmbeddingModel(source.backbone, head).eval()
    catalog = source.features.catalog
    preprocessing = source.backbone.preprocessing
    if preprocessing.views and (not form.has_graph or form.input == "images"):
        raise InputError(
            f"--format {form.format} with features of several views per image",
            expected="features of one view: this form prepares images by itself",
            next_step="use --format folder without --preprocessing-inside, or features of one view",
        )
    pixels = prepared_images(catalog, preprocessing, NUM_CHECKED)
    if len(pixels) < 2:  # the images may have moved since; noise still compares the arithmetic
        shape = (NUM_CHECKED, 3, *preprocessing.shape)
        pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    parity: Parity | None = None
    if not form.has_graph:
        if form.format == "guiec":
            require_guiec_dim(head.embedding_dim)
        difference = write_program(model, output, form.format, pixels)  # type: ignore[arg-type]
        after = _test_vectors(source, head)
        result = evaluate_embeddings(after[0], after[1]) if after else None
    else:
        graph = output / _WORK / "model" / "model.onnx"
        difference = _write_checked_graph(model, graph, pixels)
        embedder = _written_form(output, graph, source, head, form)
        result, parity = _measured(output, source, head, embedder, form, tolerance)
        if form.format == "sentence-transformers":
            write_sentence_transformer(model, output)
        else:
            _write_tensors(model, output / "model.safetensors", form)
        for file in sorted(graph.parent.iterdir(), reverse=True):  # the weights beside the graph come first
            file.replace(output / file.name)
    config = configuration(name, source, form.to_json(), result, _no_match(source, head, form))
    config["embedding_dim"] = head.embedding_dim
    config["head"]["embedding_dim"] = head.embedding_dim
    config["parity"] = parity.to_json() if parity else None
    if form.format == "hub":
        write_text(output / ".gitattributes", _GIT_ATTRIBUTES)
        write_text(output / ".gitignore", ".lock\n")  # the hub follows it while it takes the folder in
    write_json(output / "config.json", config)
    write_text(output / "README.md", card(config))
    return config, difference, parity


_GIT_ATTRIBUTES: Final = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in ("*.onnx", "*.onnx.data", "*.safetensors", "*.npz")
)


def _write_checked_graph(model: EmbeddingModel, graph: Path, pixels: np.ndarray) -> float:
    """Write the float32 graph and compare it with torch; returns the largest difference.

    Raises:
        ArtefactError: they differ by more than :data:`LARGEST_DIFFERENCE`.
    """
    graph.parent.mkdir(parents=True)
    write_onnx(model, graph, size=model.backbone.preprocessing.shape)
    with torch.inference_mode():
        expected = model(torch.from_numpy(pixels)).numpy()
    found = open_graph(graph).run(None, {"pixels": pixels})[0]
    difference = float(np.abs(found - expected).max())
    if difference > LARGEST_DIFFERENCE:
        raise ArtefactError(
            f"the exported model's vectors differ from torch's by up to {difference:.1e}",
            expected=f"at most {LARGEST_DIFFERENCE:.0e}",
            next_step="report this with the backbone's name; the run itself is unharmed",
        )
    return difference


def _written_form(output: Path, graph: Path, source: Source, head: Any, form: Form) -> Embedder:
    """Turn the float32 graph into the form asked for, fit the coder, and open both as they will be used."""
    preprocessing = source.backbone.preprocessing
    catalog = source.features.catalog
    if form.loses:  # what it is measured against
        reference = graph.parent.parent / "reference" / "model.onnx"
        reference.parent.mkdir()
        write_onnx(source.model, reference, size=preprocessing.shape)
    if form.precision == "float16":
        graphs.halve_weights(graph)
    elif form.precision == "int8":
        graphs.quantise(graph, _calibration_pixels(source))
    if form.input == "images":
        graphs.with_preprocessing_inside(graph, preprocessing)
    coder = None
    if form.code_kind is not None:
        training = np.asarray(source.features.rows[catalog.has_role("train")])
        coder = Coder.fit(form.code_kind, head.embed(training))
        with atomic_path(output / "codes.npz") as partial:
            coder.write(partial)
    return _opened(graph, source, head.embedding_dim, form, coder)


def _opened(graph: Path, source: Source, dim: int, form: Form, coder: Coder | None = None) -> Embedder:
    """An embedder of a graph whose folder is not finished yet."""
    config = {
        "name": "unfinished",
        "embedding_dim": dim,
        "form": form.to_json(),
        "backbone": {"preprocessing": source.backbone.preprocessing.to_json()},
    }
    manifest = Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from={})
    return Embedder(graph.parent, manifest, config, open_graph(graph, graphs.num_threads()), coder)


def _calibration_pixels(source: Source) -> np.ndarray:
    catalog = source.features.catalog
    catalog.require_files()
    training = catalog.take(catalog.has_role("train"))
    pixels = prepared_images(training, source.backbone.preprocessing, NUM_CALIBRATION)
    if len(pixels) < graphs.CALIBRATION_BATCH:
        raise ArtefactError(
            f"{len(pixels)} training images can be read",
            expected=f"at least {graphs.CALIBRATION_BATCH}: they decide the ranges of the whole numbers",
            next_step="put the images back where the catalog says they are, or use --precision float16",
        )
    return pixels


# ---- what it is worth


def _test_vectors(source: Source, head: Any) -> tuple[Embeddings, Catalog] | None:
    """Vectors of the test images from the cached features; None where there are none."""
    catalog = source.features.catalog
    asked = catalog.has_role("query", "query+index").any() and catalog.has_role("index", "query+index").any()
    if not asked or not source.described:
        return None
    rows = rows_of(catalog, "test")
    return head.embed(np.asarray(source.features.rows[rows])), catalog.take(rows)


def _no_match(source: Source, head: Any, form: Form) -> NoMatch | None:
    """What scores mean, by the validation images, and how true that is of the test images.

    None where they are too few or too hard for any answer to be sure enough, and where scores are other ones
    than the head's own.
    """
    if not source.described or form.precision == "int8" or form.codes != "float32":
        return None
    catalog = source.features.catalog
    used = [rows_by_role(catalog, role) for role in ("val", "test")]
    rows = np.unique(np.concatenate([part for pair in used for part in pair]))
    if not len(rows):
        return None
    embeddings = head.embed(np.asarray(source.features.rows[rows]))
    try:
        found = measure_no_match(embeddings, catalog.take(rows), target_precision=NO_MATCH_PRECISION)
    except InputError:  # no images of a role, or all answers right: nothing to learn from
        return None
    fitted = found.fitted
    enough = fitted.num_with_positive >= LEAST_QUESTIONS and math.isfinite(fitted.threshold)
    return found if enough else None


def _measured(
    output: Path, source: Source, head: Any, embedder: Embedder, form: Form, tolerance: float
) -> tuple[EvaluationResult | None, Parity | None]:
    """The metrics of the model as it is written, and what its form costs."""
    catalog = source.features.catalog
    if not form.loses:
        known = _test_vectors(source, head)
        if known is None and not source.described and measured_role(catalog) == "test":
            tested = catalog.take(rows_of(catalog, "test"))
            vectors, readable = embed_images(embedder, tested)
            known = vectors[readable], tested.take(readable)
        return (evaluate_embeddings(*known) if known else None), None
    role = measured_role(catalog)
    rows = rows_of(catalog, role)
    tested = catalog.take(rows)
    full = Form()
    reference_graph = output / _WORK / "reference" / "model.onnx"
    reference = _opened(reference_graph, source, source.head.embedding_dim, full)
    readable = np.ones(len(tested), dtype=bool)
    if source.described:
        before = source.head.embed(np.asarray(source.features.rows[rows]))
    else:
        before, readable = embed_images(reference, tested)
    if form.changes_arithmetic or not source.described:
        after, read = embed_images(embedder, tested)
        readable &= read
    else:
        after = head.embed(np.asarray(source.features.rows[rows]))
    before, after, tested = before[readable], after[readable], tested.take(readable)
    queries_coded = False
    if embedder.coder is not None:
        after, queries_coded = decoded(embedder.coder, after, tested, role)
    first, second = evaluate_both(before, after, tested, role)
    parity = Parity(
        measured_on=role,
        changes=changes_of(first, second),
        tolerance=tolerance,
        model_bytes=(_graph_bytes(reference_graph), _graph_bytes(embedder.folder / "model.onnx")),
        vector_bytes=(
            4 * source.head.embedding_dim,
            embedder.coder.num_bytes if embedder.coder else 4 * head.embedding_dim,
        ),
        images_per_s=_speeds(reference, embedder, tested, form),
        queries_coded=queries_coded,
    )
    return (second if role == "test" else None), parity


def _graph_bytes(graph: Path) -> int:
    return sum(file.stat().st_size for file in graph.parent.glob("model.onnx*"))


def _speeds(
    reference: Embedder, embedder: Embedder, tested: Catalog, form: Form
) -> tuple[float, float] | None:
    """Images a second of both graphs where their arithmetic differs, in whole numbers' own batches."""
    if form.precision == "float32" or form.input == "images":
        return None
    pixels = prepared_images(tested, reference.preprocessing, 16)
    if len(pixels) == 0:
        return None
    speeds = images_per_second({"before": reference, "after": embedder}, {"before": pixels, "after": pixels})
    return speeds["before"], speeds["after"]


def _write_tensors(model: EmbeddingModel, target: Path, form: Form) -> None:
    """Write the weights; a full disk is an OSError, as it is from every other writer."""
    half = form.precision == "float16"
    tensors = {
        key: (value.half() if half and value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
        if key.startswith("head.") or not form.head_only
    }
    with atomic_path(target) as partial:
        mode = partial.stat().st_mode
        try:
            safetensors.torch.save_file(tensors, partial)
            partial.chmod(mode)  # the library makes files that only their owner may read
        except safetensors.SafetensorError as error:
            code = re.search(
                r"(?:os error|code:) (\d+)", str(error)
            )  # of the system, in the words of the Rust library
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model folder, checked: ``head.*``, and ``backbone.*`` unless it was ``--head-only``.

    Raises:
        ArtefactError: no model folder, or the file is missing, cut short or damaged.
    """
    manifest = read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION)
    require_whole(folder, manifest, ["model.safetensors"])
    tensors: dict[str, torch.Tensor] = safetensors.torch.load_file(folder / "model.safetensors")
    return tensors
