"""The paper's first table: eight families of backbones, zero-shot and with a linear probe, at 64 numbers.

    python recipes/zero_shot_and_linear_probe.py things.parquet --output families
    python recipes/zero_shot_and_linear_probe.py --demo

Needs a catalog with train, val and test images, and the weights of a backbone of each family (they are
fetched from the model hub where there is a network). With --demo: the features that samething demo has made.
"""

from __future__ import annotations

from pathlib import Path

import rich

from samething.cli import run_script
from samething.demo import demo_features
from samething.errors import ArtefactError
from samething.features import features
from samething.study import backbones

FAMILIES = (
    "clip_laion2b_large_224",
    "convnext_clip_large_soup_320",
    "clipa_large_336",
    "eva02_clip_large_336",
    "metaclip_large_224",
    "siglip_so400m_384",
    "dinov2_large_518",
    "sam_base_1024",
)
"""A backbone of each family that the paper compares; samething backbones lists all."""


def main(
    catalog: Path | None = None,
    *,
    output: Path = Path("families"),
    demo: bool = False,
    demo_folder: Path = Path("demo"),
    epochs: float = 10.0,
) -> None:
    """Describe the images with every family, then compare.

    Args:
        catalog: the catalog's file.
        output: folder for the features, a folder a family, and the study.
        demo: use the demo's features instead.
        demo_folder: where samething demo has written.
        epochs: passes over the training images for each linear probe.
    """
    if demo:
        folders = [demo_features(demo_folder)]
    elif catalog is None:
        raise ArtefactError(
            "no catalog",
            expected="a catalog with train, val and test images",
            next_step="give one made by samething catalog, or --demo",
        )
    else:
        folders = []
        for name in FAMILIES:
            features(catalog, backbone=name, output=output / name)
            folders.append(output / name)
    rich.print(backbones(*folders, output=output / "study", epochs=epochs))


if __name__ == "__main__":
    run_script(main)
