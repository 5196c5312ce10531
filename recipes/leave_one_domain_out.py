"""Better on domains it never saw: recipes, numbers and bits, tested on domains and instances left out.

    python recipes/leave_one_domain_out.py demo/features photos/features --output lodo
    python recipes/leave_one_domain_out.py --demo

Needs features of one backbone, of catalogs with at least three domains in all; with --demo: those that
samething demo has made. A catalog without test images is divided by instances. Some minutes a domain.

*Unseen*: for every domain a head is trained on the training images of the others, and its test instances are
searched for among the test images of all domains. *Seen*: a head is trained on all domains. Values are means
over seeds and are compared query by query. What is measured is kept, so a stopped run goes on.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import rich

from samething.arrays import unit
from samething.catalog import Catalog
from samething.cli import run_script
from samething.demo import demo_features
from samething.errors import InputError
from samething.evaluation import evaluate_embeddings
from samething.evaluation.protocols import protocol_of
from samething.features import FeatureSet
from samething.files import require_same, write_text
from samething.heads import Head, HeadConfig, fitted_head
from samething.retrieval.codes import as_kept
from samething.statistics import domain_mean, paired_difference
from samething.training import RECIPES, TrainConfig
from samething.training.loop import run_training

METRICS = ("mmp@5", "r@1")
DIMENSIONS, BITS = (16, 32, 64, 128, 256, 512), (32, 16, 8, 4, 1)
REFERENCES = ("backbone", "PCA, 64 x float32", "plain, 64 x float32")
FEW = ("backbone", "PCA, 512 x int4", "discriminants, 512 x int4", "universal, 512 x int4")
"""What is compared when few instances are trained on, the last with the others."""
Trained = Callable[[dict[str, Any], int], Head]


def main(
    *features: Path,
    output: Path = Path("lodo"),
    seeds: int = 3,
    few: tuple[int, ...] = (2, 5, 10, 50, 500),
    demo: bool = False,
    demo_folder: Path = Path("demo"),
) -> None:
    """Run the study on feature folders.

    Args:
        features: the feature folders.
        output: folder for the results: table.md, and what was measured.
        seeds: heads that are trained of everything random.
        few: numbers of instances that heads are also trained on alone.
        demo: use the demo's features.
        demo_folder: where samething demo has written.
    """
    folders = [demo_features(demo_folder)] if demo else [*features]
    if not folders:
        raise InputError(
            "no features",
            expected="feature folders of several domains",
            next_step="make one with samething features CATALOG, or give --demo",
        )
    found = joined([FeatureSet.open(folder) for folder in folders])
    domains = found.catalog.domains
    if len(domains) < 3:
        raise InputError(
            f"the domains {', '.join(domains)}",
            expected="three domains or more",
            next_step="give features of further catalogs, or --demo",
        )
    (output / "values").mkdir(parents=True, exist_ok=True)
    left_out: dict[str, list[tuple[str, ...]]] = {"unseen": [(name,) for name in domains], "seen": [()]}
    measured = {
        title: [measured_without(found, part, seeds, output) for part in parts]
        for title, parts in left_out.items()
    }
    curves = {
        title: {num: [measured_on_few(found, part, num, seeds, output) for part in parts] for num in few}
        for title, parts in left_out.items()
    }
    text = "\n".join(
        [
            *(line for title in measured for line in table(title, measured[title], domains)),
            *surface(measured),
            *(line for title in curves for line in few_table(title, curves[title])),
        ]
    )
    write_text(output / "table.md", text)
    rich.print(text)


def joined(parts: list[FeatureSet]) -> FeatureSet:
    """All features as one set in memory; a catalog that has no test images is divided by instances."""
    catalogs = []
    for part in parts:
        require_same(
            dict(parts[0].backbone),
            dict(part.backbone),
            what=f"{part.folder} and {parts[0].folder} are of different backbones",
            next_step="extract all features alike",
        )
        has_test = part.catalog.has_role("query", "query+index").any()
        catalogs.append(part.catalog if has_test else part.catalog.split_by_class(val=0.15, test=0.4))
    names = [field.name for field in catalogs[0].table.schema][:8]
    catalog = Catalog(pa.concat_tables([each.table.select(names) for each in catalogs]), catalogs[0].root)
    rows = np.concatenate([np.asarray(part.rows) for part in parts])
    whole = dataclasses.replace(parts[0], rows=rows, catalog=catalog, unreadable=())
    return whole.subset(np.ones(len(catalog), dtype=bool))


def heads_of(trained: Trained, training: np.ndarray) -> dict[str, tuple[Callable[[int], Head], bool, str]]:
    """What is compared, by name: a head for a seed, whether seeds differ, and how its vectors are kept."""

    def pca(dim: int) -> Callable[[int], Head]:
        return lambda _: fitted_head(
            HeadConfig(kind="pca", embedding_dim=min(dim, training.shape[1])), training
        )

    plain, universal = (dataclasses.asdict(RECIPES[name]()) for name in ("plain", "universal"))
    narrow = {**universal, "embedding_dim": 64, "codes": "float32"}
    return {
        "PCA, 64 x float32": (pca(64), False, "float32"),
        "PCA, 512 x int4": (pca(512), False, "int4"),
        "plain, 64 x float32": (lambda seed: trained(plain, seed), True, "float32"),
        "discriminants, 512 x int4": (lambda _: trained({**universal, "epochs": 0.0}, 0), False, "int4"),
        "universal, 512 x int4": (lambda seed: trained(universal, seed), True, "int4"),
        "discriminants, 64 x float32": (lambda _: trained({**narrow, "epochs": 0.0}, 0), False, "float32"),
        "universal, 64 x float32": (lambda seed: trained(narrow, seed), True, "float32"),
    }


def trainer_of(found: FeatureSet, folder: Path) -> Trained:
    """Trains a head on what has the roles train and val; the shrinkage is chosen once."""
    shrinkage: list[float] = []

    def trained(config: dict[str, Any], seed: int) -> Head:
        chosen = {"shrinkage": shrinkage[0]} if shrinkage and config["start"] == "lda" else {}
        shutil.rmtree(folder, ignore_errors=True)
        whole = TrainConfig(**{**config, **chosen, "seed": seed})
        run = run_training(found, whole, folder, resume=True)
        if config["start"] == "lda" and not shrinkage:
            shrinkage.append(run.manifest.content["shrinkage"])
        return run.head

    return trained


def measured_without(
    found: FeatureSet, left_out: tuple[str, ...], seeds: int, output: Path
) -> dict[str, np.ndarray]:
    """Name -> (metrics, queries), of heads trained without some domains, on their queries (or on all)."""
    used, asked = divided(found, left_out)
    return measured(found, used, asked, seeds, output, "-".join(left_out) or "none", with_surface=True)


def divided(found: FeatureSet, left_out: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which images may be trained on without some domains, and whose test queries count: theirs, or all."""
    catalog, domain = found.catalog, found.catalog.strings("domain").astype(str)
    asked = np.isin(domain, left_out) if left_out else np.ones(len(domain), dtype=bool)
    return ~np.isin(domain, left_out) & catalog.has_role("train", "val"), asked


def measured_on_few(
    found: FeatureSet, left_out: tuple[str, ...], num: int, seeds: int, output: Path
) -> dict[str, np.ndarray]:
    """As :func:`measured_without`, of heads trained on a few instances; the draws are the seeds."""
    catalog, ids = found.catalog, found.catalog.class_ids()
    open_to_all, asked = divided(found, left_out)
    drawn_from = np.unique(ids[open_to_all & catalog.has_role("train")])
    values: dict[str, list[np.ndarray]] = {}
    for seed in range(seeds):
        drawn = np.random.default_rng(seed).permutation(drawn_from)[:num]
        used = np.isin(ids, drawn) & catalog.has_role("train")
        title = f"few-{num}-{seed}-{'-'.join(left_out) or 'none'}"
        for name, own in measured(found, used, asked, 1, output, title, only=FEW).items():
            values.setdefault(name, []).append(own)
    domains = values.pop("domains")[0]
    return {"domains": domains, **{name: np.mean(own, axis=0) for name, own in values.items()}}


def measured(
    found: FeatureSet,
    used: np.ndarray,
    asked: np.ndarray,
    seeds: int,
    output: Path,
    title: str,
    *,
    only: tuple[str, ...] = (),
    with_surface: bool = False,
) -> dict[str, np.ndarray]:
    """Name -> (metrics, queries), means over seeds; the domains of the queries under ``domains``.

    Args:
        found: all features.
        used: images that heads are trained on and validated by.
        asked: images whose test queries count.
        seeds: heads of each that is random.
        output: folder of the study.
        title: of the file that keeps the values.
        only: names of the heads that are measured, beside the backbone; by default all.
        with_surface: the closed form also with fewer numbers and bits.
    """
    kept = output / "values" / f"{title}.npz"
    if kept.exists():
        with np.load(kept) as stored:
            return dict(stored)
    catalog = found.catalog
    training = np.asarray(found.rows[used & catalog.has_role("train")])
    tested = catalog.has_role("query", "index", "query+index")
    roles = np.where(asked | catalog.has_role("index"), catalog.strings("role"), "index")
    test, rows = catalog.with_column("role", roles).take(tested), np.asarray(found.rows[tested])
    trained = trainer_of(found.subset(used), output / "run")

    def scores(embeddings: np.ndarray) -> np.ndarray:
        result = evaluate_embeddings(
            embeddings, test, protocol=PROTOCOL, precision="float32", num_resamples=1
        )
        values["domains"] = np.array(result.domains)[result.query_domains]
        return np.stack([result.values(metric, scope="merged") for metric in METRICS])

    values: dict[str, np.ndarray] = {}
    for name, (head_of, is_random, codes) in heads_of(trained, training).items():
        if not only or name in only:
            each = []
            for seed in range(seeds if is_random else 1):
                head = head_of(seed)
                each.append(scores(as_kept(head.embed(rows), head.embed(training), codes)))
                if with_surface and name == "discriminants, 512 x int4":
                    values |= {
                        f"{dim} x {bits}": scores(vectors)
                        for dim, bits, vectors in narrowed(head.embed(rows), head.embed(training))
                    }
            values[name] = np.mean(each, axis=0)
    values["backbone"] = scores(rows)
    np.savez(kept, **values)
    return values


def narrowed(vectors: np.ndarray, training: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Prefixes of embeddings in fewer bits; one bit keeps the sign, of root mean square size."""
    for dim in DIMENSIONS:
        if dim <= vectors.shape[1]:
            own, fitted = unit(vectors[:, :dim]), unit(training[:, :dim])
            yield dim, 32, own
            yield dim, 16, own.astype(np.float16).astype(np.float32)
            yield dim, 8, as_kept(own, fitted, "int8")
            yield dim, 4, as_kept(own, fitted, "int4")
            yield dim, 1, np.where(own >= 0, 1, -1) * np.sqrt(np.square(fitted).mean(axis=0))


PROTOCOL = protocol_of("custom", metrics=METRICS)


def concatenated(parts: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """Values of all parts side by side."""
    return np.concatenate([part[name] for part in parts], axis=-1)


def table(title: str, parts: list[dict[str, np.ndarray]], domains: list[str]) -> list[str]:
    """mMP@5 of each domain, both metrics on the mean over domains, and paired differences in points."""
    groups = np.unique(concatenated(parts, "domains"), return_inverse=True)[1]
    heading = [*domains, "mean", "R@1", *(f"minus {name}" for name in REFERENCES)]
    lines = [f"| {title}, mMP@5 % | " + " | ".join(heading) + " |", "| --- " * (len(heading) + 1) + "|"]
    for name in ("backbone", *(name for name in parts[0] if " x " in name and "," in name)):
        values = concatenated(parts, name)
        cells = [f"{100 * np.nanmean(values[0][groups == number]):.1f}" for number in range(len(domains))]
        cells += [f"{100 * domain_mean(row, groups):.1f}" for row in values]
        for reference in REFERENCES:
            other = concatenated(parts, reference)[0]
            cells.append("" if name == reference else difference(values[0], other, groups))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def difference(ours: np.ndarray, theirs: np.ndarray, groups: np.ndarray) -> str:
    """Paired, in points, with its 95 % interval."""
    found = paired_difference(ours, theirs, groups)
    return f"{100 * found.difference:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def surface(measured: dict[str, list[dict[str, np.ndarray]]]) -> list[str]:
    """Numbers and bits of the closed form: mean mMP@5 on unseen and on seen domains."""
    lines = ["| numbers, unseen / seen % | " + " | ".join(f"{bits} bits" for bits in BITS) + " |"]
    lines.append("| --- " * (len(BITS) + 1) + "|")
    for dim in DIMENSIONS:
        cells = []
        for bits in BITS:
            name = f"{dim} x {bits}"
            if name in measured["seen"][0]:
                both = [
                    domain_mean(
                        concatenated(parts, name)[0],
                        np.unique(concatenated(parts, "domains"), return_inverse=True)[1],
                    )
                    for parts in measured.values()
                ]
                cells.append(f"{100 * both[0]:.1f} / {100 * both[1]:.1f}")
        lines.append(f"| {dim} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def few_table(title: str, curve: dict[int, list[dict[str, np.ndarray]]]) -> list[str]:
    """mMP@5 on the mean over domains by the number of instances trained on."""
    end, *others = reversed(FEW)
    heading = [f"{title}, instances", *FEW, *(f"{end.split(',')[0]} minus {name}" for name in others)]
    lines = ["| " + " | ".join(heading) + " |", "| --- " * len(heading) + "|"]
    for num, each in curve.items():
        groups = np.unique(concatenated(each, "domains"), return_inverse=True)[1]
        values = {name: concatenated(each, name)[0] for name in FEW}
        cells = [f"{100 * domain_mean(values[name], groups):.1f}" for name in FEW]
        cells += [difference(values[end], values[name], groups) for name in others]
        lines.append(f"| {num} | " + " | ".join(cells) + " |")
    return [*lines, ""]


if __name__ == "__main__":
    run_script(main)
