"""Several backbones on one catalog: as they are, made short, and with a linear probe, against their size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samething.arrays import PerQuery
from samething.errors import InputError
from samething.features import FeatureSet
from samething.pages import Table
from samething.progress import progress_bar
from samething.study.questions import (
    Questions,
    baseline_head,
    means_of_seeds,
    percent,
    short_training,
    trained_head,
)
from samething.study.study_folder import StudyFolder
from samething.study.study_report import (
    Point,
    StudyResult,
    bubble_figure,
    conclude,
    domain_table,
    pareto_front,
    queries_said,
    said_of_others,
    shown,
)

if TYPE_CHECKING:
    from samething.training import TrainConfig

WAYS: Final[Mapping[str, str]] = {
    "full": "full width",
    "average": "average pool",
    "pca": "PCA",
    "probe": "linear probe",
}
"""How a backbone is asked, in the order of the table."""


def backbones(
    *features: Path,
    output: Path = Path("study-backbones"),
    dim: int = 64,
    seeds: int = 3,
    epochs: float = 20.0,
) -> StudyResult:
    """Compare backbones on one catalog: full width, average pool, PCA, linear probe; against size and speed.

    The linear probe is a linear map trained with NormFace (no margin). Which backbone is best is decided on
    validation instances; the test instances are looked at once.

    Args:
        features: feature folders of one catalog, one per backbone.
        output: the study folder; a killed study goes on there.
        dim: numbers in the short embeddings.
        seeds: trainings of each linear probe.
        epochs: passes over the training images.

    Raises:
        InputError: folders of different catalogs, no validation or test images, instances in both.
        FingerprintError: the folder is of another study or of other features.
    """
    feature_sets = _of_one_catalog([Path(folder) for folder in features])
    if seeds < 1 or not 1 <= dim <= min(found.rows.shape[1] for found in feature_sets.values()):
        raise InputError(
            f"--dim {dim} --seeds {seeds}",
            expected="a dimension up to the smallest width of the features, and at least one seed",
            next_step="change --dim or --seeds",
        )
    config = short_training(epochs, dim, loss="normface", num_centers=1)
    made_from = {
        "study": "backbones",
        "features": {name: found.manifest.fingerprint for name, found in feature_sets.items()},
        "dim": dim,
        "seeds": seeds,
        "config": config.to_json(),
    }
    with StudyFolder.claimed(Path(output), made_from) as folder:
        on_val: dict[tuple[str, str], PerQuery] = {}
        with progress_bar("backbones") as bar:
            for name in bar.track(feature_sets, description="validation"):
                on_val |= _asked(folder, name, feature_sets[name], "val", seeds, config)
        first = next(iter(feature_sets.values()))
        val, test = Questions.of(first, "val"), Questions.of(first, "test")
        winner = max(feature_sets, key=lambda name: val.mean(on_val[name, "probe"]))
        chosen = {"backbone": winner, "way": "probe", "dim": dim, "config": config.to_json()}

        def measure() -> dict[str, PerQuery]:
            measured = {}
            for name, found in feature_sets.items():
                for (_, way), values in _asked(folder, name, found, "test", seeds, config).items():
                    measured[f"{way} {name}"] = values
            return measured

        seen = folder.tested(chosen, measure)
        on_test = {(name, way): seen[f"{way} {name}"] for name in feature_sets for way in WAYS}
        return _concluded(folder, feature_sets, (val, test), (on_val, on_test), chosen)


def _of_one_catalog(folders: Sequence[Path]) -> dict[str, FeatureSet]:
    """The feature folders by a name of their own."""
    if not folders:
        raise InputError(
            "no feature folder", expected="one or more", next_step="samething study backbones FEATURES …"
        )
    opened = [FeatureSet.open(folder) for folder in folders]
    if len({found.manifest.fingerprint for found in opened}) < len(opened):
        raise InputError(
            f"the same features twice among {', '.join(map(str, folders))}",
            expected="each once",
            next_step="leave the second away",
        )
    names = [str(found.backbone["name"]) for found in opened]
    named: dict[str, FeatureSet] = {}
    for found, name in zip(opened, names, strict=True):
        if found.catalog.fingerprint != opened[0].catalog.fingerprint:
            raise InputError(
                f"{found.folder} and {opened[0].folder} are features of different catalogs",
                expected="features of one catalog, so that all backbones are asked the same questions",
                next_step="make them from one catalog; images that one of them could not read count too",
            )
        options = found.backbone.get("options", {}).items()
        other = [f"{option} {value}" for option, value in options if option != "sizes"]
        # the same one used otherwise is told by its size and options
        way = ", ".join([f"at {found.backbone['preprocessing']['size']}", *other])
        full = name if names.count(name) == 1 else f"{name} {way}"
        named[full if full not in named else f"{full} in {found.folder.name}"] = found
    return named


def _asked(
    folder: StudyFolder,
    name: str,
    found: FeatureSet,
    part: str,
    num_seeds: int,
    config: TrainConfig,
) -> dict[tuple[str, str], PerQuery]:
    """Scores of one backbone in all ways. Those of validation are kept in the log, those of test are not:

    the one look at the test is a line of its own.
    """
    questions = Questions.of(found, "val" if part == "val" else "test")
    train = np.flatnonzero(found.catalog.has_role("train"))

    def embedded(way: str, seed: int, work: Path) -> np.ndarray:
        if way == "full":
            return questions.rows
        if way == "probe":
            head = trained_head(found, train, dataclasses.replace(config, seed=config.seed + seed), work)
        else:
            head = baseline_head(found, "average" if way == "average" else "pca", config.embedding_dim)
        return head.embed(questions.rows)

    def scored(way: str, seed: int) -> PerQuery:
        if part == "val":
            return folder.scores(
                {"part": "val", "backbone": name, "way": way, "seed": seed},
                lambda work: questions.scores(embedded(way, seed, work)),
            )
        return questions.scores(embedded(way, seed, folder.folder / "runs" / f"test-{name}-{seed}"))

    return {
        (name, way): means_of_seeds(
            {seed: scored(way, seed) for seed in range(num_seeds if way == "probe" else 1)}
        )[0]
        for way in WAYS
    }


def _concluded(
    folder: StudyFolder,
    feature_sets: Mapping[str, FeatureSet],
    parts: tuple[Questions, Questions],
    scores: tuple[Mapping[tuple[str, str], PerQuery], Mapping[tuple[str, str], PerQuery]],
    chosen: Mapping[str, Any],
) -> StudyResult:
    (val, test), (on_val, on_test) = parts, scores
    dim, best = chosen["dim"], chosen["backbone"]
    rows: list[dict[str, Any]] = []
    for name, found in feature_sets.items():
        content = found.manifest.content
        numbers = (content.get("num_backbone_parameters"), content.get("images_per_second"))
        parameters, rate = (math.nan if number is None else float(number) for number in numbers)
        rows += [
            {
                "backbone": name, "way": way, "width": found.rows.shape[1] if way == "full" else dim,
                "parameters": parameters, "images_per_second": rate,
                **val.row(on_val[name, way]), **test.row(on_test[name, way], on_test[name, "full"]),
            }
            for way in WAYS
        ]  # fmt: skip
    probe = next(row for row in rows if row["backbone"] == best and row["way"] == "probe")
    over_pca = test.difference(on_test[best, "probe"], on_test[best, "pca"])
    probes = {name: on_test[name, "probe"] for name in feature_sets}
    others = {name: test.difference(probes[name], probes[best]).high for name in probes if name != best}
    findings = [
        f"Best linear probe on validation: {best}; on test {shown(probe, 'test')} % mMP@5 at {dim} numbers, "
        f"{percent(over_pca.difference, (over_pca.low, over_pca.high), sign=True)} points against its PCA at "
        "the same size.",
        said_of_others(others),
    ]
    if any(math.isnan(row["images_per_second"]) for row in rows):
        findings.append("Images per second are not recorded in these feature folders: shown as –.")
    named = [{**row, "way": WAYS[row["way"]]} for row in rows]
    result = StudyResult(
        folder=folder.folder,
        title="Backbones",
        facts={
            "backbones": ", ".join(feature_sets),
            "queries": queries_said(val, test),
            "domains": ", ".join(test.domains),
        },
        findings=findings,
        tables=[_table(named, best=rows.index(probe)), domain_table(named, test, ["backbone", "way"])],
        rows=rows,
        chosen=chosen,
        num_new=folder.num_new,
    )
    return conclude(folder, result, _figures(rows), recipe=chosen)


def _table(rows: Sequence[Mapping[str, Any]], *, best: int) -> Table:
    def number(value: float, form: str) -> str:
        return "–" if math.isnan(value) else format(value, form)

    return Table(
        "Backbones",
        ["backbone", "way", "numbers", "M parameters", "images/s", "validation mMP@5 %", "test mMP@5 %",
         "test, minus full width"],
        [
            [
                row["backbone"], row["way"], str(row["width"]), number(row["parameters"] / 1e6, ".1f"),
                number(row["images_per_second"], ".0f"), shown(row, "val"), shown(row, "test"),
                "" if row["way"] == WAYS["full"] else shown(row, "gain", sign=True),
            ]
            for row in rows
        ],
        note="In brackets 95 % bootstrap intervals over queries. Linear probe: a linear map trained with "
        "NormFace on the training images, mean over seeds. Chosen on validation, looked at once on test.",
        featured=best,
    )  # fmt: skip


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score against parameters and against speed, where they are known; the front by validation scores."""
    figures = {}
    for title, key, label, sign in (
        ("Score against size", "parameters", "parameters of the backbone", 1),
        ("Score against speed", "images_per_second", "images per second; area: parameters", -1),
    ):
        known = [row for row in rows if not math.isnan(row[key])]
        if not known:
            continue
        front = pareto_front([sign * row[key] for row in known], [row["val"] for row in known])
        areas = [1.0 if math.isnan(row["parameters"]) else row["parameters"] for row in known]
        points = [
            Point(row["backbone"], WAYS[row["way"]], row[key], row["test"], is_on_front, area)
            for row, is_on_front, area in zip(known, front, areas, strict=True)
        ]
        figures[title] = bubble_figure(points, x_label=label, y_label="test mMP@5 %")
    return figures
