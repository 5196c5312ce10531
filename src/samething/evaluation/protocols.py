"""Queries × index → an :class:`EvaluationResult`, by the neutral protocol."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
from jaxtyping import Int

from samething.arrays import Embeddings, NumRelevant, PerQuery
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.results import MEAN, METRICS, EvaluationResult
from samething.metrics import (
    average_precision,
    modified_mean_precision_at_k,
    recall_at_k,
    relevance_from_ranks,
)
from samething.retrieval import Positives, Precision, positive_ranks, require_directions


def evaluate_embeddings(
    embeddings: Embeddings,
    catalog: Catalog,
    *,
    roles: Literal["test", "val"] = "test",
    precision: Precision = "float64",
    memory_mib: int = 256,
    num_resamples: int = 2000,
    seed: int = 0,
) -> EvaluationResult:
    """Search every query among the index pictures by cosine similarity, and score what is found.

    A hit bears the query's label and is of its domain. A picture that is query and index at once is not
    searched for in itself. Entries whose similarities are equal are ranked in catalog order.

    Args:
        embeddings: float16, float32 or float64, one row a picture in catalog order, any norm above 0.
        catalog: labels, domains and roles of the same pictures; the picture files are not opened.
        roles: ``test`` takes the roles ``query``, ``index`` and ``query+index``; ``val`` searches each
            validation picture among the others.
        precision: ``float64`` for results that do not depend on the machine, ``float32`` for big jobs.
        memory_mib: ceiling of the search's working memory in MiB; beside it stand copies of the rows used.
        num_resamples: bootstrap resamples behind each interval.
        seed: of the bootstrap.

    Raises:
        InputError: the rows are not those of the catalog, one that is used is zero or not finite, a label is
            empty, there are no queries or no index, or a domain is called ``mean``.
    """
    if len(embeddings) != len(catalog):
        raise InputError(
            f"{len(embeddings)} embeddings for a catalog of {len(catalog)} pictures",
            expected="one embedding a picture, in catalog order",
            next_step="give the catalog that the embeddings were made from",
        )
    query_rows, index_rows = _rows_by_role(catalog, roles)
    used = np.union1d(query_rows, index_rows)
    domains = catalog.strings("domain").astype(str)
    _check_labels(catalog, used, domains)
    require_directions(embeddings, used)

    classes = catalog.class_ids()
    names, query_domains = np.unique(domains[query_rows], return_inverse=True)
    search = functools.partial(
        _search, embeddings, classes=classes, precision=precision, memory_mib=memory_mib
    )
    num_relevant, merged = search(query_rows, index_rows)
    per_domain = {name: np.full(len(query_rows), np.nan) for name in METRICS}
    num_index = []
    for number, domain in enumerate(names):
        own = query_domains == number
        own_index = index_rows[domains[index_rows] == domain]
        num_index.append(len(own_index))
        for name, values in search(query_rows[own], own_index)[1].items():
            per_domain[name][own] = values
    return EvaluationResult(
        domains=tuple(str(name) for name in names),
        query_rows=query_rows,
        query_domains=query_domains,
        num_relevant=num_relevant,
        num_index=tuple(num_index),
        num_distractors=len(index_rows) - sum(num_index),
        dim=embeddings.shape[1],
        values={"merged": merged, "per_domain": per_domain},
        num_resamples=num_resamples,
        seed=seed,
    )


def _rows_by_role(
    catalog: Catalog, roles: Literal["test", "val"]
) -> tuple[Int[np.ndarray, " q"], Int[np.ndarray, " g"]]:
    if roles == "val":
        query_rows = index_rows = np.flatnonzero(catalog.has_role("val"))
    else:
        query_rows = np.flatnonzero(catalog.has_role("query", "query+index"))
        index_rows = np.flatnonzero(catalog.has_role("index", "query+index"))
    if len(query_rows) == 0 or len(index_rows) == 0:
        found = ", ".join(sorted(set(catalog.strings("role")))) or "none"
        wanted = "val" if roles == "val" else "query and index, or query+index"
        raise InputError(
            f"a catalog with {len(query_rows)} queries and {len(index_rows)} index pictures (roles: {found})",
            expected=f"pictures with the role {wanted}",
            next_step="give the catalog a role column, or split it: samething catalog --help",
        )
    return query_rows, index_rows


def _check_labels(catalog: Catalog, used: Int[np.ndarray, " n"], domains: np.ndarray) -> None:
    if MEAN in domains[used]:
        raise InputError(
            f"a domain called {MEAN!r}",
            expected=f"another name: {MEAN!r} is the mean over domains in the result",
            next_step="rename the domain in the catalog",
        )
    labels = catalog.strings("label")
    empty = [int(row) for row in used if not labels[row].strip()]
    if empty:
        raise InputError(
            f"row {empty[0]} has an empty label ({len(empty)} in all)",
            expected="a label for every query and index picture",
            next_step="label it; give a picture of something unknown a label of its own",
        )


def _search(
    embeddings: Embeddings,
    query_rows: Int[np.ndarray, " q"],
    index_rows: Int[np.ndarray, " g"],
    *,
    classes: Int[np.ndarray, " n"],
    precision: Precision,
    memory_mib: int,
) -> tuple[NumRelevant, dict[str, PerQuery]]:
    """Relevant pictures and metrics of each query in one index."""
    own = np.full(len(classes), -1, dtype=np.int64)
    own[index_rows] = np.arange(len(index_rows))
    leave_out = own[query_rows]
    positives = Positives.from_labels(classes[query_rows], classes[index_rows], leave_out=leave_out)
    ranks = positive_ranks(
        embeddings[query_rows],
        embeddings[index_rows],
        positives,
        leave_out=leave_out,
        precision=precision,
        memory_mib=memory_mib,
    )
    relevance = relevance_from_ranks(ranks, positives.counts, k=5)
    return positives.counts, {
        "mmp@5": modified_mean_precision_at_k(relevance, positives.counts, k=5),
        "r@1": recall_at_k(relevance, positives.counts, k=1),
        "map": average_precision(ranks, positives.counts),
    }
