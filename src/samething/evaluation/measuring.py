"""How well embeddings find the same thing: queries x gallery -> numbers per domain.

A protocol's gallery holds all domains (*merged*: a hit needs the same label and the same domain) or one
(*per_domain*). A query that is also in the gallery never retrieves itself, by row and not by rank. Metrics
come from the ranks of the relevant entries in the ranking of the whole gallery.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from samething.arrays import Embeddings, Float, Int
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.embedding_files import open_embeddings
from samething.evaluation.looked_again import LookedAgain
from samething.evaluation.protocols import Protocol, Scope, protocol_of
from samething.evaluation.result import Comparison, EvaluationResult
from samething.evaluation.task import RetrievalTask, Role, TaskSet
from samething.metrics import Metric, measure
from samething.rerank.gains import Gain
from samething.retrieval import Precision, RankCounter, ranks_of_scores, require_directions

PerMetric: TypeAlias = dict[Metric, np.ndarray]
"""One value per query for each metric."""


def evaluate_embeddings(
    embeddings: Embeddings,
    catalog: Catalog | TaskSet,
    *,
    precision: Precision = "float64",
    num_resamples: int = 2000,
    role: Role = "test",
    protocol: str | Protocol = "default",
    distractors: Sequence[Path] = (),
    gain: Gain | LookedAgain | None = None,
    shown: Scope = "merged",
    show_progress: bool = False,
) -> EvaluationResult:
    """Search the index images of a catalog with its query images, by a protocol.

    A catalog may have a column ``labels``, a list of strings: further labels of the image in its domain. A
    hit then shares one with the query. Queries pass over entries that have their label in a column ``junk``.

    Args:
        embeddings: one row per catalog row, float16, float32 or float64; may be memory-mapped. Rows that are
            neither query nor index are not looked at.
        catalog: its roles say which rows are queries and which are the index; the files need not exist.
            Or the searches that were made of one.
        precision: ``float64`` is exact and repeatable, ``float32`` faster (see :mod:`samething.retrieval`).
        num_resamples: bootstrap resamples behind each interval, at least 1.
        role: ``test`` uses the roles ``query``, ``index`` and ``query+index``; ``val`` searches the
            validation images among themselves.
        protocol: a protocol or its name.
        distractors: further ``.npy`` files of index rows that are relevant to nothing, of no domain;
            they are read a block at a time, and only the merged index holds them.
        gain: what is done with the vectors of each search before its ranking counts: see ``GAINS``; or a
            second look at its results.
        shown: the scope that printing the result shows, where the protocol has it.
        show_progress: show a bar.

    Raises:
        InputError: the numbers of rows differ, there are no queries or no index, a row is zero or not finite,
            a query has no label, a domain is called ``mean``, there are more dimensions than the protocol
            allows, or distractors do not fit.
    """
    protocol = protocol if isinstance(protocol, Protocol) else protocol_of(protocol)
    tasks = catalog if isinstance(catalog, TaskSet) else TaskSet.of(catalog, role, protocol.scopes)
    shards = [open_embeddings(Path(path)) for path in distractors]
    _check(embeddings, tasks, protocol, num_resamples, list(zip(distractors, shards, strict=True)), gain)
    search: dict[str, Any] = {"gain": gain, "precision": precision, "show_progress": show_progress}
    merged: PerMetric = {}
    if tasks.merged is not None:
        merged = _measured(tasks.merged, embeddings, shards, protocol, **search)
    per_domain: PerMetric = {}
    if tasks.per_domain:
        per_domain = {metric: np.empty(len(tasks.queries)) for metric in protocol.metrics}
    for number, task in enumerate(tasks.per_domain):
        found = merged
        if task is not tasks.merged or shards:
            found = _measured(task, embeddings, [], protocol, **search)
        for metric in protocol.metrics:
            per_domain[metric][tasks.query_domains == number] = found[metric]
    return EvaluationResult(
        domains=tasks.domains,
        query_rows=tasks.queries,
        query_domains=tasks.query_domains,
        merged=merged,
        per_domain=per_domain,
        num_resamples=num_resamples,
        protocol=protocol,
        shown=shown,
    )


def compare_embeddings(
    embeddings: Mapping[str, np.ndarray],
    catalog: Catalog,
    *,
    protocol: str | Protocol = "default",
    gains: Mapping[str, Gain | LookedAgain] | None = None,
    role: Role = "test",
    **options: Any,
) -> Comparison:
    """Several embeddings of one catalog, each evaluated by itself, with the gain of its name if it has one.

    Arguments are those of :func:`evaluate_embeddings`.

    Raises:
        InputError: there are none, or as :func:`evaluate_embeddings`.
    """
    if not embeddings:
        raise InputError("no embeddings", expected="at least one", next_step="name what is to be compared")
    protocol = protocol if isinstance(protocol, Protocol) else protocol_of(protocol)
    tasks = TaskSet.of(catalog, role, protocol.scopes)
    results = {
        name: evaluate_embeddings(rows, tasks, protocol=protocol, gain=(gains or {}).get(name), **options)
        for name, rows in embeddings.items()
    }
    dimensions = {name: rows.shape[1] for name, rows in embeddings.items()}
    return Comparison(results=results, dimensions=dimensions)


def _measured(
    task: RetrievalTask,
    embeddings: Embeddings,
    further: Iterable[np.ndarray],
    protocol: Protocol,
    *,
    gain: Gain | LookedAgain | None,
    precision: Precision,
    show_progress: bool,
) -> PerMetric:
    """The protocol's metrics, by the ranks of what is relevant in the gallery and ``further`` parts of it."""
    queries, gallery = _take(embeddings, task.queries), _take(embeddings, task.gallery)
    if gain is not None:
        if isinstance(gain, LookedAgain):
            refined = gain.refined(task, queries, gallery)
        else:
            refined = gain(queries, gallery, task.leave_out)
        queries, gallery = refined.queries, refined.gallery
        if refined.scores is not None:
            if task.junk is not None:
                refined.scores[task.junk.queries, task.junk.rows] = -np.inf
            ranks = ranks_of_scores(refined.scores, task.relevant, leave_out=task.leave_out)
            return measure(protocol.metrics, ranks, task.relevant.counts)
    counter = RankCounter(
        queries, gallery, task.relevant, leave_out=task.leave_out, junk=task.junk,
        distance=protocol.distance, precision=precision,
    )  # fmt: skip
    for part in (gallery, *further):
        counter.count(part, show_progress=show_progress)
    return measure(protocol.metrics, counter.ranks(), task.relevant.counts)


def _check(
    embeddings: Embeddings,
    tasks: TaskSet,
    protocol: Protocol,
    num_resamples: int,
    distractors: Sequence[tuple[Path, np.ndarray]],
    gain: Gain | LookedAgain | None,
) -> None:
    if num_resamples < 1:
        raise InputError(
            f"num_resamples={num_resamples}", expected="at least 1", next_step="leave it at 2000"
        )
    if len(embeddings) != tasks.num_rows:
        raise InputError(
            f"{len(embeddings)} embeddings for a catalog of {tasks.num_rows} images",
            expected="one embedding per row of the catalog, in its order",
            next_step="give the catalog that the embeddings were made from",
        )
    if protocol.largest_dim is not None and embeddings.shape[1] > protocol.largest_dim:
        raise InputError(
            f"embeddings of {embeddings.shape[1]} dimensions for the protocol {protocol.name}",
            expected=f"at most {protocol.largest_dim} dimensions, which is its rule",
            next_step="train a smaller head, or reduce the embeddings",
        )
    if protocol.distance == "cosine":
        require_directions(embeddings, tasks.used)
    if distractors and gain is not None:
        raise InputError(
            "a gain together with distractors",
            expected="one of them: a gain needs the whole index at once",
            next_step="leave one out",
        )
    if distractors and (protocol.distance != "cosine" or "merged" not in protocol.scopes):
        raise InputError(
            f"distractors with the protocol {protocol.name}",
            expected="a protocol with a merged index and cosine similarity",
            next_step="use --protocol ilias, or custom",
        )
    for file, shard in distractors:
        if shard.shape[1] != embeddings.shape[1]:
            raise InputError(
                f"{file} holds rows of {shard.shape[1]} dimensions",
                expected=f"{embeddings.shape[1]}, as the embeddings have",
                next_step="embed the distractors with the same model",
            )


def _take(embeddings: Embeddings, rows: Int[np.ndarray, " r"]) -> Float[np.ndarray, "r d"]:
    """The rows, as a view where they lie side by side, so that a memory-mapped file is not read at once."""
    side_by_side = len(rows) > 0 and rows[-1] - rows[0] + 1 == len(rows)
    return np.asarray(embeddings[rows[0] : rows[-1] + 1] if side_by_side else embeddings[rows])
