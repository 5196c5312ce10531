"""What a result looks like image by image: hits, failures, near-misses, confusions, a map."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Final

import numpy as np

from samething.arrays import Bool, Embeddings, Float, Int, unit
from samething.catalog import Catalog
from samething.evaluation.task import RetrievalTask

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
