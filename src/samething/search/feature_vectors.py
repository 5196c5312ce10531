"""Vectors of images whose features are on disk: the head alone computes them, without the backbone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samething.arrays import Embeddings, Float, signed_power, unit
from samething.checksums import require_whole
from samething.embedder import Embedder
from samething.errors import FingerprintError, ImageError, InputError
from samething.files import is_finished, read_manifest
from samething.images import checksum
from samething.search.collection import Collection, content_id

if TYPE_CHECKING:
    from samething.features.store import FeatureSet
else:
    FeatureSet = Any

_KIND: Final = "features"  # the module that writes them needs pyarrow, which takes 0.2 s to import
_SAMPLE: Final = 4
_LEAST_AGREEMENT: Final = 0.99
"""Cosine between a vector of the head and that of the whole model: float16 features and another runtime move
it by less than a thousandth."""


def is_feature_folder(location: Path) -> bool:
    """Whether a folder was written by ``samething features``."""
    return is_finished(location) and read_manifest(location).kind == _KIND


class KnownVectors:
    """The vectors that a model gives to the images of a feature folder, by the images' content."""

    def __init__(self, embedder: Embedder, location: Path) -> None:
        """Open the folder and compare a few of its images with what the whole model says of them.

        Raises:
            FingerprintError: the features are not of the model's backbone.
            InputError: the model has more than a linear head, or was written in a form that changes vectors.
            ArtefactError: the folder is damaged.
        """
        from samething.features.store import FeatureSet

        self.features = FeatureSet.open(location)
        self.location = location
        data = location / str(self.features.manifest.content["data"])
        self.collection = Collection(data / "catalog.parquet")
        self._head = _linear_head(embedder, self.features)
        self._power = float(embedder.config["head"].get("power", 1.0))
        catalog = self.features.catalog
        checksums = catalog.table["sha256"].to_pylist() if "sha256" in catalog.table.column_names else []
        self._row_of = {
            content_id(sha256, source.box): row
            for row, (sha256, source) in enumerate(zip(checksums, catalog.sources, strict=False))
            if sha256
        }
        self._require_agreement(embedder)

    def __contains__(self, name: str) -> bool:
        return name in self._row_of

    def vectors(self, names: Sequence[str]) -> Embeddings:
        """The vectors of some contents, float32 of length 1."""
        return self._of_rows([self._row_of[name] for name in names])

    def _of_rows(self, rows: list[int]) -> Embeddings:
        mean, scale, weight, bias = self._head
        features = np.asarray(self.features.rows[rows], dtype=np.float32)
        if scale > 0:
            features = (unit(signed_power(features, self._power)) - mean) / scale
        return unit(features @ weight.T + bias)

    def _require_agreement(self, embedder: Embedder) -> None:
        """A fine-tuned backbone, or images that changed since, would give vectors of another model."""
        names = list(self._row_of)
        for name in names[:: max(1, len(names) // _SAMPLE)][:_SAMPLE]:
            row = self._row_of[name]
            source = self.features.catalog.source(row)
            try:
                if content_id(checksum(source), source.box) != name:
                    continue  # it changed, and will be embedded
                expected = embedder.embed([source])
            except ImageError:
                continue  # it is listed when its turn comes
            agreement = float(expected[0] @ self._of_rows([row])[0])
            if agreement < _LEAST_AGREEMENT:
                raise FingerprintError(
                    f"features in {self.location} that give {source.location} another vector than the model "
                    f"{embedder.name!r} does (cosine {agreement:.4f})",
                    expected=f"a cosine of at least {_LEAST_AGREEMENT}",
                    next_step="index the catalog instead: samething index CATALOG --model MODEL",
                )


def known_vectors(embedder: Embedder, location: Path) -> list[KnownVectors]:
    """Those of a feature folder; none where its features give other vectors."""
    with contextlib.suppress(InputError, FingerprintError):
        return [KnownVectors(embedder, location)]
    return []


def _linear_head(
    embedder: Embedder, features: FeatureSet
) -> tuple[Float[np.ndarray, " w"], float, Float[np.ndarray, "d w"], Float[np.ndarray, " d"]]:
    """Mean, scale (0: features are taken as they are), weight and bias of a model's head."""
    from safetensors import safe_open

    backbone = {name: value for name, value in embedder.config["backbone"].items() if name != "licence"}
    if backbone != dict(features.backbone):
        names = sorted(set(backbone) | set(features.backbone))
        differing = [name for name in names if backbone.get(name) != features.backbone.get(name)]
        raise FingerprintError(
            f"features in {features.folder} whose {', '.join(differing)} differ from the model's",
            expected=f"features of the backbone {backbone['name']} as the model {embedder.name!r} uses it",
            next_step="index the images themselves, or a folder of the model's own features",
        )
    form = embedder.form
    path = embedder.folder / "model.safetensors"
    plain = {"input": "pixels", "precision": "float32", "dim": None}
    is_plain = all(form[name] == value for name, value in plain.items())
    kind = embedder.config["head"]["kind"]
    if kind == "none" and is_plain:  # the backbone as it is
        width = features.rows.shape[1]
        return np.zeros(width, np.float32), 0.0, np.eye(width, dtype=np.float32), np.zeros(width, np.float32)
    if kind not in ("linear", "pca") or not is_plain or not path.exists():
        raise InputError(
            f"a feature folder and the model {embedder.name!r} with a head of kind {kind!r}",
            expected="a model with a linear head, in the plain form, with its model.safetensors",
            next_step="index the catalog or the images instead: samething index CATALOG --model MODEL",
        )
    require_whole(embedder.folder, embedder.manifest, [path.name])
    with safe_open(path, "numpy") as stream:
        stored = {name: stream.get_tensor(name) for name in stream.keys() if name.startswith("head.")}  # noqa: SIM118
    weight = stored["head.projection.weight"].astype(np.float32)
    bias = stored.get("head.projection.bias", np.zeros(len(weight))).astype(np.float32)
    mean = stored.get("head.standardise.mean", np.zeros(weight.shape[1])).astype(np.float32)
    return mean, float(stored.get("head.standardise.scale", 0.0)), weight, bias
