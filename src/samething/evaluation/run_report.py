"""The HTML report of a run: one self-contained file with tables, curves, a map and images that it chooses."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from samething.arrays import Bool, Embeddings, Float, Int, unit
from samething.catalog import Catalog
from samething.evaluation.protocols import MEAN, SCOPES
from samething.evaluation.result import Comparison
from samething.evaluation.task import RetrievalTask
from samething.metrics import title_of
from samething.pages import Cell, Table, Thumbnail, bars_url, drawing_url, image_url, new_axes, write_page

NUM_HITS: Final = 6
"""Answers of a query that are looked at."""
_MAP_POINTS: Final = 400


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """One embedding of a catalog's test images, looked at image by image in the merged index."""

    embeddings: Embeddings
    """One row per catalog row."""
    catalog: Catalog
    queries: Int[np.ndarray, " q"]
    """Catalog rows of the queries that have a positive."""
    found: Int[np.ndarray, "q k"]
    """Catalog rows of what they found, best first; -1 for none."""
    scores: Float[np.ndarray, "q k"]
    """Cosine similarities."""
    is_right: Bool[np.ndarray, "q k"]
    """Whether it is the same thing."""
    same: Float[np.ndarray, " p"]
    """Similarities of queries and their positives, of at most 20,000 pairs."""
    different: Float[np.ndarray, " r"]
    """Similarities of queries and other entries, of as many random pairs."""
    best_wrong: Float[np.ndarray, " w"]
    """Each query's most similar entry that is another thing."""

    @classmethod
    def of(cls, embeddings: Embeddings, catalog: Catalog) -> Analysis:
        """Search the index with the queries and sort out what was found.

        Raises:
            InputError: there are no queries or no index.
        """
        task = RetrievalTask.of(catalog, "test")
        queries, gallery, relevant = task.queries, task.gallery, task.relevant
        top, is_right = task.answers(embeddings, depth=NUM_HITS)
        asked = relevant.counts > 0
        wrong = ~is_right & (top.indices >= 0)
        has_wrong = wrong.any(axis=1) & asked
        generator = np.random.default_rng(0)
        rows = unit(embeddings, np.float32)
        some = generator.permutation(len(relevant.rows))[:20_000]
        left, right = relevant.queries[some], relevant.rows[some]
        others = generator.integers(len(gallery), size=len(some))
        askers = generator.integers(len(queries), size=len(some))
        other = ~task.is_right(askers, others) & (others != task.leave_out[askers])
        return cls(
            embeddings=embeddings,
            catalog=catalog,
            queries=queries[asked],
            found=np.where(top.indices >= 0, gallery[np.maximum(top.indices, 0)], -1)[asked],
            scores=top.scores[asked],
            is_right=is_right[asked],
            same=np.einsum("nd,nd->n", rows[queries[left]], rows[gallery[right]]),
            different=np.einsum("nd,nd->n", rows[queries[askers]], rows[gallery[others]])[other],
            best_wrong=top.scores[has_wrong, wrong[has_wrong].argmax(axis=1)],
        )

    def examples(self, count: int) -> Int[np.ndarray, " e"]:
        """Places of random queries, evenly over the domains."""
        generator, domains = np.random.default_rng(0), self.catalog.strings("domain")[self.queries]
        by_domain = [generator.permutation(np.flatnonzero(domains == name)) for name in np.unique(domains)]
        depth = -(-count // max(1, len(by_domain)))
        chosen = [rows[turn] for turn in range(depth) for rows in by_domain if turn < len(rows)]
        return np.array(chosen[:count], dtype=np.int64)

    def worst(self, count: int) -> Int[np.ndarray, " e"]:
        """Places of queries that are surest of a wrong answer, with no right one among the first."""
        places = np.flatnonzero(~self.is_right[:, :NUM_HITS].any(axis=1))
        return places[np.argsort(-self.scores[places, 0], kind="stable")][:count]

    def near_misses(self, count: int) -> Int[np.ndarray, " e"]:
        """Places of queries whose first answer is wrong and whose right one is behind by least."""
        places = np.flatnonzero(self.is_right.any(axis=1) & ~self.is_right[:, 0])
        first = self.is_right[places].argmax(axis=1)
        behind = self.scores[places, 0] - self.scores[places, first]
        return places[np.lexsort((behind, first))][:count]

    def confusions(self) -> tuple[list[str], Int[np.ndarray, "domains domains"], Int[np.ndarray, " domains"]]:
        """Domains, how many first answers of each domain's queries are wrong by the domain of the answer, and
        how many queries each has."""
        names, domain_of = np.unique(self.catalog.strings("domain").astype(str), return_inverse=True)
        asked, first = domain_of[self.queries], self.found[:, 0]
        wrong = (first >= 0) & ~self.is_right[:, 0]
        counts = np.zeros((len(names), len(names)), dtype=np.int64)
        np.add.at(counts, (asked[wrong], domain_of[first[wrong]]), 1)
        return names.tolist(), counts, np.bincount(asked, minlength=len(names))

    def on_a_map(self) -> tuple[Int[np.ndarray, " p"], Float[np.ndarray, "p 2"], str]:
        """Catalog rows of some index images, whole things together, their places in [0, 1], and the method.

        t-SNE of cosine distances where scikit-learn is installed, else the two principal components.
        """
        index = np.flatnonzero(self.catalog.has_role("index", "query+index"))
        classes = self.catalog.class_ids()[index]
        order = np.random.default_rng(0).permutation(np.unique(classes))
        rank = {int(label): place for place, label in enumerate(order)}
        chosen = index[np.argsort([rank[int(label)] for label in classes], kind="stable")][:_MAP_POINTS]
        rows = unit(self.embeddings[chosen], np.float64)
        if importlib.util.find_spec("sklearn") and len(chosen) > 30:
            from sklearn.manifold import TSNE

            method = "t-SNE, cosine distance, perplexity 15"
            places = TSNE(metric="cosine", init="pca", perplexity=15, random_state=0).fit_transform(rows)
        else:
            method = "the two directions of largest variance"
            centred = rows - rows.mean(axis=0)
            places = np.zeros((len(rows), 2))
            components = np.linalg.svd(centred, full_matrices=False)[2][:2]
            places[:, : len(components)] = centred @ components.T
        low, high = places.min(axis=0), places.max(axis=0)
        return chosen, (places - low) / np.maximum(high - low, 1e-12), method


def write_report(
    target: Path,
    *,
    title: str,
    comparison: Comparison,
    featured: str,
    records: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    analysis: Analysis,
    opening: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of one run.

    Args:
        target: the HTML file.
        title: its heading.
        comparison: the embeddings that were compared.
        featured: name of the embedding that the report is about.
        records: lines of the run's metrics.jsonl, for the curves.
        facts: what was made from what, shown as a list.
        analysis: of the featured embedding.
        opening: what the report begins with: ``sentences``, ``advice``, and a drawing ``curve``.
    """
    domains = [*comparison.first.domains, MEAN]
    metric = comparison.first.protocol.metrics[0]
    named = {"loss": "training loss", "val/mmp@5": "validation mMP@5", "learning_rate": "learning rate"}
    points = {
        label: [(record["step"], record[name]) for record in records if name in record]
        for name, label in named.items()
    }
    curves = {}
    for label, own in points.items():
        if own:
            figure, axes = new_axes(4.2, 2.6, xlabel="step", title=label)
            axes.plot(*zip(*own, strict=True), linewidth=1.4)
            curves[label] = drawing_url(figure)
    return write_page(
        target,
        "run.html",
        title=title,
        opening=opening,
        facts=facts,
        featured=featured,
        scope=SCOPES[comparison.first.scope],
        tables=[comparison.table(domain, featured=featured) for domain in [MEAN, *domains[:-1]]],
        bars=bars_url(
            domains,
            {
                name: [found[domain][metric] for domain in domains]
                for name, found in comparison.shown_estimates.items()
            },
            label=f"{title_of(metric)} %",
        ),
        bar_metric=title_of(metric),
        differences=comparison.difference_table(featured) if len(comparison.results) > 1 else None,
        no_match=[(name, found.__rich__()) for name, found in comparison.no_match.items()],
        curves=curves,
        **_looked_at(analysis),
    )


_COLOURS: Final = (
    "#2867b2", "#e07b00", "#1a8a4a", "#c8352b", "#7a4fb5", "#8c5a3c", "#d657a5", "#5f6b76", "#a3a318", "#12a3b4",  # noqa: E501
)  # fmt: skip


def _looked_at(analysis: Analysis) -> dict[str, Any]:
    """What the page shows image by image; an image that is shown twice is read once."""
    names, counts, totals = analysis.confusions()
    rows: list[list[str | Cell]] = []
    for name, row, total in zip(names, counts.tolist(), totals.tolist(), strict=True):
        if not total:
            continue
        cells = [
            Cell(
                f"{count}",
                f"{100 * count / total:.0f} %" if count else "",
                style=f"background:rgba(200,53,43,{0.7 * count / total:.2f})",
            )
            for count in row
        ]
        rows.append([name, *cells, f"{total}"])
    figure, axes = new_axes(9.0, 2.8, xlabel="cosine similarity", ylabel="density", xlim=(-0.6, 1))
    for values, label, colour in (
        (analysis.same, "same instance", "#1a8a4a"),
        (analysis.best_wrong, "nearest other instance of each query", "#e07b00"),
        (analysis.different, "different instances, random pairs", "#c8352b"),
    ):
        if len(values) == 0:  # a test of one thing has nothing wrong to show
            continue
        axes.hist(
            values,
            bins=np.linspace(-1, 1, 81).tolist(),
            density=True,
            histtype="stepfilled",
            alpha=0.4,
            color=colour,
            label=f"{label} (n = {len(values):,})",
        )
    axes.legend(fontsize=8, frameon=False)
    histogram = drawing_url(figure)
    labels, domains = analysis.catalog.strings("label"), analysis.catalog.strings("domain")
    paths, url_of = analysis.catalog.paths, functools.cache(image_url)
    mapped, places, method = analysis.on_a_map()

    def shown(place: int) -> list[Thumbnail]:
        """A query and what it found."""
        asked = analysis.queries[place]
        query = Thumbnail(
            url_of(paths[asked]), labels[asked], domains[asked], kind="asked", alt=f"query: {labels[asked]}"
        )
        answers = zip(analysis.found[place], analysis.scores[place], analysis.is_right[place], strict=True)
        return [query] + [
            Thumbnail(
                url_of(paths[entry]),
                labels[entry],
                f"{score:.3f}",
                kind="right" if is_right else "wrong",
                mark="✓" if is_right else "✗",
            )
            for entry, score, is_right in list(answers)[:NUM_HITS]
            if entry >= 0
        ]

    return {
        "histogram": histogram,
        "confusions": Table("Confusions between domains", ["query", *names, "queries"], rows),
        "colours": {name: _COLOURS[number % len(_COLOURS)] for number, name in enumerate(names)},
        "map_method": method,
        "points": [
            {"url": url_of(paths[row]), "label": labels[row], "domain": domains[row], "x": x, "y": y}
            for row, (x, y) in zip(mapped, places.tolist(), strict=True)
        ],
        "queries": [shown(place) for place in analysis.examples(15)],
        "worst": [shown(place) for place in analysis.worst(8)],
        "near_misses": [shown(place) for place in analysis.near_misses(8)],
    }
