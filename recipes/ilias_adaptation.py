"""ILIAS' linear adaptation: Linear(w, 512) on UnED's training images, cosine softmax, two epochs.

    python recipes/ilias_adaptation.py --data-root /data --output ilias
    python recipes/ilias_adaptation.py --demo

Needs UnED and ILIAS' core (queries and positives) under the data root; distractors, a .npy per shard of
features of the same backbone, are given by --distractors. As its authors do (Kordopatis-Zilos et al., CVPR
2025): a cosine softmax without margin, scale 16, Adam at 1e-3, weight decay 1e-6, batch 128, 2 epochs;
measured by mAP@1k. Their million of training images is a draw from UnED's. With --demo: the same on the
demo's features and its own test.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rich

from samething.bench import ADAPTED
from samething.cli import run_script
from samething.datasets import catalog
from samething.demo import demo_features
from samething.errors import InputError
from samething.evaluation import evaluate, evaluate_embeddings
from samething.features import FeatureSet, features
from samething.training import train


def main(
    *,
    data_root: Path | None = None,
    output: Path = Path("ilias"),
    backbone: str = "siglip2_large_512",
    distractors: tuple[Path, ...] = (),
    demo: bool = False,
    demo_folder: Path = Path("demo"),
) -> None:
    """Features of both sets, the head, mAP@1k.

    Args:
        data_root: folder that holds UnED and ILIAS.
        output: folder for all artefacts.
        backbone: the backbone that is adapted.
        distractors: .npy shards of the backbone's features of distractors.
        demo: use the demo's features instead.
        demo_folder: where samething demo has written.
    """
    output.mkdir(parents=True, exist_ok=True)
    if demo:
        rich.print(train(demo_features(demo_folder), output=output / "run", config=ADAPTED))
        rich.print(evaluate(output / "run"))
        return
    if data_root is None:
        raise InputError(
            "no --data-root",
            expected="the folder that holds UnED and ILIAS",
            next_step="see samething datasets for their layouts and where to get them, or give --demo",
        )
    for key in ("uned", "ilias_core"):
        listed = output / f"{key}.parquet"
        catalog(dataset=key, data_root=data_root, output=listed)
        features(listed, backbone=backbone, output=output / f"{key}-features")
    run = train(output / "uned-features", output=output / "run", config=ADAPTED)
    tested = FeatureSet.open(output / "ilias_core-features")
    adapted = []
    for number, shard in enumerate(distractors):  # a shard at a time, as the search reads them
        target = output / f"distractors-{number:03d}.npy"
        np.save(target, run.head.embed(np.load(shard, mmap_mode="r")))
        adapted.append(target)
    before = evaluate_embeddings(tested.rows, tested.catalog, protocol="ilias", distractors=distractors)
    after = evaluate_embeddings(
        run.head.embed(tested.rows), tested.catalog, protocol="ilias", distractors=adapted
    )
    rich.print("before", before, "after", after)


if __name__ == "__main__":
    run_script(main)
