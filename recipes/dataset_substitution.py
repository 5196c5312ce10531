"""The paper's choice of training data, asked on validation instances: which data sets, and in whose place?

    python recipes/dataset_substitution.py features --budget 100000 --output substitution
    python recipes/dataset_substitution.py --demo

Needs features of a catalog that joins several data sets (column dataset), with train, val and test images
of unseen instances. The paper compared mixes by their score on the challenge's test set; this does not. With
--demo: the five domains that samething demo has made, in place of data sets.
"""

from __future__ import annotations

from pathlib import Path

import rich

from samething.cli import run_script
from samething.demo import demo_features
from samething.errors import InputError
from samething.features import FeatureSet
from samething.study import datasets


def main(
    features: Path | None = None,
    *,
    output: Path = Path("substitution"),
    budget: int | None = None,
    cap: tuple[int, ...] = (0, 100),
    seeds: int = 3,
    epochs: float = 20.0,
    leave_one_domain_out: bool = False,
    demo: bool = False,
    demo_folder: Path = Path("demo"),
) -> None:
    """Choose, drop, substitute.

    Args:
        features: the feature folder.
        output: the study folder.
        budget: training images of every mix; by default half of those there are.
        cap: most images per class that are tried for each data set; 0 is none.
        seeds: trainings a mix.
        epochs: passes over a full budget.
        leave_one_domain_out: choose for domains that were not trained on.
        demo: use the demo's features, by domain and without caps.
        demo_folder: where samething demo has written.
    """
    folder = demo_features(demo_folder) if demo else features
    if folder is None:
        raise InputError(
            "no features",
            expected="a feature folder whose catalog joins several data sets",
            next_step="make one with samething features CATALOG, or give --demo",
        )
    names = set(FeatureSet.open(folder).catalog.strings("dataset"))
    if not demo and len(names) < 2:
        raise InputError(
            f"{folder} holds images of {', '.join(map(str, names))} only",
            expected="two data sets or more",
            next_step="join catalogs with samething curate A B, or see samething study datasets --by domain",
        )
    rich.print(
        datasets(
            folder,
            output=output,
            by="domain" if demo else "dataset",
            budget=budget,
            cap=(0,) if demo else cap,
            seeds=seeds,
            epochs=epochs,
            leave_one_domain_out=leave_one_domain_out,
        )
    )


if __name__ == "__main__":
    run_script(main)
