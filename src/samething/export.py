"""From a run to a model folder that anyone can run, without torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jinja2
import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Float, UInt8
from rich.markup import escape
from torch import Tensor, nn

import samething
from samething.backbones import Backbone, load_described, write_onnx
from samething.catalog import Catalog
from samething.embedder import FORMAT_VERSION, KIND, Embedder
from samething.errors import ArtefactError, ImageError
from samething.evaluation import EvaluationResult, evaluate_embeddings
from samething.features import FeatureSet
from samething.files import (
    MANIFEST_NAME,
    Json,
    Manifest,
    atomic_path,
    disk_errors,
    file_sha256,
    is_finished,
    only_one_writer,
    read_manifest,
    require_same,
    write_json,
    write_manifest,
    write_text,
)
from samething.heads import Head
from samething.images import decode, prepare
from samething.training.run import Run

LARGEST_DIFFERENCE: Final = 1e-4
"""Largest difference of any number between the exported model's vectors and torch's."""
NUM_CHECKED: Final = 16
"""Pictures that the exported model is checked on."""


class EmbeddingModel(nn.Module):
    """Backbone and head as one network: uint8 pixels (b, 3, size, size) to unit-length vectors (b, d)."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, pixels: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b d"]:
        """Unit-length embeddings."""
        return nn.functional.normalize(self.head(self.backbone(pixels)), dim=1)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A finished model folder."""

    folder: Path
    config: dict[str, Json]
    largest_difference: float | None
    """Largest difference to torch's vectors on real pictures; None when the folder was there already."""

    def __rich__(self) -> str:
        """What a person wants to know of the model, in a few lines."""
        size = sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file()) / 1e6
        checked = (
            "was there already"
            if self.largest_difference is None
            else f"vectors equal torch's within {self.largest_difference:.0e}"
        )
        return (
            f"[bold]{escape(str(self.folder))}[/bold]: {self.config['backbone']['name']} + "
            f"{self.config['embedding_dim']}-d head, {size:.0f} MB, {checked}"
        )


def export(
    run: Path,
    *,
    output: Path = Path("model"),
    name: str | None = None,
    weights: Path | None = None,
) -> Exported:
    """Write a model folder: ONNX, safetensors, configuration and a card, checked against torch.

    Args:
        run: the finished run folder.
        output: the model folder to write.
        name: name of the model; by default the folder's.
        weights: the backbone's checkpoint, if the features were made from one.

    Returns:
        The finished model.

    Raises:
        FingerprintError: the backbone is not the one that the features were made with.
        ArtefactError: the feature folder has moved, or the exported model does not agree with torch.
    """
    trained = Run.open(run)
    output = Path(output)
    features = trained.features()
    made_from = {
        "run": trained.manifest.fingerprint,
        "backbone": dict(features.backbone),
        "head": file_sha256(trained.folder / "head.safetensors"),
    }
    with only_one_writer(output), disk_errors(output):
        if is_finished(output):
            manifest = read_manifest(output, kind=KIND, format_version=FORMAT_VERSION)
            require_same(
                made_from,
                manifest.made_from,
                what=f"{output} is another model",
                next_step="choose another folder with -o, or remove this one",
            )
            return Exported(output, dict(Embedder.load(output).config), None)
        backbone = load_described(features.backbone, weights=weights)
        require_same(
            dict(features.backbone),
            backbone.describe(),
            what="the backbone as it loads now is not the one the features were made with",
            next_step="give the checkpoint with --weights, or compute the features again",
        )
        model = EmbeddingModel(backbone, trained.head).eval()
        embeddings = trained.head.embed(features.rows)
        result = evaluate_embeddings(embeddings, features.catalog) if _has_test(features.catalog) else None
        config = _config(name or output.resolve().name, trained, features, backbone, result)
        write_json(output / "config.json", config)
        write_text(output / "README.md", _card(config))
        with atomic_path(output / "model.safetensors") as partial:
            _write_tensors(model, partial)
        _write_graph(model, output, size=backbone.preprocessing.shape)
        manifest = Manifest(
            kind=KIND,
            format_version=FORMAT_VERSION,
            made_from=made_from,
            content={"sha256": {name: file_sha256(output / name) for name in _files(output)}},
        )
        write_manifest(output, manifest)
        try:
            difference = _check(model, Embedder.load(output), features.catalog)
        except ArtefactError:
            (output / MANIFEST_NAME).unlink()
            raise
    return Exported(output, config, difference)


def _files(folder: Path) -> list[str]:
    return sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.name != MANIFEST_NAME
    )


def _write_tensors(model: EmbeddingModel, target: Path) -> None:
    """Write the weights; a full disk is an OSError, as it is from every other writer."""
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    mode = target.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, target)
        target.chmod(mode)  # the library makes files that only their owner may read
    except safetensors.SafetensorError as error:
        code = re.search(
            r"(?:os error|code:) (\d+)", str(error)
        )  # of the system, in the words of the Rust library
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _write_graph(model: EmbeddingModel, output: Path, *, size: tuple[int, int]) -> None:
    """Write the ONNX graph in a folder of its own first: large graphs are two files."""
    partial = output / ".onnx"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    write_onnx(model, partial / "model.onnx", size=size)
    for file in sorted(partial.iterdir(), reverse=True):  # the weights beside the graph before the graph
        file.replace(output / file.name)
    partial.rmdir()


def _has_test(catalog: Catalog) -> bool:
    return bool(
        catalog.has_role("query", "query+index").any() and catalog.has_role("index", "query+index").any()
    )


def _config(
    name: str, run: Run, features: FeatureSet, backbone: Backbone, result: EvaluationResult | None
) -> dict[str, Json]:
    catalog = features.catalog
    packages = ("torch", "timm", "onnx", "numpy", "pillow")
    training = catalog.take(catalog.has_role("train"))
    return {
        "name": name,
        "embedding_dim": run.head.embedding_dim,
        "backbone": {**features.backbone, "licence": backbone.licence},
        "head": dataclasses.asdict(run.head.config),
        "training": {
            "config": run.config.to_json(),
            "datasets": sorted(set(training.strings("dataset"))),
            "domains": training.domains,
            "num_classes": run.manifest.content["num_classes"],
            "num_pictures": run.manifest.content["num_pictures"],
            "best_validation_mmp@5": run.best_score,
        },
        "metrics": result.to_json() if result else None,
        "intervals": result.intervals() if result else None,
        "versions": {
            "samething": samething.__version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def _card(config: dict[str, Json]) -> str:
    def percent(value: float | None, interval: Sequence[float | None]) -> str:
        low, high = interval
        if value is None or low is None or high is None:
            return "–"
        return f"{100 * value:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    templates = jinja2.Environment(loader=jinja2.PackageLoader("samething"), keep_trailing_newline=True)
    return templates.get_template("model_card.md").render(**config, percent=percent)


def _check(model: EmbeddingModel, embedder: Embedder, catalog: Catalog) -> float:
    """Compare the written model with torch on pictures of the catalog.

    Raises:
        ArtefactError: they differ by more than :data:`LARGEST_DIFFERENCE`.
    """
    pixels: list[Any] = []
    for row in range(0, len(catalog), max(1, len(catalog) // NUM_CHECKED))[:NUM_CHECKED]:
        try:
            pixels.append(prepare(decode(catalog.source(row)), embedder.preprocessing))
        except ImageError:
            continue
    if not pixels:  # the pictures may have moved since; noise still compares the arithmetic
        shape = (NUM_CHECKED, 3, *embedder.preprocessing.shape)
        pixels = list(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    batch = np.stack(pixels)
    with torch.inference_mode():
        expected = model(torch.from_numpy(batch)).numpy()
    difference = float(np.abs(embedder.embed_pixels(batch) - expected).max())
    if difference > LARGEST_DIFFERENCE:
        raise ArtefactError(
            f"the exported model's vectors differ from torch's by up to {difference:.1e}",
            expected=f"at most {LARGEST_DIFFERENCE:.0e}",
            next_step="report this with the backbone's name; the run itself is unharmed",
        )
    return difference
