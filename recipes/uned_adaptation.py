"""A backbone adapted to UnED: 64 numbers trained on its eight domains, measured by its protocol.

    python recipes/uned_adaptation.py --data-root /data --output uned
    python recipes/uned_adaptation.py --demo

Needs UnED under the data root: its info_files and the images of its eight domains (samething datasets says
where they are from). Linear map to 64 numbers under a cosine softmax without margin, batches of one domain
after another. Printed are R@1 and mMP@5 a domain in one index over all, as UnED's authors do. With
--demo: the same on the demo's five domains, by the ordinary protocol.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import rich

from samething.cli import run_script
from samething.datasets import catalog
from samething.demo import demo_features
from samething.errors import InputError
from samething.evaluation import evaluate
from samething.features import features
from samething.training import RECIPES, train


def main(
    *,
    data_root: Path | None = None,
    output: Path = Path("uned"),
    backbone: str = "siglip_so400m_384",
    epochs: float = 10.0,
    demo: bool = False,
    demo_folder: Path = Path("demo"),
) -> None:
    """Catalog, features, head, evaluation.

    Args:
        data_root: folder that holds UnED.
        output: folder for all artefacts.
        backbone: the backbone that is adapted.
        epochs: passes over the training images.
        demo: use the demo's features instead.
        demo_folder: where samething demo has written.
    """
    output.mkdir(parents=True, exist_ok=True)
    if demo:
        folder = demo_features(demo_folder)
    elif data_root is None:
        raise InputError(
            "no --data-root",
            expected="the folder that holds UnED",
            next_step="see samething datasets for its layout and where to get it, or give --demo",
        )
    else:
        listed = output / "uned.parquet"
        catalog(dataset="uned", data_root=data_root, output=listed)
        folder = output / "features"
        features(listed, backbone=backbone, output=folder)
    config = dataclasses.replace(
        RECIPES["demo"](), loss="normface", num_centers=1, epochs=epochs, sampling="domain-round-robin"
    )
    rich.print(train(folder, output=output / "run", config=config))
    rich.print(evaluate(output / "run", protocol="default" if demo else "uned"))


if __name__ == "__main__":
    run_script(main)
