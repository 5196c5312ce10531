"""How well embeddings find the same thing: queries x index -> numbers per domain.

Where a protocol has both, an index holds all domains (*merged*: a hit needs the same label and the same
domain) or one (*per_domain*). A query that is also in the index never retrieves itself, by row and not by
rank. Metrics come from the ranks of the relevant entries in the ranking of the whole index.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from samething.arrays import Embeddings
from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.evaluation.gains import Gain
from samething.evaluation.result import MEAN, EvaluationResult
from samething.evaluation.rules import Metric, Rules, rules_of
from samething.retrieval import Precision, RankCounter, Relevant, ranks_of_scores, require_directions


def evaluate_embeddings(
    embeddings: Embeddings,
    catalog: Catalog,
    *,
    precision: Precision = "float64",
    num_resamples: int = 2000,
    role: Literal["test", "val"] = "test",
    memory_mib: int = 256,
    rules: str | Rules = "default",
    distractors: Sequence[Path] = (),
    gain: Gain | None = None,
    show_progress: bool = False,
) -> EvaluationResult:
    """Search the index images of a catalog with its query images, by the rules of a protocol.

    A catalog may have a column ``labels``, a list of strings: further labels of the image in its domain. A
    hit then shares one with the query.

    Args:
        embeddings: one row a catalog row, float16, float32 or float64; may be memory-mapped. Rows that are
            neither query nor index are not looked at.
        catalog: its roles say which rows are queries and which are the index; the files need not exist.
        precision: ``float64`` is exact and repeatable, ``float32`` faster (see :mod:`samething.retrieval`).
        num_resamples: bootstrap resamples behind each interval, at least 1.
        role: ``test`` uses the roles ``query``, ``index`` and ``query+index``; ``val`` searches the
            validation images among themselves.
        memory_mib: ceiling of the search's working memory in MiB, beyond the embeddings of queries and index.
        rules: a protocol's name or its rules.
        distractors: further ``.npy`` files of index rows that are relevant to nothing, of no domain;
            they are read a block at a time, and only the merged index holds them.
        gain: what is done with the vectors of each search before its ranking counts: see ``GAINS``.
        show_progress: show a bar.

    Raises:
        InputError: the numbers of rows differ, there are no queries or no index, a row is zero or not finite,
            a query has no label, or a domain is called ``mean``, there are
            more dimensions than the protocol allows, or distractors do not fit.
    """
    rules = rules_of(rules)
    _check(embeddings, catalog, num_resamples, rules)
    shards = [open_embeddings(Path(path)) for path in distractors]
    _check_distractors(shards, distractors, embeddings, rules)
    if shards and gain is not None:
        raise InputError(
            "a gain together with distractors",
            expected="one of them: a gain needs the whole index at once",
            next_step="leave one out",
        )
    query_rows, index_rows = rows_by_role(catalog, role)
    used = np.union1d(query_rows, index_rows)
    if rules.distance == "cosine":
        require_directions(embeddings, used)
    labels = label_pairs(catalog)
    names, domain_of_row = np.unique(catalog.strings("domain").astype(str), return_inverse=True)

    def measure(
        queries: np.ndarray, index: np.ndarray, further: list[np.ndarray]
    ) -> dict[Metric, np.ndarray]:
        position = np.full(len(catalog), -1, dtype=np.int64)
        position[index] = np.arange(len(index))
        relevant = Relevant.by_labels(
            labels_of(labels, queries, len(catalog)),
            labels_of(labels, index, len(catalog)),
            num_queries=len(queries),
            leave_out=position[queries],
        )
        asked, gallery = _take(embeddings, queries), _take(embeddings, index)
        if gain is not None:
            refined = gain(asked, gallery, position[queries])
            asked, gallery = refined.queries, refined.gallery
            if refined.scores is not None:
                found = ranks_of_scores(refined.scores, relevant, leave_out=position[queries])
                return rules.measure(found, relevant.counts)
        counter = RankCounter(
            asked,
            gallery,
            relevant,
            leave_out=position[queries],
            precision=precision,
            distance=rules.distance,
            memory_mib=memory_mib,
        )
        for part in (gallery, *further):
            counter.count(part, show_progress=show_progress)
        return rules.measure(counter.ranks(), relevant.counts)

    present, query_domains = np.unique(domain_of_row[query_rows], return_inverse=True)
    merged = measure(query_rows, index_rows, shards) if "merged" in rules.scopes else {}
    per_domain: dict[Metric, np.ndarray] = {}
    if "per_domain" in rules.scopes:
        per_domain = {metric: np.empty(len(query_rows)) for metric in rules.metrics}
        for number, domain in enumerate(present):
            own = query_domains == number
            own_index = index_rows[domain_of_row[index_rows] == domain]
            one_domain = merged and not shards and own.all() and len(own_index) == len(index_rows)
            found = merged if one_domain else measure(query_rows[own], own_index, [])
            for metric in rules.metrics:
                per_domain[metric][own] = found[metric]
    return EvaluationResult(
        domains=tuple(str(names[domain]) for domain in present),
        query_rows=query_rows,
        query_domains=query_domains,
        merged=merged,
        per_domain=per_domain,
        num_resamples=num_resamples,
        rules=rules,
    )


def label_pairs(catalog: Catalog) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """Pairs of catalog row and label, by ascending row; labels are numbered by domain and name."""
    if "labels" not in catalog.table.column_names:
        return np.arange(len(catalog)), catalog.class_ids()
    domains, own = catalog.strings("domain"), catalog.strings("label")
    numbers: dict[tuple[str, str], int] = {}
    rows, labels = [], []
    for row, further in enumerate(catalog.table["labels"].to_pylist()):
        # a label that several domains have is called domain/label in the column label
        prefix = f"{domains[row]}/"
        every = dict.fromkeys(str(name).removeprefix(prefix) for name in (own[row], *(further or ())))
        for name in every:
            if name:
                rows.append(row)
                labels.append(numbers.setdefault((domains[row], name), len(numbers)))
    return np.array(rows, dtype=np.int64), np.array(labels, dtype=np.int64)


def labels_of(
    pairs: tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]], chosen: Int[np.ndarray, " r"], num_rows: int
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """The pairs of the chosen rows, with a row's place among the chosen instead of its number."""
    place = np.full(num_rows, -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    kept = place[pairs[0]] >= 0
    return place[pairs[0][kept]], pairs[1][kept]


# ---- reading and checking


def rows_by_role(
    catalog: Catalog, role: Literal["test", "val"]
) -> tuple[Int[np.ndarray, " q"], Int[np.ndarray, " g"]]:
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
            next_step="set the role column of the catalog",
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


def _check(embeddings: Embeddings, catalog: Catalog, num_resamples: int, rules: Rules) -> None:
    if len(embeddings) != len(catalog):
        raise InputError(
            f"{len(embeddings)} embeddings for a catalog of {len(catalog)} images",
            expected="one embedding per row of the catalog, in its order",
            next_step="give the catalog that the embeddings were made from",
        )
    if num_resamples < 1:
        raise InputError(
            f"num_resamples={num_resamples}", expected="at least 1", next_step="leave it at 2000"
        )
    if MEAN in catalog.domains:
        raise InputError(
            f"a domain called {MEAN!r}",
            expected="another name, because the mean over domains is reported under this one",
            next_step="rename the domain in the catalog",
        )

    if rules.largest_dim is not None and embeddings.shape[1] > rules.largest_dim:
        raise InputError(
            f"embeddings of {embeddings.shape[1]} dimensions for the protocol {rules.name}",
            expected=f"at most {rules.largest_dim} dimensions, which are its rules",
            next_step="train a smaller head, or reduce the embeddings: samething evaluate RUN --sweep",
        )


def _check_distractors(
    shards: Sequence[np.ndarray], files: Sequence[Path], embeddings: Embeddings, rules: Rules
) -> None:
    if shards and (rules.distance != "cosine" or "merged" not in rules.scopes):
        raise InputError(
            f"distractors with the protocol {rules.name}",
            expected="a protocol with a merged index and cosine similarity",
            next_step="use --protocol ilias, or custom",
        )
    for shard, file in zip(shards, files, strict=True):
        if shard.shape[1] != embeddings.shape[1]:
            raise InputError(
                f"{file} holds rows of {shard.shape[1]} dimensions",
                expected=f"{embeddings.shape[1]}, as the embeddings have",
                next_step="embed the distractors with the same model",
            )


def _take(embeddings: Embeddings, rows: Int[np.ndarray, " r"]) -> Float[np.ndarray, "r d"]:
    """The rows, as a view where they lie side by side, so that a memory-mapped file is not read at once."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        side_by_side: np.ndarray = embeddings[rows[0] : rows[-1] + 1]
        return side_by_side
    copied: np.ndarray = embeddings[rows]
    return copied


def open_embeddings(source: Path) -> np.ndarray:
    """A ``.npy`` file of floats (n, d), memory-mapped.

    Raises:
        ArtefactError: it is missing or damaged.
        InputError: it holds something else.
    """
    expected = "a .npy file of float16, float32 or float64, one row per image"
    if not source.is_file():
        raise ArtefactError(f"{source} is not a file", expected=expected, next_step="check the path")
    try:
        rows = np.load(source, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ArtefactError(
            f"{source} cannot be read ({error})",
            expected=expected,
            next_step="write it with numpy.save, and check that the file is whole",
        ) from error
    if not isinstance(rows, np.ndarray):  # an .npz archive, whatever it is called
        raise InputError(
            f"{source} holds several arrays", expected=expected, next_step="save one: numpy.save"
        )
    if rows.ndim != 2 or rows.dtype not in (np.float16, np.float32, np.float64):
        raise InputError(
            f"{source} holds {rows.dtype} of shape {rows.shape}",
            expected=expected,
            next_step="convert it with numpy: numpy.save(path, rows.astype(numpy.float32))",
        )
    return rows
