"""Every loss on one feature folder, several seeds each, its own default scale and margin.

    python recipes/loss_comparison.py features --output losses
    python recipes/loss_comparison.py --demo

Needs features of a catalog with train and test images of different instances; with --demo: those that
samething demo has made. Trains the demo recipe with each loss and measures the test instances, which no head
has seen. The interval is a 95 % bootstrap over queries for the mean of the seeds; the spread over seeds
stands beside it. This is not a search: each loss has the defaults of its paper, so the table says how they do
out of the box.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import rich

from samething.cli import run_script
from samething.demo import demo_features
from samething.errors import InputError
from samething.evaluation import EvaluationResult, evaluate_embeddings
from samething.features import FeatureSet
from samething.files import write_text
from samething.statistics import domain_mean, domain_mean_interval
from samething.study.questions import Questions
from samething.training import RECIPES
from samething.training.loop import run_training

LOSSES: dict[str, dict[str, Any]] = {
    "NormFace": {"loss": "normface"},
    "CosFace": {"loss": "cosface"},
    "ArcFace": {"loss": "arcface"},
    "Sub-Center ArcFace, k = 2": {"loss": "arcface", "num_centers": 2},
    "Sub-Center ArcFace, k = 3": {"loss": "arcface", "num_centers": 3},
    "ArcFace, dynamic margin": {"loss": "dynm-arcface"},
    "ArcFace, dynamic margin n^-1/4": {
        "loss": "dynm-arcface",
        "loss_options": {"schedule": "inverse_root"},
    },
    "Li-ArcFace": {"loss": "liarcface"},
    "AdaCos, fixed": {"loss": "adacos"},
    "AdaCos, dynamic": {"loss": "adacos", "loss_options": {"dynamic": True}},
    "CurricularFace": {"loss": "curricularface"},
    "AdaFace": {"loss": "adaface"},
}
METRICS = ("mmp@5", "r@1", "map")


def main(
    features: Path | None = None,
    *,
    output: Path = Path("losses"),
    num_seeds: int = 3,
    epochs: float = 40.0,
    demo: bool = False,
    demo_folder: Path = Path("demo"),
) -> None:
    """Train and measure.

    Args:
        features: the feature folder.
        output: folder for table.md and table.json.
        num_seeds: runs per loss.
        epochs: passes over the training images.
        demo: use the demo's features.
        demo_folder: where samething demo has written.
    """
    folder = demo_features(demo_folder) if demo else features
    if folder is None:
        raise InputError(
            "no features",
            expected="a feature folder whose catalog has train and test images",
            next_step="make one with samething features CATALOG, or give --demo",
        )
    found = FeatureSet.open(folder)
    questions = Questions.of(found, "test")
    output.mkdir(parents=True, exist_ok=True)
    table = []
    for name, options in LOSSES.items():
        results, seconds = [], []
        for seed in range(num_seeds):
            config = dataclasses.replace(
                RECIPES["demo"](), **{"num_centers": 1, **options}, epochs=epochs, seed=seed
            )
            shutil.rmtree(output / "run", ignore_errors=True)
            started = time.process_time()
            head = run_training(found, config, output / "run", resume=True).head
            seconds.append(time.process_time() - started)
            results.append(
                evaluate_embeddings(
                    head.embed(questions.rows), questions.catalog, precision="float32", num_resamples=2
                )
            )
        table.append({"loss": name, **_numbers(results), "seconds": float(np.median(seconds))})
        rich.print(table[-1])
    write_text(output / "table.json", json.dumps(table, indent=2))
    markdown = _markdown(table, num_seeds)
    write_text(output / "table.md", markdown)
    print(markdown)


def _numbers(results: list[EvaluationResult]) -> dict[str, list[float]]:
    """Mean over the seeds, its interval over queries, and the standard deviation over the seeds."""
    numbers = {}
    for metric in METRICS:
        values = np.mean([result.values(metric) for result in results], axis=0)
        domains = results[0].query_domains
        spread = np.std([result.value(metric) for result in results], ddof=1) if len(results) > 1 else 0.0
        numbers[metric] = [
            domain_mean(values, domains),
            *domain_mean_interval(values, domains),
            float(spread),
        ]
    return numbers


def _markdown(table: list[dict[str, Any]], num_seeds: int) -> str:
    lines = ["| loss | mMP@5 % | R@1 % | mAP % | CPU s |", "| --- | --- | --- | --- | --- |"]
    for row in table:
        cells = [
            f"{100 * value:.1f} ({100 * low:.1f}–{100 * high:.1f}) ±{100 * spread:.1f}"
            for value, low, high, spread in (row[metric] for metric in METRICS)
        ]
        lines.append(f"| {row['loss']} | {' | '.join(cells)} | {row['seconds']:.0f} |")
    note = (
        f"Mean of {num_seeds} seeds, one index over all domains, mean of the domains; in brackets the 95 % "
    )
    return (
        "\n".join(lines)
        + f"\n\n{note}bootstrap interval over queries, ± the standard deviation over seeds.\n"
    )


if __name__ == "__main__":
    run_script(main)
