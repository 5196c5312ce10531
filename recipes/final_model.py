"""The paper's final model: SigLIP So400m/384, M4D-35k, Sub-Center ArcFace with k = 3, 64 numbers.

    python recipes/final_model.py --data-root /data --output final
    python recipes/final_model.py --demo

Needs M4D-35k under the data root (samething datasets says where it is from and in which layout) and the
weights of siglip_so400m_384. The paper trained on all of it and measured on the challenge's server; so does
this, and writes the model folder. With --demo: the paper's recipe on the demo's features and its test.
"""

from __future__ import annotations

from pathlib import Path

import rich

from samething.cli import run_script
from samething.datasets import catalog
from samething.demo import demo_features
from samething.errors import InputError
from samething.evaluation import evaluate
from samething.export import export
from samething.features import features
from samething.training import train

BACKBONE = "siglip_so400m_384"


def main(
    *,
    data_root: Path | None = None,
    output: Path = Path("final"),
    backbone: str = BACKBONE,
    demo: bool = False,
    demo_folder: Path = Path("demo"),
) -> None:
    """Catalog, features, head, model.

    Args:
        data_root: folder that holds M4D-35k.
        output: folder for all artefacts.
        backbone: another backbone than the paper's.
        demo: use the demo's features instead.
        demo_folder: where samething demo has written.
    """
    output.mkdir(parents=True, exist_ok=True)
    if demo:
        folder = demo_features(demo_folder)
    elif data_root is None:
        raise InputError(
            "no --data-root",
            expected="the folder that holds M4D-35k",
            next_step="see samething datasets for its layout and where to get it, or give --demo",
        )
    else:
        listed = output / "m4d-35k.parquet"
        catalog(dataset="m4d_35k", data_root=data_root, val=0.0, test=0.0, output=listed)
        folder = output / "features"
        features(listed, backbone=backbone, output=folder)
    rich.print(train(folder, output=output / "run", recipe="paper"))
    if demo:  # the test of the paper is not public
        rich.print(evaluate(output / "run"))
    else:
        rich.print(export(output / "run", output=output / "model"))


if __name__ == "__main__":
    run_script(main)
