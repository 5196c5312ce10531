"""Choosing data automatically: greedy selection, marginal gains, substitutions, and one look at the test."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import cyclopts

from samething.features import FeatureSet
from samething.pages import Table, bars_url, lines_url
from samething.progress import progress_bar
from samething.statistics import Estimate, percent
from samething.study.contest import Contest, Questions, short_training
from samething.study.data_mix import Mixer, Part, Terms, mixed_rows, named
from samething.study.greedy import Step, select
from samething.study.study_folder import StudyFolder
from samething.study.study_report import StudyResult, conclude, domain_cells, shown

BUDGET_SHARES: Final = (0.25, 0.5, 1.0)
"""Parts of the budget at which the curve of score against budget is drawn."""


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found on validation images."""

    mix: tuple[Part, ...]
    steps: Sequence[Step[Part]]
    alone: Mapping[str, Estimate]
    """Score of each group alone, without a cap."""
    marginal: Mapping[str, tuple[Estimate, dict[str, float]]]
    """Gain of each group: the mix with it minus the mix without it; in all, and a domain."""
    substitutions: Sequence[tuple[Part, Part, Estimate]]
    """A part of the mix, what took its place, and the gain of that."""
    curves: Mapping[str, Sequence[tuple[float, float, float, float]]]
    """Chosen and everything: (budget, score, low, high)."""


def datasets(
    features: Path,
    *,
    output: Path = Path("study-datasets"),
    by: Literal["domain", "dataset"] = "domain",
    budget: int | None = None,
    cap: Annotated[tuple[int, ...], cyclopts.Parameter(consume_multiple=True)] = (0,),
    share: Literal["proportional", "equal", "temperature"] = "proportional",
    leave_one_domain_out: bool = False,
    seeds: int = 3,
    min_gain: float = 0.0,
    epochs: float = 20.0,
    embedding_dim: int = 64,
    seed: int = 0,
) -> StudyResult:
    """Choose the data sets to train on, on validation instances that no head has seen.

    Each mix of groups trains a head with at most the budget of images, for the same number of steps. Groups
    are added while the best one helps for certain (the 95 % interval of the paired gain lies above 0), then
    those that do not help are dropped. Written are the ranking, the gain of each group per domain,
    substitutions, score against budget, and chosen.json with chosen.parquet, the catalog to train on. At the
    end the choice is compared once, on the test instances, with taking everything at the same budget.

    Args:
        features: the feature folder; its catalog has train, val and test images.
        output: the study folder; a killed study goes on there.
        by: what a group is: a domain or a data set.
        budget: training images of a mix, at most; by default half of those there are.
        cap: most images per class that are tried for each group; several are each tried, 0 is none.
        share: how the budget is shared over domains, as in samething curate.
        leave_one_domain_out: answer the queries of each domain by heads trained without it, to choose for
            unseen domains; a domain takes a training of its own.
        seeds: trainings a mix.
        min_gain: least gain of an addition, as a share of 1 (0.005 is half a point of mMP@5).
        epochs: passes over a full budget.
        embedding_dim: numbers in an embedding.
        seed: of the draws; trainings use the numbers from it on.

    Raises:
        InputError: no validation or test images, instances in both, fewer than two groups.
        FingerprintError: the folder is of another study or of other features.
    """
    found = FeatureSet.open(Path(features))
    terms = Terms(
        by=by,
        budget=int(found.catalog.has_role("train").sum()) // 2 if budget is None else budget,
        caps=tuple(dict.fromkeys(cap)),
        share=share,
        num_seeds=seeds,
        leave_one_domain_out=leave_one_domain_out,
        seed=seed,
    )
    config = short_training(epochs, embedding_dim, num_centers=1)
    made_from = {
        "study": "datasets",
        "features": found.manifest.fingerprint,
        "terms": dataclasses.asdict(terms),
        "min_gain": min_gain,
        "config": config.to_json(),
    }
    with StudyFolder.claimed(Path(output), made_from) as folder:
        contest = Contest(folder, Questions.of(found, "val"), Questions.of(found, "test"))
        mixer = Mixer.of(contest, found, config, terms)
        with progress_bar("looks") as bar:
            findings = _found(mixer, min_gain, bar)
        return _concluded(mixer, findings)


def _found(mixer: Mixer, min_gain: float, bar: Any) -> Findings:
    """Everything that is asked on validation images, in order; what is in the log is not asked again."""
    task, val = bar.add_task("selection", total=None), mixer.contest.val

    def compare(first: Sequence[Part], second: Sequence[Part] | None) -> Estimate:
        gain = mixer.compare(first, second)
        bar.advance(task)
        return gain

    def announce(text: str) -> None:
        bar.update(task, description=text)

    candidates = [(group, cap) for group in mixer.groups for cap in mixer.terms.caps]
    mix, steps = select(
        candidates, compare, group_of=lambda part: part[0], min_gain=min_gain, announce=announce
    )
    announce("each alone")
    alone = {group: compare([(group, 0)], None) for group in mixer.groups}
    announce("marginal gains")
    marginal = {}
    inside = {group for group, _ in mix}
    for group in mixer.groups:
        with_it = mix
        if group not in inside:  # under the cap that does best beside the mix
            several = [(*mix, (group, cap)) for cap in mixer.terms.caps]
            with_it = max(several, key=lambda one: val.mean(mixer.scores(one).mean(axis=0)))
        without_it = tuple(part for part in mix if part[0] != group)
        if without_it:
            ahead = mixer.scores(with_it).mean(axis=0) - mixer.scores(without_it).mean(axis=0)
            marginal[group] = compare(with_it, without_it), val.of_domains(ahead)
        bar.advance(task)
    announce("substitutions")
    substitutions = []
    for part in mix:
        for group in mixer.groups:
            if group not in inside:
                other = (group, part[1])
                swapped = tuple(other if one == part else one for one in mix)
                substitutions.append((part, other, compare(swapped, mix)))
    announce("budgets")
    curves: dict[str, list[tuple[float, float, float, float]]] = {"chosen": [], "everything": []}
    for share in BUDGET_SHARES:
        budget = max(4, round(share * mixer.terms.budget))
        for name, one in (("chosen", mix), ("everything", mixer.everything)):
            values = mixer.scores(one, budget=budget).mean(axis=0)
            curves[name].append((float(budget), *val.estimate(values)))
            bar.advance(task)
    return Findings(mix, steps, alone, marginal, substitutions, curves)


def _concluded(mixer: Mixer, findings: Findings) -> StudyResult:
    terms, contest, catalog = mixer.terms, mixer.contest, mixer.features.catalog
    chosen = {
        "groups": [{terms.by: group, "most_images_per_class": cap or None} for group, cap in findings.mix],
        "by": terms.by,
        "budget_images": terms.budget,
    }
    mixes = {"chosen": findings.mix, "everything": mixer.everything}
    on_test = contest.on_test([mixer.contender(mix, name) for name, mix in mixes.items()], chosen)
    compared = [
        {
            "what": name, "num_images": len(mixed_rows(catalog, mix, terms)),
            **contest.val.row(mixer.scores(mix)), **contest.test.row(on_test[name], on_test["everything"]),
        }
        for name, mix in mixes.items()
    ]  # fmt: skip
    ranking = sorted(findings.marginal, key=lambda group: -findings.marginal[group][0].value)
    rows = compared + [
        {
            "what": f"marginal gain of {group}", "val": gain.value, "val_low": gain.low,
            "val_high": gain.high, **{f"val {name}": value for name, value in domains.items()},
        }
        for group, (gain, domains) in findings.marginal.items()
    ]  # fmt: skip
    facts = {
        "features": f"{mixer.features.backbone['name']}, fingerprint {mixer.features.manifest.fingerprint}",
        "groups": f"{terms.by}: {', '.join(mixer.groups)}",
        "budget": f"{terms.budget:,} of {int(catalog.has_role('train').sum()):,} training "
        f"images, shared {terms.share}; the same number of steps for every mix",
        "caps": ", ".join("none" if not cap else f"{cap} per class" for cap in terms.caps),
        "asked": f"{len(contest.val.domain_of):,} validation queries"
        + (", each domain by heads trained without it" if terms.leave_one_domain_out else "")
        + f"; {terms.num_seeds} seeds",
    }
    figures = {
        "Score against budget, validation": lines_url(
            findings.curves, x_label="training images, at most", y_label="validation mMP@5 %"
        )
    }
    if ranking:
        figures["Marginal gain"] = bars_url(
            ranking,
            {"": [findings.marginal[group][0] for group in ranking]},
            label="points of validation mMP@5 that the mix has with it rather than without",
        )
    said, tables = _said(findings, compared, terms.budget), _tables(mixer, findings, compared, ranking)
    recipe = _recipe(mixer, findings.mix, chosen)
    folder = contest.folder
    return conclude(folder, "Data sets", facts, said, tables, rows, figures, chosen=chosen, recipe=recipe)


def _recipe(mixer: Mixer, mix: Sequence[Part], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """How to train on what was chosen, with chosen.parquet, the catalog for it, written."""
    terms, catalog = mixer.terms, mixer.features.catalog
    kept = ~catalog.has_role("train")
    kept[mixed_rows(catalog, mix, terms)] = True
    catalog.take(kept).write(mixer.contest.folder.folder / "chosen.parquet")
    caps = tuple(f"{group}={cap}" for group, cap in mix if cap) if terms.by == "dataset" else ()
    curate = {
        "min_images": [2],
        "max_images": list(caps),
        "budget_images": terms.budget,
        "share": terms.share,
        "seed": terms.seed,
    }
    return {**chosen, "catalog": "chosen.parquet", "curate": curate, "train": mixer.config.to_json()}


def _said(findings: Findings, compared: Sequence[Mapping[str, Any]], budget: int) -> list[str]:
    """What came out, in sentences."""
    best, everything = compared
    verdict = (
        "better for certain" if best["gain_low"] > 0
        else "worse for certain" if best["gain_high"] < 0
        else "not told apart from it"
    )  # fmt: skip
    stop = next((step for step in findings.steps if step.kind == "stop"), None)
    return [
        f"Chosen: {'; '.join(map(named, findings.mix))}.",
        f"On untouched test instances, at the same budget of {budget:,} images: {shown(best, 'test')} % "
        f"mMP@5, taking everything {shown(everything, 'test')} %; difference "
        f"{shown(best, 'gain', sign=True)} points: {verdict}.",
        "Every group was added: none was left out by the stop rule."
        if stop is None
        else f"The search stopped at {named(stop.part)}, which would have gained "
        f"{percent(*stop.gain, sign=True)} points.",
    ]


def _tables(
    mixer: Mixer, findings: Findings, compared: Sequence[Mapping[str, Any]], ranking: Sequence[str]
) -> list[Table]:
    val, test = mixer.contest.val, mixer.contest.test
    tables = [
        Table(
            "Chosen against everything, at the same budget",
            ["mix", "images", "validation %", "test %", *(f"test {one}" for one in test.domains)],
            [
                [
                    row["what"], f"{row['num_images']:,}", shown(row, "val"), shown(row, "test"),
                    *domain_cells(row, test),
                ]
                for row in compared
            ],
            note="mMP@5; in brackets 95 % bootstrap intervals over queries, means over seeds "
            "± their standard deviation. The test was "
            "looked at once.",
        ),
        Table(
            "Decisions",
            ["decision", "part", "gain in points (the first: its score)"],
            [
                [step.kind, named(step.part), percent(*step.gain, sign=number > 0)]
                for number, step in enumerate(findings.steps)
            ],
            note="Of several candidates the best is shown, so its gain is flattered; the test says what "
            "is left.",
        ),
        Table(
            "Ranking: what each is worth beside the mix, in points of validation mMP@5",
            ["group", "in the mix", "alone %", "marginal gain", *val.domains],
            [
                [
                    group,
                    "yes" if group in {one for one, _ in findings.mix} else "no",
                    percent(*findings.alone[group]),
                    percent(*findings.marginal[group][0], sign=True),
                    *(percent(value, sign=True) for value in findings.marginal[group][1].values()),
                ]
                for group in ranking
            ],
            note="The mix with the group minus the mix without it, at the same budget: images of one "
            "group are swapped for others'.",
        ),
        Table(
            "Substitutions",
            ["instead of", "taken", "gain in points of validation mMP@5"],
            [
                [named(old), named(new), percent(*gain, sign=True)]
                for old, new, gain in findings.substitutions
            ],
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]
