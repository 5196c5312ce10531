"""Which images of a catalog are searched for, in which others, and what is a right answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

from samething.arrays import Bool, Embeddings, Int
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.protocols import MEAN, Scope
from samething.retrieval import Relevant, TopK, exact_topk

Role: TypeAlias = Literal["test", "val"]
"""``test``: the roles ``query``, ``index`` and ``query+index``; ``val``: validation among itself."""

Pairs: TypeAlias = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]
"""Rows and the numbers of their labels, as many; a row with several labels has several pairs."""


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalTask:
    """Queries, a gallery and what is relevant in it."""

    queries: Int[np.ndarray, " q"]
    """Catalog rows, ascending."""
    gallery: Int[np.ndarray, " g"]
    """Catalog rows, ascending."""
    leave_out: Int[np.ndarray, " q"]
    """Place of each query's own image in the gallery, which it may not retrieve; -1 for none."""
    relevant: Relevant
    junk: Relevant | None = None
    """Entries that a query passes over, as if the gallery did not hold them; None for none."""

    @classmethod
    def of(cls, catalog: Catalog, role: Role) -> RetrievalTask:
        """All queries of a role, in one gallery over all domains.

        Raises:
            InputError: there are none, or a query has no label.
        """
        return cls.between(*rows_by_role(catalog, role), *label_pairs(catalog), len(catalog))

    @classmethod
    def between(
        cls,
        queries: Int[np.ndarray, " q"],
        gallery: Int[np.ndarray, " g"],
        labels: Pairs,
        junk: Pairs | None,
        num_rows: int,
    ) -> RetrievalTask:
        """Some queries in some gallery, with the ``label_pairs`` of their catalog of ``num_rows``."""

        def own_labels(rows: np.ndarray, pairs: Pairs = labels) -> Pairs:
            place = np.full(num_rows, -1, dtype=np.int64)
            place[rows] = np.arange(len(rows))
            kept = place[pairs[0]] >= 0
            return place[pairs[0][kept]], pairs[1][kept]

        position = np.full(num_rows, -1, dtype=np.int64)
        position[gallery] = np.arange(len(gallery))
        leave_out = position[queries]
        asked = own_labels(queries)
        relevant = Relevant.by_labels(
            asked, own_labels(gallery), num_queries=len(queries), leave_out=leave_out
        )
        passed = None
        if junk is not None:
            passed = Relevant.by_labels(asked, own_labels(gallery, junk), num_queries=len(queries))
        return cls(queries, gallery, leave_out, relevant, passed)

    def answers(
        self, embeddings: Embeddings, *, asked: Embeddings | None = None, depth: int = 1
    ) -> tuple[TopK, Bool[np.ndarray, "q k"]]:
        """What every query finds, so deep that a wrong entry is among it; and what of it is right.

        Args:
            embeddings: one row per catalog row.
            asked: the same as queries are compared; by default the very same.
            depth: least number of entries.
        """
        # one entry more than are right, so that a wrong one is among them
        depth = max(depth, int(self.relevant.counts.max(initial=0)) + 1)
        queries = (embeddings if asked is None else asked)[self.queries]
        found = exact_topk(queries, embeddings[self.gallery], depth, leave_out=self.leave_out)
        return found, self.is_right(np.arange(len(self.queries))[:, None], found.indices)

    def is_right(self, queries: Int[np.ndarray, ...], entries: Int[np.ndarray, ...]) -> Bool[np.ndarray, ...]:
        """Whether entries are relevant to queries, both by their places; -1 is never."""
        size = len(self.gallery)
        right: np.ndarray = np.isin(
            queries * size + entries, self.relevant.queries * size + self.relevant.rows
        )
        return right & (entries >= 0)


@dataclasses.dataclass(frozen=True, eq=False)
class TaskSet:
    """All searches of an evaluation; they depend on the catalog alone and serve any embedding of it."""

    num_rows: int
    """Rows of the catalog."""
    domains: tuple[str, ...]
    """Domains that have queries, sorted."""
    queries: Int[np.ndarray, " q"]
    """Catalog rows of all queries, ascending."""
    query_domains: Int[np.ndarray, " q"]
    """Domain of each query, as a position in ``domains``."""
    used: Int[np.ndarray, " u"]
    """Catalog rows of queries and index, ascending."""
    merged: RetrievalTask | None
    """All queries in one gallery over all domains, where the protocol has that scope."""
    per_domain: tuple[RetrievalTask, ...]
    """The queries of each domain in the gallery of their own, where the protocol has that scope."""

    @classmethod
    def of(cls, catalog: Catalog, role: Role, scopes: Sequence[Scope]) -> TaskSet:
        """The searches of a role's queries in some scopes.

        Raises:
            InputError: there are no queries or no index, a query has no label, or a domain is called mean.
        """
        if MEAN in catalog.domains:
            raise InputError(
                f"a domain called {MEAN!r}",
                expected="another name, because the mean over domains is reported under this one",
                next_step="rename the domain in the catalog",
            )
        queries, gallery = rows_by_role(catalog, role)
        pairs = (*label_pairs(catalog), len(catalog))
        names, domain_of_row = np.unique(catalog.strings("domain").astype(str), return_inverse=True)
        present, query_domains = np.unique(domain_of_row[queries], return_inverse=True)
        merged = RetrievalTask.between(queries, gallery, *pairs) if "merged" in scopes else None
        per_domain: list[RetrievalTask] = []
        for number, domain in enumerate(present if "per_domain" in scopes else ()):
            own = queries[query_domains == number]
            own_gallery = gallery[domain_of_row[gallery] == domain]
            is_all = merged is not None and len(own) == len(queries) and len(own_gallery) == len(gallery)
            per_domain.append(
                merged if is_all and merged is not None else RetrievalTask.between(own, own_gallery, *pairs)
            )
        return cls(
            num_rows=len(catalog),
            domains=tuple(str(names[domain]) for domain in present),
            queries=queries,
            query_domains=query_domains,
            used=np.union1d(queries, gallery),
            merged=merged,
            per_domain=tuple(per_domain),
        )


def label_pairs(catalog: Catalog) -> tuple[Pairs, Pairs | None]:
    """Pairs of catalog row and label, by ascending row; and those of the column ``junk``, if there is one.

    Labels are numbered by domain and name.
    """
    names = catalog.table.column_names
    if not {"labels", "junk"} & {*names}:
        return (np.arange(len(catalog)), catalog.class_ids()), None
    domains, own = catalog.strings("domain"), catalog.strings("label")
    numbers: dict[tuple[str, str], int] = {}

    def pairs(column: str, *, with_own: bool) -> Pairs:
        rows, labels = [], []
        several = catalog.table[column].to_pylist() if column in names else [None] * len(catalog)
        for row, further in enumerate(several):
            # a label that several domains have is called domain/label in the column label
            prefix, first = f"{domains[row]}/", [own[row]] if with_own else []
            every = dict.fromkeys(str(name).removeprefix(prefix) for name in (*first, *(further or ())))
            for name in every:
                if name:
                    rows.append(row)
                    labels.append(numbers.setdefault((domains[row], name), len(numbers)))
        return np.array(rows, dtype=np.int64), np.array(labels, dtype=np.int64)

    return pairs("labels", with_own=True), pairs("junk", with_own=False) if "junk" in names else None


def rows_by_role(catalog: Catalog, role: Role) -> tuple[Int[np.ndarray, " q"], Int[np.ndarray, " g"]]:
    """Catalog rows of the queries and of the index, ascending.

    Raises:
        InputError: there are none, or a query has no label.
    """
    if role == "val":
        queries = index = np.flatnonzero(catalog.has_role("val"))
        wanted = "images with the role val"
    else:
        queries = np.flatnonzero(catalog.has_role("query", "query+index"))
        index = np.flatnonzero(catalog.has_role("index", "query+index"))
        wanted = "images with the roles query and index, or query+index"
    if len(queries) == 0 or len(index) == 0:
        raise InputError(
            f"a catalog with {len(queries)} query images and {len(index)} index images",
            expected=wanted,
            next_step="set the role column, or make the catalog with shares for validation and test: "
            "samething catalog FOLDER --val 0.1 --test 0.2",
        )
    labels = catalog.strings("label")
    for row in queries:
        if not labels[row].strip():
            raise InputError(
                f"row {row} of the catalog is a query with an empty label",
                expected="the label of the thing it shows",
                next_step="fill in the label, or give the row another role",
            )
    return queries, index
