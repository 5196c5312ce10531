"""Better on domains it never saw: leave one out, choose a recipe without looking at it, then test on it.

    python recipes/leave_one_domain_out.py features --output lodo
    python recipes/leave_one_domain_out.py --demo --candidates "plain recipe" "no margin"

Needs features of a catalog of at least three domains, each with train, val and test images; with --demo:
those that samething demo has made. Without --candidates it trains some 100 heads.

For every domain D the head is trained on the others and tested on D's test instances, searched for in one
index over all domains. Which candidate is used for D is chosen on the other domains only: each of them, E, is
left out as well, and the candidates are compared on the training and validation instances of E, which a head
trained without D and E has never seen. A candidate that loses more than a point on validation instances of
the seen domains against the best one is not eligible. Results are kept a line each, so a stopped run goes on.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import cyclopts
import numpy as np
import rich

from samething.cli import run_script
from samething.demo import demo_features
from samething.errors import InputError
from samething.evaluation import Comparison
from samething.features import FeatureSet
from samething.files import write_text
from samething.heads import Head, HeadConfig, fitted_head
from samething.training import RECIPES
from samething.training.loop import run_training
from samething.training.validation import scores_by_domain

CANDIDATES: dict[str, dict[str, Any]] = {
    "plain recipe": {},
    "two centres": {"num_centers": 2},
    "three centres": {"num_centers": 3},
    "fewer epochs": {"epochs": 10.0},
    "margin 0.2": {"margin": 0.2},
    "no margin": {"loss": "normface"},
    "dropout 0.5": {"dropout": 0.5},
    "class sampling 0.3": {"class_sample_ratio": 0.3},
}
LARGEST_LOSS_ON_SEEN = 0.01
"""mMP@5 that a candidate may lose on seen domains against the best one."""


def main(
    features: Path | None = None,
    *,
    output: Path = Path("lodo"),
    candidates: Annotated[list[str], cyclopts.Parameter(consume_multiple=True)] | None = None,
    demo: bool = False,
    demo_folder: Path = Path("demo"),
) -> None:
    """Run the study on a feature folder.

    Args:
        features: the feature folder.
        output: folder for the results: choices.jsonl, table.md, table.json.
        candidates: names of the candidates that are compared, by default all.
        demo: use the demo's features.
        demo_folder: where samething demo has written.
    """
    compared = _compared(candidates or list(CANDIDATES))
    folder = demo_features(demo_folder) if demo else features
    if folder is None:
        raise InputError(
            "no features",
            expected="a feature folder of several domains",
            next_step="make one with samething features CATALOG, or give --demo",
        )
    found = FeatureSet.open(folder)
    domains = _complete_domains(found)
    output.mkdir(parents=True, exist_ok=True)
    log = output / "choices.jsonl"
    pairs = list(itertools.combinations(domains, 2))
    done = {(row["candidate"], tuple(row["left_out"])): row for row in _lines(log)}
    for (name, changes), pair in itertools.product(compared.items(), pairs):
        if (name, pair) not in done:
            done[name, pair] = _candidate(found, pair, name, changes, output)
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(done[name, pair]) + "\n")
    rows, chosen = [], {}
    for domain in domains:
        chosen[domain] = _choose({key: row for key, row in done.items() if key[0] in compared}, domain)
        rows.append(_tested(found, domain, chosen[domain], output))
    table = _table(domains, rows, chosen) + "\n" + _candidates(done, list(compared))
    write_text(output / "table.md", table)
    write_text(output / "table.json", json.dumps(rows, indent=2))
    rich.print(table)


def _compared(names: list[str]) -> dict[str, dict[str, Any]]:
    unknown = [name for name in names if name not in CANDIDATES]
    if unknown:
        raise InputError(
            f"--candidates {unknown[0]!r}",
            expected=f"some of {', '.join(map(repr, CANDIDATES))}",
            next_step="give other names, or add a line to CANDIDATES",
        )
    return {name: CANDIDATES[name] for name in names}


def _complete_domains(found: FeatureSet) -> list[str]:
    """All domains, each of which must have what the study asks for."""
    domains = found.catalog.domains
    parts = {"train": ("train",), "val": ("val",), "test": ("query", "query+index")}
    lacking = [
        f"{domain} has no {part} images"
        for domain in domains
        for part, roles in parts.items()
        if not (_in(found, (domain,)) & found.catalog.has_role(*roles)).any()
    ]
    if lacking or len(domains) < 3:
        raise InputError(
            f"{found.folder}: {lacking[0] if lacking else 'the domains ' + ', '.join(domains)}",
            expected="three domains or more, each with train, val and test images",
            next_step="join catalogs with samething curate A B, or give --demo",
        )
    return domains


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _in(found: FeatureSet, domains: tuple[str, ...]) -> np.ndarray:
    return np.isin(found.catalog.strings("domain").astype(str), domains)


def _trained(found: FeatureSet, without: tuple[str, ...], changes: dict[str, Any], folder: Path) -> Head:
    rows = ~_in(found, without) & found.catalog.has_role("train", "val")
    config = dataclasses.replace(RECIPES["plain"](), **changes)
    shutil.rmtree(folder, ignore_errors=True)
    return run_training(found.subset(rows), config, folder, resume=True).head


def _candidate(
    found: FeatureSet, pair: tuple[str, str], name: str, changes: dict[str, Any], output: Path
) -> dict[str, Any]:
    """Scores of a candidate trained without a pair of domains: on each of the pair, and on the seen ones."""
    head = _trained(found, pair, changes, output / "run")
    catalog = found.catalog
    seen = catalog.has_role("val") & ~_in(found, pair)
    scores = {}
    for domain in pair:
        rows = seen | (_in(found, (domain,)) & catalog.has_role("train", "val"))
        scores[domain] = scores_by_domain(head.embed(np.asarray(found.rows[rows])), catalog.take(rows))[
            domain
        ][0]
    on_seen = scores_by_domain(head.embed(np.asarray(found.rows[seen])), catalog.take(seen))
    mean_seen = float(np.mean([score for score, _ in on_seen.values()]))
    return {"candidate": name, "left_out": pair, "unseen": scores, "seen": mean_seen}


def _choose(done: dict[Any, dict[str, Any]], tested: str) -> str:
    """The candidate that is best on unseen domains other than the one that will be tested."""
    unseen: dict[str, list[float]] = {}
    seen: dict[str, list[float]] = {}
    for (name, pair), row in done.items():
        if tested in pair:
            other = next(domain for domain in pair if domain != tested)
            unseen.setdefault(name, []).append(row["unseen"][other])
            seen.setdefault(name, []).append(row["seen"])
    best_seen = max(np.mean(scores) for scores in seen.values())
    eligible = [name for name in unseen if np.mean(seen[name]) >= best_seen - LARGEST_LOSS_ON_SEEN]
    return max(eligible, key=lambda name: float(np.mean(unseen[name])))


def _tested(found: FeatureSet, domain: str, chosen: str, output: Path) -> dict[str, Any]:
    """mMP@5 and R@1 on the left-out domain's test queries, merged index, with 95 % intervals."""
    catalog = found.catalog
    train = np.asarray(found.rows[catalog.has_role("train") & ~_in(found, (domain,))])
    tested = catalog.has_role("index", "query+index") | (
        catalog.has_role("query", "query+index") & _in(found, (domain,))
    )
    rows = np.asarray(found.rows[tested])
    heads = {
        "average-pool-64": fitted_head(HeadConfig(kind="average", standardise=False), train),
        "PCA-64": fitted_head(HeadConfig(kind="pca"), train),
        "plain recipe": _trained(found, (domain,), {}, output / "run"),
        "chosen": _trained(found, (domain,), CANDIDATES[chosen], output / "run"),
    }
    embeddings = {"backbone": rows, **{name: head.embed(rows) for name, head in heads.items()}}
    comparison = Comparison.of(embeddings, catalog.take(tested))
    result: dict[str, Any] = {"domain": domain, "chosen": chosen}
    for name, part in comparison.results.items():
        result[name] = {
            metric: [part.value(metric, domain=domain), *part.interval(metric, domain=domain)]
            for metric in ("mmp@5", "r@1")
        }
    difference = comparison.difference("chosen", "backbone")
    result["chosen minus backbone"] = [difference.difference, difference.low, difference.high]
    return result


def _candidates(done: dict[Any, dict[str, Any]], names: list[str]) -> str:
    """Means of every candidate over all pairs of left-out domains."""
    lines = ["| candidate | unseen mMP@5 % | seen mMP@5 % |", "| --- | --- | --- |"]
    for name in names:
        rows = [row for key, row in done.items() if key[0] == name]
        unseen = np.mean([score for row in rows for score in row["unseen"].values()])
        lines.append(f"| {name} | {100 * unseen:.1f} | {100 * np.mean([row['seen'] for row in rows]):.1f} |")
    return "\n".join(lines) + "\n"


def _table(domains: list[str], rows: list[dict[str, Any]], chosen: dict[str, str]) -> str:
    names = ["backbone", "average-pool-64", "PCA-64", "plain recipe", "chosen"]
    parts = []
    for metric, title in (("mmp@5", "mMP@5"), ("r@1", "R@1")):
        lines = [f"| {title} %, merged | {' | '.join(domains)} | mean |", "| --- " * (len(domains) + 2) + "|"]
        for name in names:
            cells = [
                f"{100 * row[name][metric][0]:.1f} ({100 * row[name][metric][1]:.1f}–"
                f"{100 * row[name][metric][2]:.1f})"
                for row in rows
            ]
            mean = np.mean([row[name][metric][0] for row in rows])
            lines.append(f"| {name} | {' | '.join(cells)} | {100 * mean:.1f} |")
        parts.append("\n".join(lines))
    picked = "; ".join(f"{domain}: {name}" for domain, name in chosen.items())
    return "\n\n".join(parts) + f"\n\nChosen without the tested domain: {picked}.\n"


if __name__ == "__main__":
    run_script(main)
