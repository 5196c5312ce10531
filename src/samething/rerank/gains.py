"""What can be gained after retrieval, without training: expansion of queries and index, and re-ranking.

Two of them are also second looks at the candidates of one search, which then say it of each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image

from samething.arrays import Float, Gallery, Int, Queries, unit
from samething.errors import InputError
from samething.files import Json
from samething.rerank.second_look import NUM_CANDIDATES, Evidence, Shown
from samething.retrieval import exact_topk

_MOST_PAIRS: Final = 2**28
"""Pairs of images for which re-ranking holds numbers at once: 1 GiB each matrix."""


@dataclasses.dataclass(frozen=True, eq=False)
class Refined:
    """Vectors or scores that take the place of those of the first search."""

    queries: Queries
    gallery: Gallery
    scores: Float[np.ndarray, "q g"] | None = None
    """Where the new ranking is not one of vectors."""


Gain: TypeAlias = Callable[[Queries, Gallery, Int[np.ndarray, " q"]], Refined]
"""From queries, gallery and the entry that each query may not retrieve (-1 for none)."""


def query_expansion(
    queries: Queries,
    gallery: Gallery,
    leave_out: Int[np.ndarray, " q"],
    *,
    num_neighbours: int = 3,
    alpha: float = 3.0,
) -> Refined:
    """α-weighted query expansion: the query plus its nearest entries, each by its similarity to the power α.

    ``q' = q + sum over the n nearest of max(s, 0)^α · g``, all of unit length, and q' brought to unit length
    (Radenović, Tolias and Chum, *Fine-tuning CNN Image Retrieval with No Human Annotation*, TPAMI 2019).
    """
    asked, entries = unit(queries, np.float32), unit(gallery, np.float32)
    found = exact_topk(asked, entries, num_neighbours, leave_out=leave_out)
    weights = np.where(found.indices >= 0, np.maximum(found.scores, 0) ** alpha, 0)
    expanded = asked + np.einsum("qk,qkd->qd", weights, entries[found.indices])
    return Refined(unit(expanded, np.float32), gallery)


def database_augmentation(
    queries: Queries, gallery: Gallery, leave_out: Int[np.ndarray, " q"], **options: Any
) -> Refined:
    """Database-side augmentation: every entry plus its nearest other entries, weighted as in query expansion.

    Its options are those of query expansion.

    Turcot and Lowe, *Better Matching with Fewer Features* (ICCV workshops 2009); Gordo et al., *End-to-end
    Learning of Deep Visual Representations for Image Retrieval* (IJCV 2017). Uses no query.
    """
    del leave_out
    entries = unit(gallery, np.float32)
    expanded = query_expansion(entries, entries, np.arange(len(entries)), **options)
    return Refined(queries, expanded.queries)


def both_expansions(queries: Queries, gallery: Gallery, leave_out: Int[np.ndarray, " q"]) -> Refined:
    """Database-side augmentation, then query expansion in the augmented index."""
    augmented = database_augmentation(queries, gallery, leave_out)
    return query_expansion(queries, augmented.gallery, leave_out)


def require_pairs(num_queries: int, num_entries: int, *, among_entries: bool = False) -> None:
    """Refuse a re-ranking whose matrix of scores, or that of the entries among themselves, does not fit.

    Raises:
        InputError: says how many pairs there may be.
    """
    if max(num_queries, num_entries * among_entries) * num_entries > _MOST_PAIRS:
        raise InputError(
            f"re-ranking of {num_queries:,} queries among {num_entries:,} entries",
            expected=f"at most {_MOST_PAIRS:,} pairs",
            next_step="leave re-ranking out, or re-rank a part of the index",
        )


def reciprocal_reranking(
    queries: Queries,
    gallery: Gallery,
    leave_out: Int[np.ndarray, " q"],
    *,
    k1: int = 6,
    k2: int = 3,
    own_share: float = 0.3,
) -> Refined:
    """k-reciprocal re-ranking: entries that see each other among their nearest come first.

    Zhong, Zheng, Cao and Li, *Re-ranking Person Re-identification with k-reciprocal Encoding* (CVPR 2017),
    equations 3 to 12: the k1-reciprocal neighbours of each image, widened by those of half their depth that
    overlap by two thirds, weighted by ``exp(-d)``, averaged over the k2 nearest, and compared by Jaccard
    distance; ``own_share`` is the weight of the first distance. Distances are ``1 - cosine`` among gallery
    entries and to the query alone: queries do not see each other, so that the answer to one does not depend
    on which others are asked. k1 is smaller than the paper's 20, because an instance has few images here.

    Raises:
        InputError: there are so many images that the matrices do not fit.
    """
    asked, entries = unit(queries, np.float32), unit(gallery, np.float32)
    require_pairs(len(asked), len(entries), among_entries=True)
    depth = min(k1 + 1, len(entries))
    among = exact_topk(entries, entries, depth, precision="float32", normalised=True)
    # an image is its own first neighbour, also where a copy of it ties
    forward = np.where(among.indices == np.arange(len(entries))[:, None], -1, among.indices)
    neighbours = [np.concatenate([[row], own[own >= 0][:k1]]) for row, own in enumerate(forward)]
    sets = [set(own.tolist()) for own in neighbours]
    halves = [set(own[: 1 + k1 // 2].tolist()) for own in neighbours]
    features = np.zeros((len(entries), len(entries)), dtype=np.float32)

    def widened(own: set[int]) -> set[int]:
        """With the reciprocal half-depth neighbours of each member that overlap by two thirds."""
        wide = set(own)
        for member in own:
            candidate = {row for row in halves[member] if member in halves[row]}
            if len(candidate & own) >= 2 / 3 * len(candidate):
                wide |= candidate
        return wide

    for row in range(len(entries)):
        members = np.array(sorted(widened({int(other) for other in neighbours[row] if row in sets[other]})))
        features[row, members] = np.exp(entries[members] @ entries[row] - 1)
    features /= features.sum(axis=1, keepdims=True)
    if k2 > 1:
        features = np.stack([features[own[:k2]].mean(axis=0) for own in neighbours])
    near = exact_topk(asked, entries, depth, leave_out=leave_out, precision="float32", normalised=True)
    scores = (asked @ entries.T).astype(np.float64)
    for query in range(len(asked)):
        own = near.indices[query]
        own = own[own >= 0][:k1]
        # an entry sees the query if it is as near as the last of the entry's own neighbours, which may be a
        # copy of the query, but for rounding
        last = np.array([among.scores[entry][len(neighbours[entry]) - 1] for entry in own])
        members = own[scores[query, own] >= last - 1e-6]
        feature = np.zeros(len(entries), dtype=np.float32)
        if len(members):
            every = np.array(sorted(widened(set(members.tolist())) - {int(leave_out[query])}))
            feature[every] = np.exp(scores[query, every] - 1)
            feature /= feature.sum()
            if k2 > 1:
                feature = (feature + features[own[: k2 - 1]].sum(axis=0)) / (1 + len(own[: k2 - 1]))
        common = np.minimum(feature, features).sum(axis=1, dtype=np.float64)
        either = np.maximum(feature, features).sum(axis=1, dtype=np.float64)
        scores[query] = own_share * scores[query] + (1 - own_share) * common / either
    return Refined(queries, gallery, scores)


GAINS: Final[Mapping[str, Gain]] = {
    "query-expansion": query_expansion,
    "database-augmentation": database_augmentation,
    "both-expansions": both_expansions,
    "re-ranking": reciprocal_reranking,
}
"""Gains by name."""


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """A gain among the candidates of one search.

    Its one number is by how much it changes the cosine, so it may be below 0: a weight of 1 gives the gain's
    own ranking.
    """

    name: str
    gain: Gain
    weights: tuple[float, ...] = (1.0,)
    made_from: Json = None
    at_once: int = NUM_CANDIDATES

    def keep(self, image: Image.Image) -> bytes:
        """Nothing is needed but the vectors."""
        del image
        return b""

    def compare(
        self, query: Shown, of_query: bytes, candidates: Sequence[Shown], of_each: Sequence[bytes]
    ) -> Iterator[Evidence]:
        """The change of each candidate's score."""
        del of_query, of_each
        if not candidates:
            return
        asked, entries = query.vector[None], np.stack([image.vector for image in candidates])
        found = self.gain(asked, entries, np.array([-1]))
        scores = found.queries @ found.gallery.T if found.scores is None else found.scores
        for change in (scores - asked @ entries.T)[0].tolist():
            yield Evidence((change,))
