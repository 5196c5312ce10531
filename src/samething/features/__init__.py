"""Catalog and backbone to features on disk: each picture is described once, and never again.

Reading a feature folder needs no torch; making one does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from samething.catalog import Catalog
from samething.features.folder import FeatureSet
from samething.images import ResizePolicy

__all__ = ["FeatureSet", "features"]


def features(
    catalog: Path,
    *,
    backbone: str = "efficientnet_lite0",
    output: Path = Path("features"),
    weights: Path | None = None,
    resize: ResizePolicy | None = None,
    pooling: Literal["own", "class", "mean", "gem", "map", "class+mean"] = "own",
    views: str = "own",
    combine: Literal["average", "keep"] = "average",
    sizes: tuple[int, ...] = (),
    root: Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    runtime: Literal[
        "auto", "torch", "torch-bfloat16", "onnxruntime", "openvino", "openvino-bfloat16"
    ] = "auto",
) -> FeatureSet:
    """Describe every picture of a catalog with a frozen backbone, once.

    The result is a folder of float16 rows in catalog order. A killed run resumes where it stopped; a grown or
    changed catalog computes only the pictures that are new; the same picture twice is computed once. Pictures
    that cannot be read are listed with their reasons and left out.

    Args:
        catalog: the catalog's file.
        backbone: a name that samething backbones lists, timm:NAME, open_clip:NAME/WEIGHTS or hf:NAME; several
            joined by + stand side by side in one feature.
        output: the feature folder to write.
        weights: a checkpoint on this disk, instead of the backbone's own source, or a folder of checkpoints
            named after the backbones.
        resize: another way to bring pictures to the input size than the backbone's own.
        pooling: another way from tokens to a feature than the backbone's own.
        views: views of each picture joined by +: own, crop, squash, pad, start, end, zoom, mirror, a corner
            such as top-left, or several at once: aspect, crops, five.
        combine: average the features of views and sizes, or keep them side by side.
        sizes: other sides of the input than the backbone's own, in pixels; several are views.
        root: folder of the pictures, if they were moved since the catalog was made.
        batch_size: pictures a batch; also what a killed run loses at most.
        num_workers: processes that decode pictures; by default one less than the cores, at least one.
        runtime: what computes; auto measures, and takes the fastest whose features agree with torch's in
            float32.

    Returns:
        The finished feature set.

    Raises:
        ArtefactError: the pictures have moved, or the folder is in use by another process.
        FingerprintError: the folder holds features of another backbone or preprocessing.
        InputError: the catalog is empty, no picture can be read, or the disk is full.
    """
    from samething.features.extraction import extract

    pictures = Catalog.read(catalog, root=root)
    return extract(
        pictures,
        backbone_name=backbone,
        folder=Path(output),
        weights=weights,
        resize=resize,
        options={"pooling": pooling, "views": views, "combine": combine, "sizes": sizes},
        batch_size=batch_size,
        num_workers=num_workers,
        runtime=runtime,
    )
