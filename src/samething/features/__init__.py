"""Catalog and backbone to features on disk: each image is described once, and never again.

Reading a feature folder needs no torch; making one does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, overload

from cyclopts import Parameter

from samething.catalog import Catalog
from samething.errors import InputError
from samething.features.estimate import Estimate
from samething.features.folder import FeatureSet
from samething.images import Decoding, ResizePolicy

if TYPE_CHECKING:
    from samething.backbones import Backbone

    BackboneChoice: TypeAlias = str | Backbone
else:
    BackboneChoice = Annotated[str | Any, Parameter(metavar="NAME")]  # the class needs torch

RuntimeChoice: TypeAlias = Literal[
    "auto", "torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16"
]

__all__ = ["Estimate", "FeatureSet", "features"]


@overload
def features(
    catalog: Path,
    *,
    backbone: BackboneChoice = ...,
    output: Path = ...,
    weights: Path | None = ...,
    resize: ResizePolicy | None = ...,
    pooling: Literal["own", "class", "mean", "gem", "map", "class+mean"] = ...,
    views: str = ...,
    combine: Literal["average", "keep"] = ...,
    sizes: tuple[int, ...] = ...,
    exact: bool = ...,
    scaled: bool = ...,
    root: Path | None = ...,
    batch_size: int = ...,
    num_workers: int | None = ...,
    runtime: RuntimeChoice = ...,
    cluster: str | None = ...,
    dry_run: Literal[False] = ...,
) -> FeatureSet:
    """A job that is done gives the feature set."""


@overload
def features(
    catalog: Path,
    *,
    backbone: BackboneChoice = ...,
    output: Path = ...,
    weights: Path | None = ...,
    resize: ResizePolicy | None = ...,
    pooling: Literal["own", "class", "mean", "gem", "map", "class+mean"] = ...,
    views: str = ...,
    combine: Literal["average", "keep"] = ...,
    sizes: tuple[int, ...] = ...,
    exact: bool = ...,
    scaled: bool = ...,
    root: Path | None = ...,
    batch_size: int = ...,
    num_workers: int | None = ...,
    runtime: RuntimeChoice = ...,
    cluster: str | None = ...,
    dry_run: bool,
) -> FeatureSet | Estimate:
    """A dry run gives the estimate."""


def features(
    catalog: Path,
    *,
    backbone: BackboneChoice = "efficientnet_lite0",
    output: Path = Path("features"),
    weights: Path | None = None,
    resize: ResizePolicy | None = None,
    pooling: Literal["own", "class", "mean", "gem", "map", "class+mean"] = "own",
    views: str = "own",
    combine: Literal["average", "keep"] = "average",
    sizes: tuple[int, ...] = (),
    exact: bool = False,
    scaled: bool = False,
    root: Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    runtime: RuntimeChoice = "auto",
    cluster: str | None = None,
    dry_run: bool = False,
) -> FeatureSet | Estimate:
    """Describe every image of a catalog with a frozen backbone, once.

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
        resize: another way to bring images to the input size than the backbone's own.
        pooling: another way from tokens to a feature than the backbone's own.
        views: views of each image joined by +: own, crop, squash, pad, start, end, zoom, mirror, a corner
            such as top-left, or several at once: aspect, crops, five.
        combine: average the features of views and sizes, or keep them side by side.
        sizes: other sides of the input than the backbone's own, in pixels; several are views.
        exact: decode and resize with Pillow, as the backbones' own libraries do. Otherwise with faster code
            whose pixels differ from that by 2 of 255 at most.
        scaled: unpack large JPEG files at a fraction of their size, at least twice what the backbone sees:
            faster still for images of many megapixels, but pixels differ by more.
        root: folder of the images, if they were moved since the catalog was made.
        batch_size: images per batch; also what a killed run loses at most (twice as many on a GPU).
        num_workers: processes that decode images; by default one less than the cores, at least one. On a
            cluster: processes that describe them; by default what it has room for.
        runtime: what computes on a CPU; auto measures, and takes the fastest whose
            features agree with torch's in float32.
        cluster: "local" or the address of a Ray cluster (ray://HOST:10001, or HOST:6379): many workers on
            many machines read and describe, this process writes. Images must be readable from there.
        dry_run: measure a sample, say what the whole would take in time, memory and disk, and write nothing.

    Returns:
        The finished feature set; of a dry run, the estimate.

    Raises:
        ArtefactError: the images have moved, or the folder is in use by another process.
        FingerprintError: the folder holds features of another backbone or preprocessing.
        InputError: the catalog is empty, no image can be read, or the disk is full.
        MissingExtraError: the cluster or a kind of URL needs a package that is not installed.
    """
    from samething.features.extraction import Work, extract

    if exact and scaled:
        raise InputError("--exact and --scaled", expected="one of them", next_step="leave one away")
    decoding: Decoding = "exact" if exact else "scaled" if scaled else "fast"
    return extract(
        Catalog.read(catalog, root=root),
        backbone=backbone,
        folder=Path(output),
        weights=weights,
        resize=resize,
        options={"pooling": pooling, "views": views, "combine": combine, "sizes": sizes},
        decoding=decoding,
        dry_run=dry_run,
        work=Work(batch_size=batch_size, num_workers=num_workers, runtime=runtime, cluster=cluster),
    )
