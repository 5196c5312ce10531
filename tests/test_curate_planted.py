"""Planted copies, leaks and wrong labels in the demo's images are found; thresholds are from other domains.

The thresholds are chosen on two domains (emoji and object) and judged on the other three (icon, logo, photo).
Run with ``-s`` to see the numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest

from planted import KINDS, plant_copies, plant_noise, rates
from samething.catalog import Catalog
from samething.curate import curate
from samething.curate.noise import agreement
from samething.features import FeatureSet, features
from samething_demo import build_demo_images

CHOSEN_ON = ("emoji", "object")
JUDGED_ON = ("icon", "logo", "photo")
GRID = [(bits, closeness) for bits in (6, 8, 10, 12) for closeness in (0.9, 0.93, 0.95, 0.97)]


def pairs_found(planted, folder: Path, **options) -> list[dict]:
    """Pairs that curation finds, with the least strict thresholds of the grid unless others are given."""
    planted.catalog.write(folder / "planted.parquet")
    curate(
        [folder / "planted.parquet"], output=folder / "curated.parquet", hashes=folder / "hashes.sqlite",
        mirrored=True, **{"bits": 12, "closeness": 0.9, **options},
    )  # fmt: skip
    return pyarrow.csv.read_csv(folder / "curated.parquet.pairs.csv").to_pylist()


def judged(planted, pairs: list[dict], *, bits: int, closeness: float) -> tuple[set, set]:
    """Planted pairs, and pairs found with at least one planted copy or none, under some thresholds."""
    root = str(planted.catalog.root)
    found = {
        frozenset((root + pair["first_image"].lstrip("/"), root + pair["second_image"].lstrip("/")))
        for pair in pairs
        if pair["closeness"] >= closeness and (pair["method"] != "perceptual" or pair["score"] <= bits)
    }
    true = {frozenset((copy, original)) for copy, (original, _) in planted.copies.items()}
    # two copies of one original are one image, too
    originals = {copy: original for copy, (original, _) in planted.copies.items()}
    same = {pair for pair in found if len({originals.get(image, image) for image in pair}) == 1}
    return true, found - (same - true)


def best_thresholds(planted, pairs: list[dict]) -> tuple[int, float]:
    def f1(thresholds: tuple[int, float]) -> float:
        recall, precision = rates(
            *reversed(judged(planted, pairs, bits=thresholds[0], closeness=thresholds[1]))
        )
        return 2 * recall * precision / max(1e-9, recall + precision)

    return max(GRID, key=f1)


def report(title: str, planted, pairs: list[dict], *, bits: int, closeness: float) -> tuple[float, float]:
    true, found = judged(planted, pairs, bits=bits, closeness=closeness)
    recall, precision = rates(found, true)
    print(f"\n{title}, {bits} bits, closeness {closeness}: recall {recall:.3f}, precision {precision:.3f}")
    for kind in KINDS:
        own = {pair for pair in true if any(planted.copies.get(image, ("", ""))[1] == kind for image in pair)}
        print(f"  {kind}: {len(own & found)} of {len(own)}")
    return recall, precision


@pytest.fixture(scope="module")
def few_images(tmp_path_factory):
    """The demo's images, few of each domain; without features."""
    return build_demo_images(tmp_path_factory.mktemp("demo"), limit_per_domain=14)


@pytest.mark.slow
def test_copies_and_leaks_in_a_few_images(few_images, tmp_path):
    chosen = plant_copies(few_images, tmp_path / "a", per_kind=6, domains=CHOSEN_ON)
    bits, closeness = best_thresholds(chosen, pairs_found(chosen, tmp_path / "a"))
    planted = plant_copies(few_images, tmp_path / "b", per_kind=10, domains=JUDGED_ON)
    pairs = pairs_found(planted, tmp_path / "b", bits=bits, closeness=closeness)
    recall, precision = report("perceptual", planted, pairs, bits=bits, closeness=closeness)
    assert recall >= 0.9 and precision >= 0.9
    check_leaks(planted, tmp_path / "b", least=0.9)


def check_leaks(planted, folder: Path, *, least: float) -> None:
    dropped = pyarrow.csv.read_csv(folder / "curated.parquet.dropped.csv").to_pylist()
    leaks = {"/" + row["image"].lstrip("/") for row in dropped if row["rule"] == "leak"}
    recall, precision = rates(leaks, set(planted.leaks))
    print(f"leaks removed: recall {recall:.3f}, precision {precision:.3f}")
    assert recall >= least and precision >= least


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """All of the demo's images, and their features."""
    folder = tmp_path_factory.mktemp("whole demo")
    build_demo_images(folder / "images")
    catalog = folder / "images" / "catalog.parquet"
    features(catalog, output=folder / "features")
    return folder


def described(planted, demo: Path, folder: Path) -> tuple[Path, ...]:
    """Features of the originals, and of the copies."""
    names = np.asarray(
        [f"/{image.lstrip('/')}" in planted.copies for image in planted.catalog.strings("image")]
    )
    planted.catalog.take(names).write(folder / "copies.parquet")
    features(folder / "copies.parquet", output=folder / "features")
    return (demo / "features", folder / "features")


@pytest.mark.slow
def test_copies_and_leaks_in_all_images(demo, tmp_path):
    images = Catalog.read(demo / "images" / "catalog.parquet")
    chosen = plant_copies(images, tmp_path / "a", per_kind=60, domains=CHOSEN_ON)
    judge = plant_copies(images, tmp_path / "b", per_kind=60, domains=JUDGED_ON)
    for method in ("perceptual", "embedding"):
        options = {"duplicates": method}
        if method == "embedding":
            options["features"] = described(chosen, demo, tmp_path / "a")
        bits, closeness = best_thresholds(chosen, pairs_found(chosen, tmp_path / "a", **options))
        if method == "embedding":
            options["features"] = described(judge, demo, tmp_path / "b")
        pairs = pairs_found(judge, tmp_path / "b", bits=bits, closeness=closeness, **options)
        recall, precision = report(method, judge, pairs, bits=bits, closeness=closeness)
        assert recall >= 0.95 and precision >= 0.95
        check_leaks(judge, tmp_path / "b", least=0.95)


@pytest.mark.slow
def test_wrong_labels_in_all_images(demo, tmp_path):
    described = FeatureSet.open(demo / "features")
    scores = {}
    for part, domains in (("chosen", CHOSEN_ON), ("judged", JUDGED_ON)):
        catalog, wrong = plant_noise(described.catalog, share=0.08, domains=domains)
        catalog.write(tmp_path / f"{part}.parquet")
        scores[part] = (catalog, wrong)

    def found_with(part: str, threshold: float) -> set[str]:
        result = curate(
            [tmp_path / f"{part}.parquet"], output=tmp_path / f"{part} out.parquet", duplicates="none",
            noise="agreement", features=(demo / "features",), agreement=threshold,
        )  # fmt: skip
        table = result.dropped_table.to_pylist()
        return {row["image"] for row in table if row["rule"] == "noise"}

    def rates_with(part: str, threshold: float) -> tuple[float, float]:
        catalog, wrong = scores[part]
        return rates(found_with(part, threshold), set(catalog.strings("image")[wrong]))

    def f1(threshold: float) -> float:
        recall, precision = rates_with("chosen", threshold)
        return 2 * recall * precision / max(1e-9, recall + precision)

    threshold = max((-0.3, -0.4, -0.5, -0.6, -0.7, -0.8), key=f1)
    for domain in JUDGED_ON:
        catalog, wrong = scores["judged"]
        own = catalog.strings("domain") == domain
        images = set(catalog.strings("image")[own])
        recall, precision = rates(
            found_with("judged", threshold) & images, set(catalog.strings("image")[own & wrong])
        )
        print(f"\nagreement {threshold}, {domain}: recall {recall:.3f}, precision {precision:.3f}")
    recall, precision = rates_with("judged", threshold)
    chance = float(scores["judged"][1].mean())
    print(f"agreement {threshold}, all: recall {recall:.3f}, precision {precision:.3f}, chance {chance:.3f}")
    assert recall >= 0.6 and precision >= 0.4


def test_wrong_labels_in_clusters():
    """Without a data set: clusters with some labels exchanged, a threshold from other clusters."""

    def clusters(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(40, 32))
        classes = np.repeat(np.arange(40), 6)
        rows = centres[classes] + 0.8 * rng.normal(size=(240, 32))
        wrong = rng.random(240) < 0.08
        given = np.where(wrong, (classes + 1 + rng.integers(0, 38, 240)) % 40, classes)
        return rows.astype(np.float32), given, wrong

    rows, given, wrong = clusters(0)
    scores = agreement(rows, given, np.zeros(240, np.int64))
    grid = np.linspace(-1.5, 0.5, 41)
    f1 = [2 * np.sum(wrong & (scores < t)) / max(1, wrong.sum() + np.sum(scores < t)) for t in grid]
    threshold = grid[int(np.argmax(f1))]
    rows, given, wrong = clusters(1)
    found = agreement(rows, given, np.zeros(240, np.int64)) < threshold
    recall, precision = np.sum(found & wrong) / wrong.sum(), np.sum(found & wrong) / found.sum()
    print(f"\nclusters: recall {recall:.3f}, precision {precision:.3f}")
    assert recall >= 0.85 and precision >= 0.85
