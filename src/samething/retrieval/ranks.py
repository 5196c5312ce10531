"""The rank of every relevant entry in its query's ranking of the whole gallery.

A rank is 1 + the number of entries ahead, and those can be counted block by block: neither the gallery nor a
query's scores need to be in memory at once, so a gallery may also come as a stream of shards.

An irrelevant entry whose score is that of a relevant one is ahead of it: what a model cannot tell apart is no
merit of the catalog's order. Embeddings that are all equal so have the worst rank there is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from samething.arrays import Float, Gallery, Int, NumRelevant, Queries, counted
from samething.progress import progress_bar
from samething.retrieval.on_device import num_ahead
from samething.retrieval.scores import (
    Distance,
    Precision,
    Scorer,
    pair_scores,
    require_search,
    score_tiles,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Relevant:
    """The relevant gallery rows of every query."""

    rows: Int[np.ndarray, " p"]
    """Gallery rows, one query after another, ascending and each once in every query."""
    counts: NumRelevant
    """How many of them each query has."""

    @classmethod
    def by_labels(
        cls,
        query_labels: tuple[Int[np.ndarray, " a"], Int[np.ndarray, " a"]],
        gallery_labels: tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]],
        *,
        num_queries: int,
        leave_out: Int[np.ndarray, " q"] | None = None,
    ) -> Relevant:
        """Entries that share a label with the query, where both may bear several.

        Args:
            query_labels: pairs of query and label.
            gallery_labels: pairs of gallery row and label.
            num_queries: number of queries.
            leave_out: gallery row that does not count for each query; -1 for none.
        """
        order = np.argsort(gallery_labels[1], kind="stable")
        sorted_labels = gallery_labels[1][order]
        asked, labels = query_labels
        starts = np.searchsorted(sorted_labels, labels, side="left")
        lengths = np.searchsorted(sorted_labels, labels, side="right") - starts
        query = np.repeat(asked, lengths)
        rows = gallery_labels[0][order[np.repeat(starts, lengths) + counted(lengths)]]
        if leave_out is not None:
            kept = rows != leave_out[query]
            query, rows = query[kept], rows[kept]
        sorting = np.lexsort((rows, query))
        query, rows = query[sorting], rows[sorting]
        first = np.ones(len(rows), dtype=bool)
        first[1:] = (np.diff(query) != 0) | (np.diff(rows) != 0)
        return cls(
            rows[first].astype(np.int64), np.bincount(query[first], minlength=num_queries).astype(np.int64)
        )

    @property
    def queries(self) -> Int[np.ndarray, " p"]:
        """The query of each of :attr:`rows`."""
        return np.repeat(np.arange(len(self.counts)), self.counts)


class RankCounter:
    """Counts the entries ahead of each query's relevant ones, block of gallery by block of gallery.

    Args:
        queries: one row per query.
        gallery: rows that hold the relevant entries.
        relevant: which of them.
        leave_out: gallery row that each query may not retrieve; -1 for none.
        junk: further rows that each query passes over, as if the gallery did not hold them.
        memory_mib: ceiling in MiB of the working memory beyond arguments and result.
        precision: float64 or float32.
        distance: euclidean only for a gallery that is counted whole: its scale comes from it.
        device: as in ``exact_topk``.

    Raises:
        InputError: as in ``exact_topk``.
    """

    def __init__(
        self,
        queries: Queries,
        gallery: Gallery,
        relevant: Relevant,
        *,
        leave_out: Int[np.ndarray, " q"] | None = None,
        junk: Relevant | None = None,
        memory_mib: int = 256,
        precision: Precision = "float64",
        distance: Distance = "cosine",
        device: str | None = None,
    ) -> None:
        query, rows = relevant.queries, relevant.rows
        require_search(leave_out, len(gallery), memory_mib)
        self._queries, self._leave_out, self._memory_mib = queries, leave_out, memory_mib
        self._scorer = Scorer.of(
            queries, gallery, precision=precision, distance=distance, normalised=False, device=device
        )
        self._num_counted = 0
        scores = pair_scores(self._scorer, queries, gallery, (query, rows), memory_mib=memory_mib)
        order = np.lexsort((scores, query))  # worst first in each query
        self._query, self._score = query, scores[order]
        self._ahead = np.zeros(len(rows), dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(relevant.counts)])
        # entries that are not counted: relevant ones are ranked among themselves by their order
        passed = [(query, rows), *([] if junk is None else [(junk.queries, junk.rows)])]
        self._passed_query, self._passed_row = (np.concatenate(part) for part in zip(*passed, strict=True))
        by_row = np.argsort(self._passed_row, kind="stable")
        self._passed_query, self._passed_row = self._passed_query[by_row], self._passed_row[by_row]

    def count(self, gallery: Gallery, *, show_progress: bool = False) -> None:
        """Meet the next gallery rows; they are numbered on from those met before.

        Raises:
            InputError: a row is zero or not finite.
        """
        million = len(self._queries) * len(gallery) / 1e6
        with progress_bar("million pairs", disable=not show_progress or million < 1) as progress:
            task = progress.add_task("ranks", total=round(million))
            for own, columns, scores in score_tiles(
                self._scorer,
                self._queries,
                gallery,
                leave_out=self._leave_out,
                memory_mib=self._memory_mib,
                first_row=self._num_counted,
            ):
                inside = slice(*np.searchsorted(self._passed_row, [columns.start, columns.stop]))
                query, row = self._passed_query[inside], self._passed_row[inside]
                mine = (query >= own.start) & (query < own.stop)
                scores[query[mine] - own.start, row[mine] - columns.start] = -np.inf
                self._add(own.start, scores)
                progress.advance(task, len(scores) * scores.shape[1] / 1e6)
        self._num_counted += len(gallery)

    def _add(self, first: int, tile: Any) -> None:
        """Count in the scores of some queries from the ``first`` on."""
        starts = self._starts[first : first + len(tile) + 1]
        if isinstance(tile, np.ndarray):
            for row, start, stop in zip(tile, starts, starts[1:], strict=False):
                if start < stop:
                    self._ahead[start:stop] += _num_ahead(row, self._score[start:stop])
        elif starts[0] < starts[-1]:
            counts = np.diff(starts)
            is_one = np.arange(counts.max()) < counts[:, None]
            relevant = np.full(is_one.shape, np.inf, self._score.dtype)
            relevant[is_one] = self._score[starts[0] : starts[-1]]
            self._ahead[starts[0] : starts[-1]] += num_ahead(tile, relevant)[is_one]

    def ranks(self) -> Int[np.ndarray, " p"]:
        """Ranks so far, counted from 1, one query after another, ascending in each."""
        stops = np.repeat(self._starts[1:], np.diff(self._starts))
        # the last of a query's relevant entries is its best
        among_relevant = stops - np.arange(len(self._ahead))
        ranks = self._ahead + among_relevant
        order = np.lexsort((ranks, self._query))
        return np.asarray(ranks[order])


def ranks_of_scores(
    scores: Float[np.ndarray, "q g"], relevant: Relevant, *, leave_out: Int[np.ndarray, " q"] | None = None
) -> Int[np.ndarray, " p"]:
    """What :meth:`RankCounter.ranks` gives, from scores that were made in another way.

    Args:
        scores: every query with every entry, higher is nearer; ties count against the model.
        relevant: the relevant entries.
        leave_out: entry that each query may not retrieve; -1 for none.

    >>> ranks_of_scores(np.array([[0.5, 0.9, 0.5]]), Relevant(rows=np.array([2]), counts=np.array([1])))
    array([3])
    """
    found = [np.empty(0, dtype=np.int64)]
    stops = np.cumsum(relevant.counts)
    for query in np.flatnonzero(relevant.counts):
        rows = relevant.rows[stops[query] - relevant.counts[query] : stops[query]]
        row = scores[query].copy()
        values = np.sort(row[rows])  # worst first
        row[rows] = -np.inf
        if leave_out is not None and leave_out[query] >= 0:
            row[leave_out[query]] = -np.inf
        found.append((_num_ahead(row, values) + np.arange(len(values), 0, -1))[::-1])
    return np.concatenate(found)


def _num_ahead(row: Float[np.ndarray, " c"], scores: Float[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
    """How many irrelevant entries of a block are ahead of each relevant one, worst first; ties are."""
    found = row[row >= scores[0]]
    if not len(found):
        return np.zeros(len(scores), dtype=np.int64)
    # an entry is ahead of as many of the relevant ones, counted from the worst
    counts = np.bincount(np.searchsorted(scores, found, side="right"), minlength=len(scores) + 1)
    return np.asarray(counts[::-1].cumsum()[::-1][1:])
