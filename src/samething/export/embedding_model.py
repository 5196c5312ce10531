"""Backbone and head as one network, and where the two of an export come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from samething.arrays import Float, UInt8
from samething.backbones import Backbone, load_the_same
from samething.errors import InputError
from samething.features import FeatureSet
from samething.files import Json
from samething.heads import Head
from samething.retrieval.codes import StoredCodes
from samething.training.run import BACKBONE_NAME, Run


class UnitHead(nn.Module):
    """A head whose embeddings have length 1: features (b, width) to (b, d)."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Float[Tensor, "b width"]) -> Float[Tensor, "b d"]:
        """Unit-length embeddings."""
        return nn.functional.normalize(self.head(features), dim=1)


class EmbeddingModel(nn.Module):
    """Backbone and head as one network: uint8 pixels (b, 3, size, size) to unit-length vectors (b, d)."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, pixels: UInt8[Tensor, "b 3 height width"]) -> Float[Tensor, "b d"]:
        """Unit-length embeddings."""
        vectors: Tensor = UnitHead(self.head)(self.backbone(pixels))
        return vectors


@dataclasses.dataclass(frozen=True)
class Source:
    """What an export is made of."""

    run: Run | None
    """The run, or the first of those that are averaged; None where nothing was trained."""
    features: FeatureSet
    backbone: Backbone
    head: Head
    described: bool = True
    """Whether the feature folder holds features of this very backbone; not so where tuned ones were mixed."""
    codes: StoredCodes = "float32"
    """How its vectors are meant to be kept, and were when it was measured."""
    mix: Mapping[str, Json] | None = None
    """Which runs were averaged, and how far towards their start."""

    @property
    def training(self) -> Float[np.ndarray, "t w"]:
        """Features of the training images, or of all where none is for training."""
        is_training = self.features.catalog.has_role("train")
        return np.asarray(self.features.rows[is_training if is_training.any() else slice(None)])

    @property
    def model(self) -> EmbeddingModel:
        """Both as one network, in evaluation mode."""
        return EmbeddingModel(self.backbone, self.head).eval()


def source_of(run: Run, *, weights: Path | None) -> Source:
    """The backbone and the head of one run.

    Raises:
        FingerprintError: the backbone is not the one that the features were made with.
        ArtefactError: the feature folder has moved.
    """
    features = run.features()
    return Source(
        run=run,
        features=features,
        backbone=backbone_of(run, features, weights=weights),
        head=run.head,
        codes=run.config.codes,
    )


def backbone_of(run: Run, features: FeatureSet, *, weights: Path | None) -> Backbone:
    """The backbone that a run's features were made with; a tuned one lies in the run.

    Raises:
        FingerprintError: it is another one as it loads now.
    """
    tuned = run.folder / BACKBONE_NAME
    return load_the_same(features.backbone, weights=tuned if tuned.exists() else weights)


@torch.no_grad()
def first_dims(head: Head, dim: int) -> Head:
    """The head that gives the first numbers of another one's embedding (a Matryoshka prefix).

    Args:
        head: a head that ends in a linear map.
        dim: numbers to keep.

    Raises:
        InputError: not between 1 and the head's own dimension, or a head without a linear map.
    """
    layers = [name for name, module in head.named_modules() if isinstance(module, nn.Linear)]
    if not 1 <= dim <= head.embedding_dim or not layers:
        raise InputError(
            f"--dim {dim}",
            expected=f"between 1 and the {head.embedding_dim} numbers of this run's embedding, "
            "and a head that ends in a linear map",
            next_step="give a prefix that the run was trained with (matryoshka_dims), or train again",
        )
    shorter = Head(dataclasses.replace(head.config, embedding_dim=dim), head.width)
    wanted = shorter.state_dict()
    shorter.load_state_dict(
        {
            name: value[: len(wanted[name])] if value.dim() else value
            for name, value in head.state_dict().items()
        }
    )
    return shorter.eval()
