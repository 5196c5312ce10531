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
    root: Path | None = None,
    batch_size: int = 64,
    num_workers: int | None = None,
    runtime: Literal["auto", "torch", "onnxruntime"] = "auto",
) -> FeatureSet:
    """Describe every picture of a catalog with a frozen backbone, once.

    The result is a folder of float16 rows in catalog order. A killed run resumes where it stopped; a grown or
    changed catalog computes only the pictures that are new; the same picture twice is computed once. Pictures
    that cannot be read are listed with their reasons and left out.

    Args:
        catalog: the catalog's file.
        backbone: a name from the table of backbones, or timm:NAME.
        output: the feature folder to write.
        weights: a checkpoint on this disk, instead of the backbone's own source.
        resize: another way to bring pictures to the input size than the backbone's own.
        root: folder of the pictures, if they were moved since the catalog was made.
        batch_size: pictures a batch; also what a killed run loses at most.
        num_workers: processes that decode pictures; by default one less than the cores, at least one.
        runtime: what computes on a CPU; auto takes ONNX Runtime where its features agree with torch's.

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
        batch_size=batch_size,
        num_workers=num_workers,
        runtime=runtime,
    )
