"""Catalog and backbone to features on disk: each image is computed once, and never again.

Reading a feature folder needs no torch; making one does.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import Parameter

from samething.catalog import Catalog
from samething.errors import InputError
from samething.features.estimate import Estimate
from samething.features.store import FeatureSet
from samething.images import Decoding

if TYPE_CHECKING:
    from samething.backbones import Backbone

    BackboneChoice: TypeAlias = str | Backbone
else:
    BackboneChoice = Annotated[str | Any, Parameter(metavar="NAME")]  # the class needs torch

RuntimeChoice: TypeAlias = Literal[
    "auto", "torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16", "int8"
]

__all__ = ["BackboneChoice", "Estimate", "FeatureSet", "features"]


def features(
    catalog: Path,
    *,
    backbone: BackboneChoice = "efficientnet_lite0",
    output: Path = Path("features"),
    weights: Path | None = None,
    pooling: Literal["own", "class", "mean", "gem", "map", "class+mean"] = "own",
    views: str = "own",
    combine: Literal["average", "keep"] = "average",
    sizes: tuple[int, ...] = (),
    decoding: Decoding = "fast",
    root: Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    runtime: RuntimeChoice = "auto",
    cluster: str | None = None,
    dry_run: bool = False,
) -> FeatureSet | Estimate:
    """Extract the features of every image of a catalog with a frozen backbone, once.

    The result is a folder of float16 rows in catalog order. A killed run resumes where it stopped; a grown or
    changed catalog computes only the images that are new; the same image twice is computed once. Images
    that cannot be read are listed with their reasons and left out.

    Images are decoded by worker processes into a fixed number of batches in memory, so that memory does not
    grow with the catalog; --dry-run says how much it is.

    Args:
        catalog: the catalog's file. Its images may be files, URLs (s3, gs, http, …) or members of shards.
        backbone: a name that samething backbones lists, timm:NAME, open_clip:NAME/WEIGHTS, hf:NAME, or
            python:MODULE:NAME for one's own; several joined by + stand side by side in one feature. From
            Python also a Backbone.
        output: the feature folder to write.
        weights: a checkpoint on this disk, instead of the backbone's own source, or a folder of checkpoints
            named after the backbones.
        pooling: another way from tokens to a feature than the backbone's own.
        views: how an image is brought to the input size, if not as the backbone's own way: crop, squash, pad,
            start, end, zoom, mirror or a corner such as top-left. Several joined by + are several views, as
            are aspect, crops and five; whole keeps an image's own shape, if the network can, not for export.
        combine: average the features of views and sizes, or keep them side by side.
        sizes: other sides of the input than the backbone's own, in pixels; several are views.
        decoding: exact decodes and resizes with Pillow, as the backbones' own libraries do; fast with code
            whose pixels differ from that by 2 of 255 at most; scaled also unpacks large JPEG files at a
            fraction of their size, at least twice what the backbone sees: faster still for images of many
            megapixels, but pixels differ by more.
        root: folder of the images, if they were moved since the catalog was made.
        batch_size: images per batch; also what a killed run loses at most (twice as many on a GPU).
        num_workers: processes that decode images; by default one less than the cores, at least one. On a
            cluster: processes that compute; by default what it has room for.
        runtime: what computes on a CPU; auto measures, and takes the fastest that agrees with torch;
            int8 computes in whole numbers, if that finds nearly as well (docs/backbones.md).
        cluster: "local" or the address of a Ray cluster (ray://HOST:10001, or HOST:6379): many workers on
            many machines read and compute, this process writes. Images must be readable from there.
        dry_run: measure a sample, say what the whole would take in time, memory and disk, and write nothing.

    Returns:
        The finished feature set; of a dry run, the estimate.

    Raises:
        ArtefactError: the images have moved, or the folder is in use by another process.
        FingerprintError: the folder holds features of another backbone or preprocessing.
        InputError: the catalog is empty, no image can be read, or the disk is full.
        MissingExtraError: the cluster or a kind of URL needs a package that is not installed.
    """
    from samething.backbones import load_backbone
    from samething.features.dry_run import dry_run as estimated
    from samething.features.extraction import Work, extract

    images = Catalog.read(catalog, root=root)
    if len(images) == 0:
        raise InputError(
            "a catalog without images",
            expected="at least one image",
            next_step="make another with: samething catalog FOLDER",
        )
    work = Work(batch_size=batch_size, num_workers=num_workers, runtime=runtime, cluster=cluster)
    options: dict[str, Any] = {"pooling": pooling, "views": views, "combine": combine, "sizes": sizes}
    network = load_backbone(backbone, weights=weights, **options)
    network = network.with_preprocessing(dataclasses.replace(network.preprocessing, decoding=decoding))
    return (estimated if dry_run else extract)(images, network, Path(output), work)
