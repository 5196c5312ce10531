"""A second look in an evaluation: the candidates of every query, ordered again, and what that is worth."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Final

import numpy as np

from samething.arrays import Embeddings, Float, Gallery, Int, Queries, unit
from samething.catalog import Catalog
from samething.errors import ImageError
from samething.evaluation.task import RetrievalTask
from samething.images import decode, disk_state, in_threads
from samething.progress import progress_bar
from samething.rerank import Kept, Reranker, Shown, Trust, second_look
from samething.rerank.gains import Refined, require_pairs
from samething.rerank.second_look import NUM_CANDIDATES
from samething.retrieval import exact_topk

_LEARNED_FROM: Final = 20
"""Candidates of each validation query that weights are learned from."""
_Numbers = dict[tuple[int, int], tuple[float, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class LookedAgain:
    """A re-ranker on a catalog's images; what it needs of them is kept in the user's cache."""

    reranker: Reranker
    catalog: Catalog
    trust: Trust
    known: _Numbers = dataclasses.field(default_factory=dict)
    """Query and candidate, as catalog rows -> the evidence; the scopes of an evaluation share pairs."""

    @classmethod
    def taught(cls, reranker: Reranker, catalog: Catalog, embeddings: Embeddings) -> LookedAgain:
        """Weights learned from the validation images, searched among themselves.

        Args:
            reranker: what looks.
            catalog: with validation images.
            embeddings: of every row of the catalog.

        Raises:
            InputError: there are no validation images.
        """
        look = cls(reranker, catalog, Trust.untaught(reranker.weights))
        task = RetrievalTask.of(catalog, "val")
        found = exact_topk(
            embeddings[task.queries], embeddings[task.gallery], _LEARNED_FROM, leave_out=task.leave_out
        )
        numbers = look._numbers(task, embeddings[task.queries], embeddings[task.gallery], found.indices)
        queries, places = np.nonzero(found.indices >= 0)
        entries = found.indices[queries, places]
        trust = Trust.fit(
            found.scores[queries, places].astype(np.float64), numbers[queries, places],
            task.is_right(queries, entries), queries,
            catalog.strings("domain")[task.gallery[entries]].tolist(), otherwise=reranker.weights,
        )  # fmt: skip
        return dataclasses.replace(look, trust=trust)

    def refined(self, task: RetrievalTask, queries: Queries, gallery: Gallery) -> Refined:
        """The scores of a search, each raised by what the second look adds; of the best hundred alone."""
        require_pairs(len(queries), len(gallery))
        found = exact_topk(queries, gallery, NUM_CANDIDATES, leave_out=task.leave_out)
        numbers = self._numbers(task, queries, gallery, found.indices)
        scores = np.round(unit(queries, np.float64) @ unit(gallery, np.float64).T, 10)
        domains = self.catalog.strings("domain")[task.gallery]
        for query, own in enumerate(found.indices):
            there = own >= 0
            scores[query, own[there]] += self.trust.added(numbers[query, there], domains[own[there]].tolist())
        return Refined(queries, gallery, scores)

    def _numbers(
        self, task: RetrievalTask, queries: Queries, gallery: Gallery, candidates: Int[np.ndarray, "q k"]
    ) -> Float[np.ndarray, "q k f"]:
        """The evidence for each candidate of each query; zeros where an image cannot be read."""
        kept = Kept.of_user()

        def shown(row: int, vector: Float[np.ndarray, " d"]) -> Shown:
            source = self.catalog.source(row)
            content = self.catalog.table["sha256"][row].as_py()
            if not content and not source.is_remote:
                content = f"{source.location} {disk_state(source.location).get('mark')}"
            return Shown(f"{content} {source.box or ''}" if content else "", lambda: decode(source), vector)

        def looked(query: int) -> Sequence[tuple[int, tuple[float, ...]]]:
            row = int(task.queries[query])
            new = [
                int(entry)
                for entry in candidates[query]
                if entry >= 0 and (row, int(task.gallery[entry])) not in self.known
            ]
            others = [shown(int(task.gallery[entry]), gallery[entry]) for entry in new]
            evidence = second_look(self.reranker, shown(row, queries[query]), others, kept)
            return [(entry, one.numbers) for entry, one in zip(new, evidence, strict=True) if one is not None]

        found = np.zeros((*candidates.shape, len(self.reranker.weights)))
        with progress_bar("queries") as progress:
            bar = progress.add_task(self.reranker.name, total=len(queries))
            work = in_threads(looked, range(len(queries)), ahead=8, num_threads=os.cpu_count() or 1)
            for query, one in enumerate(work):
                row = int(task.queries[query])
                known = self.known if self.reranker.made_from is not None else {}
                if not isinstance(one, ImageError):
                    known.update({(row, int(task.gallery[entry])): numbers for entry, numbers in one})
                for place, entry in enumerate(candidates[query]):
                    if entry >= 0 and (pair := (row, int(task.gallery[entry]))) in known:
                        found[query, place] = known[pair]
                progress.advance(bar)
        return found
