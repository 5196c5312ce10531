"""Is a head better than the frozen backbone: chosen on validation, said of the test, with what to do next."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from samething.arrays import Int
from samething.errors import InputError
from samething.evaluation import MEAN, Comparison
from samething.evaluation.protocols import protocol_of
from samething.evaluation.runs import OpenedRuns
from samething.features import FeatureSet
from samething.files import read_json, write_json
from samething.heads import Head
from samething.pages import lines_url
from samething.statistics import PairedDifference
from samething.study.contest import Questions, baseline_head, trained_head
from samething.training.run import Run
from samething.training.validation import kept_embeddings

Kept: TypeAlias = Literal["head", "backbone", "principal components"]
"""What a model is made of."""

SHARES: Final = (1 / 8, 1 / 4, 1 / 2)
"""Of the labelled instances of each domain, besides all of them."""

Point: TypeAlias = tuple[float, float, float, float]
"""Labelled instances, mMP@5 as the mean over domains, and both ends of its 95 % interval."""

RISE: Final = 0.01
"""mMP@5 that twice the labels must bring for more of them to be worth while."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of labels."""

    kept: Kept
    """What is worth exporting, by the validation images; by the test's where there are none of those."""
    sentences: tuple[str, ...]
    """Whether the head is better, by how much, where, with how many labels."""
    advice: tuple[str, ...]
    """What to do next."""
    comparison: Comparison | None
    """None where no images were set aside for the test."""
    report: Path | None = None


def verdict_on(run: Run, features: FeatureSet, folder: Path) -> Verdict:
    """Measure a run against its backbone and write ``evaluation.json``, ``report.html`` and the curve.

    Args:
        run: the finished run.
        features: what it was trained on.
        folder: where the files go; a curve of the same run is read from there.
    """
    try:
        opened = OpenedRuns.open([run.folder])
    except InputError:
        few = (
            "Whether the head is better cannot be told: no images were set aside for the test. So the "
            "backbone's feature as it is is exported."
        )
        more = "Label more things, with two images each or more: a fifth of them is then kept for the test."
        return Verdict("backbone", (few,), (more,), None)
    comparison = opened.compare(protocol_of("default"))
    points = _curve(run, features, folder / "learning_curve.json")
    name = opened.names[0]
    ahead = {
        domain: comparison.difference(name, "backbone", domain=domain)
        for domain in (MEAN, *comparison.first.domains)
    }
    kept = _kept(run, features, ahead[MEAN])
    sentences = sentences_of(kept, ahead, points)
    advice = advice_of(ahead, points, str(features.backbone["name"]))
    write_json(folder / "evaluation.json", comparison.to_json())
    backbone = comparison.shown_estimates["backbone"][MEAN]["mmp@5"]
    report = opened.write_report(
        folder / "report.html",
        comparison,
        opening={"sentences": sentences, "advice": advice, "curve": _drawing(points, tuple(backbone))},
    )
    return Verdict(kept, sentences, advice, comparison, report)


def _kept(run: Run, features: FeatureSet, on_test: PairedDifference) -> Kept:
    """The head if it is surely ahead of the backbone, else what of the other two is shorter and no worse."""
    try:
        questions = Questions.of(features, "val")
    except InputError:
        return "head" if on_test.low > 0 else "backbone"
    val, training = questions.chosen, np.flatnonzero(features.catalog.has_role("train"))
    rows = np.asarray(features.rows[val])
    backbone = questions.scores(rows.astype(np.float32))
    kept = kept_embeddings(run.head, features.rows, val, training, run.config.codes)
    if questions.difference(questions.scores(kept), backbone).low > 0:
        return "head"
    dim = run.head.embedding_dim
    if dim >= rows.shape[1] or dim > len(training):  # they would be no shorter, or not determined
        return "backbone"
    components = baseline_head(features, "pca", dim)
    if questions.difference(questions.scores(components.embed(rows)), backbone).high >= 0:
        return "principal components"
    return "backbone"


def sentences_of(
    kept: Kept, ahead: Mapping[str, PairedDifference], points: Sequence[Point]
) -> tuple[str, ...]:
    """The answer in sentences: overall, by domain, by labels, and what is exported."""
    mean = ahead[MEAN]
    if mean.low > 0:
        answer = "The head is better than the frozen backbone"
    elif mean.high < 0:
        answer = "The head is worse than the frozen backbone"
    else:
        answer = "The head is neither surely better nor surely worse than the frozen backbone"
    sentences = [f"{answer}: {_points(mean)} of mMP@5, on {mean.num_queries:,} queries of unseen instances."]
    if len(ahead) > 2:
        groups: dict[str, list[str]] = {"Better": [], "Worse": [], "Not told apart": []}
        for domain, found in ahead.items():
            if domain != MEAN:
                place = "Better" if found.low > 0 else "Worse" if found.high < 0 else "Not told apart"
                groups[place].append(f"{domain} {_points(found)}")
        sentences += [f"{name}: {', '.join(domains)}." for name, domains in groups.items() if domains]
    reached = [f"{100 * value:.1f} with {number:,.0f}" for number, value, _, _ in points]
    sentences.append(f"mMP@5 by labelled instances: {', '.join(reached)}.")
    if kept != "head":
        rather = (
            "the backbone's feature as it is" if kept == "backbone" else f"{kept} of the backbone's feature"
        )
        sentences.append(f"On the images that decide the head is not surely better, so {rather} is exported.")
    return tuple(sentences)


def advice_of(
    ahead: Mapping[str, PairedDifference], points: Sequence[Point], backbone: str
) -> tuple[str, ...]:
    """What to do next, the most useful first."""
    advice = []
    if len(points) > 1:
        gain = points[-1][1] - points[-2][1]
        if gain > RISE:
            advice.append(
                f"Label more instances: from {points[-2][0]:,.0f} to {points[-1][0]:,.0f} brought "
                f"{100 * gain:+.1f} points, and the curve still rises."
            )
        else:
            advice.append(
                f"More labels of this kind change little (the last {points[-1][0] - points[-2][0]:,.0f} "
                f"instances: {100 * gain:+.1f} points). Try a stronger backbone than {backbone}: "
                "samething backbones lists them, --backbone takes one."
            )
    if worse := [domain for domain, found in ahead.items() if domain != MEAN and found.high < 0]:
        advice.append(f"Label more of {', '.join(worse)}, where the head is worse, or search it without one.")
    wide = [domain for domain, found in ahead.items() if domain != MEAN and found.num_queries < 50]
    if wide:
        advice.append(f"Few queries in {', '.join(wide)}: with fewer than 50 little can be told.")
    return tuple(advice)


def _points(found: PairedDifference) -> str:
    return f"{100 * found.difference:+.1f} points (95 % {100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _curve(run: Run, features: FeatureSet, path: Path) -> list[Point]:
    """The learning curve of a run, from an earlier call where it is the same."""
    if path.exists() and (known := read_json(path))["run"] == run.manifest.fingerprint:
        return [tuple(point) for point in known["points"]]
    points = learning_curve(run, features)
    write_json(path, {"run": run.manifest.fingerprint, "points": [list(point) for point in points]})
    return points


def learning_curve(run: Run, features: FeatureSet) -> list[Point]:
    """The head of a run and heads trained as it on an eighth, a quarter and half of its instances.

    The parts are nested, and drawn within each domain. Parts of fewer than two instances are left out.
    """
    questions = Questions.of(features, "test")
    everything = np.flatnonzero(features.catalog.has_role("train"))
    classes = features.catalog.class_ids()[everything]
    enough = np.bincount(classes)[classes] > 1
    rows, classes = everything[enough], classes[enough]
    domains = features.catalog.strings("domain").astype(str)[rows]
    generator = np.random.default_rng(0)
    orders = [generator.permutation(np.unique(classes[domains == name])) for name in np.unique(domains)]

    def point(number: int, head: Head, trained_on: Int[np.ndarray, " _"]) -> Point:
        # kept in the bytes that the run is kept in
        kept = kept_embeddings(head, features.rows, questions.chosen, trained_on, run.config.codes)
        return (float(number), *questions.estimate(questions.scores(kept)))

    points: list[Point] = []
    before = 1
    with tempfile.TemporaryDirectory() as work:
        for share in SHARES:
            chosen = np.concatenate([order[: round(share * len(order))] for order in orders])
            if len(chosen) > before:
                before, part = len(chosen), rows[np.isin(classes, chosen)]
                head = trained_head(features, part, run.config, Path(work) / str(before))
                points.append(point(before, head, part))
    points.append(point(len(np.unique(classes)), run.head, everything))
    return points


def _drawing(points: Sequence[Point], backbone: tuple[float, ...]) -> str:
    ends = (points[0][0], points[-1][0])
    lines: dict[str, Any] = {
        "head": list(points),
        "frozen backbone": [(end, *backbone) for end in dict.fromkeys(ends)],
    }
    return lines_url(lines, x_label="labelled instances trained on", y_label="mMP@5 %")
