"""Several backbones on one catalog: as they are, made short, and with a linear probe, against their size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from samething.errors import InputError
from samething.features import FeatureSet
from samething.pages import Table, as_drawn, drawing_url, new_axes
from samething.progress import progress_bar
from samething.statistics import percent
from samething.study.contest import (
    Contender,
    Contest,
    Questions,
    baseline_head,
    short_training,
    trained_head,
)
from samething.study.study_folder import StudyFolder
from samething.study.study_report import (
    StudyResult,
    conclude,
    domain_table,
    queries_said,
    said_of_others,
    shown,
)

if TYPE_CHECKING:
    from samething.heads import Head
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
        "test": "scores of every seed",
        "features": {name: found.manifest.fingerprint for name, found in feature_sets.items()},
        "dim": dim,
        "seeds": seeds,
        "config": config.to_json(),
    }
    contenders = [
        _contender(name, found, way, seeds, config) for name, found in feature_sets.items() for way in WAYS
    ]
    first = next(iter(feature_sets.values()))
    with StudyFolder.claimed(Path(output), made_from) as folder:
        contest = Contest(folder, Questions.of(first, "val"), Questions.of(first, "test"))
        with progress_bar("validation") as bar:
            task = bar.add_task("embeddings", total=len(contenders))
            on_val = {}
            for one in contenders:
                on_val[one.name] = contest.on_validation(one)
                bar.advance(task)

        def probed(name: str) -> float:
            return contest.val.mean(on_val[f"probe {name}"].mean(axis=0))

        winner = max(feature_sets, key=probed)
        chosen = {"backbone": winner, "way": "probe", "dim": dim, "config": config.to_json()}
        on_test = contest.on_test(contenders, chosen)
        return _concluded(contest, feature_sets, on_val, on_test, chosen)


def _contender(name: str, found: FeatureSet, way: str, num_seeds: int, config: TrainConfig) -> Contender:
    """A backbone asked in one way; only the linear probe has several seeds."""

    def head(seed: int, work: Path) -> Head | None:
        if way == "full":
            return None
        if way == "probe":
            train = np.flatnonzero(found.catalog.has_role("train"))
            return trained_head(found, train, dataclasses.replace(config, seed=config.seed + seed), work)
        return baseline_head(found, "average" if way == "average" else "pca", config.embedding_dim)

    seeds = range(num_seeds if way == "probe" else 1)
    tried = {"backbone": name, "way": way}
    return Contender(name=f"{way} {name}", tried=tried, features=found, head=head, seeds=seeds)


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


def _concluded(
    contest: Contest,
    feature_sets: Mapping[str, FeatureSet],
    on_val: Mapping[str, np.ndarray],
    on_test: Mapping[str, np.ndarray],
    chosen: Mapping[str, Any],
) -> StudyResult:
    test, dim, best = contest.test, chosen["dim"], chosen["backbone"]
    rows: list[dict[str, Any]] = []
    for name, found in feature_sets.items():
        content = found.manifest.content
        numbers = (content.get("num_backbone_parameters"), content.get("images_per_second"))
        parameters, rate = (math.nan if number is None else float(number) for number in numbers)
        rows += [
            {
                "backbone": name, "way": way, "width": found.rows.shape[1] if way == "full" else dim,
                "parameters": parameters, "images_per_second": rate,
                **contest.val.row(on_val[f"{way} {name}"]),
                **test.row(on_test[f"{way} {name}"], on_test[f"full {name}"]),
            }
            for way in WAYS
        ]  # fmt: skip
    probe = next(row for row in rows if row["backbone"] == best and row["way"] == "probe")
    means = {name: values.mean(axis=0) for name, values in on_test.items()}
    ours = means[f"probe {best}"]
    others = {
        name: test.difference(means[f"probe {name}"], ours).high for name in feature_sets if name != best
    }
    over_pca = test.difference(ours, means[f"pca {best}"]).estimate
    findings = [
        f"Best linear probe on validation: {best}; on test {shown(probe, 'test')} % mMP@5 at {dim} numbers, "
        f"{percent(*over_pca, sign=True)} points against its PCA at the same size.",
        said_of_others(others),
    ]
    if any(math.isnan(row["images_per_second"]) for row in rows):
        findings.append("Images per second are not recorded in these feature folders: shown as –.")
    named = [{**row, "way": WAYS[row["way"]]} for row in rows]
    facts = {
        "backbones": ", ".join(feature_sets),
        "queries": queries_said(contest),
        "domains": ", ".join(test.domains),
    }
    tables = [_table(named, best=rows.index(probe)), domain_table(named, test, ["backbone", "way"])]
    return conclude(contest.folder, "Backbones", facts, findings, tables, rows, _figures(rows), chosen=chosen)


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
        "NormFace on the training images, mean over seeds ± their standard deviation. "
        "Chosen on validation, looked at once on test.",
        featured=best,
    )  # fmt: skip


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Score against parameters and against speed, where they are known; the front by validation scores."""
    figures = {}
    for title, key, label, sign in (
        ("Score against size", "parameters", "parameters of the backbone", 1),
        ("Score against speed", "images_per_second", "images per second; area: parameters", -1),
    ):
        if known := [row for row in rows if not math.isnan(row[key])]:
            front = pareto_front([sign * row[key] for row in known], [row["val"] for row in known])
            figures[title] = _bubbles(known, front, key, label)
    return figures


def _bubbles(rows: Sequence[Mapping[str, Any]], front: Sequence[bool], key: str, label: str) -> str:
    """Test scores, x logarithmic: a number per backbone, a colour per way, the front filled and joined."""
    from matplotlib.lines import Line2D

    figure, axes = new_axes(10.0, 4.6, xlabel=label, ylabel="test mMP@5 %")
    numbers = {name: str(place) for place, name in enumerate(dict.fromkeys(r["backbone"] for r in rows), 1)}
    colours = {way: f"C{place}" for place, way in enumerate(dict.fromkeys(row["way"] for row in rows))}
    areas = [1.0 if math.isnan(row["parameters"]) else row["parameters"] for row in rows]
    joined = []
    for row, area, is_on_front in zip(rows, areas, front, strict=True):
        colour, place = colours[row["way"]], (row[key], 100 * row["test"])
        fill, ink, order = (colour, "white", 4) if is_on_front else ("white", "black", 2)
        size = 60 + 240 * area / max(areas)
        axes.scatter(*place, s=size, facecolor=fill, edgecolor=colour, zorder=order)
        name = numbers[row["backbone"]]
        axes.annotate(name, place, ha="center", va="center", fontsize=8, zorder=order + 1, color=ink)
        joined += [place] if is_on_front else []
    axes.plot(*zip(*sorted(joined), strict=True), "k", linewidth=0.8, zorder=1)
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.12)
    handles = [Line2D([], [], ls="", marker="o", color=colour) for colour in colours.values()]
    handles += [Line2D([], [], ls="", marker=f"${number}$", color="black") for number in numbers.values()]
    axes.legend(
        handles, [as_drawn(name) for name in (*map(WAYS.get, colours), *numbers)], loc="center left",
        bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False,
    )  # fmt: skip
    return drawing_url(figure)


def pareto_front(costs: Sequence[int | float], scores: Sequence[int | float]) -> list[bool]:
    """Points that no other one beats: none costs less and scores as much, or costs as much and scores more.

    >>> pareto_front([1, 2, 3, 3], [0.5, 0.4, 0.6, 0.7])
    [True, False, False, True]
    """
    pairs = list(zip(costs, scores, strict=True))
    return [
        not any(
            other_cost <= cost and other_score >= score and (other_cost, other_score) != (cost, score)
            for other_cost, other_score in pairs
        )
        for cost, score in pairs
    ]
