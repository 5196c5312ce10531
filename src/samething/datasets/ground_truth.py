"""Benchmarks whose right answers are listed query by query: ROxford, RParis, INSTRE and FORB."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from samething.datasets.boxes import box_columns
from samething.datasets.dataset import Reader
from samething.datasets.official import OfficialFiles

_REVISITED: Final[Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "easy": (("easy",), ("junk", "hard")),
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}
"""Difficulty -> a query's lists of right answers and of what it passes over (Radenović et al., CVPR 2018)."""


def revisited(folder: str) -> Reader:
    """A reader of ``gnd_FOLDER.mat`` and ``jpg/``; the difficulties are its domains, of the same images.

    What a query passes over is in the column ``junk``. Queries are cut to their box, as their authors do.
    """

    def read(source: OfficialFiles) -> pa.Table:
        where, fields = f"{folder}/gnd_{folder}.mat", ("bbx", "easy", "hard", "junk")
        names, asked, answers = _ground_truth(source, where, fields)
        images, queries = ([f"{name}.jpg" for name in part] for part in (names, asked))
        boxes = [np.ravel(answer["bbx"]) for answer in answers]
        return pa.concat_tables(
            _rows(source, f"{folder}/jpg/", queries, images, boxes, answers, right, junk, domain=level)
            for level, (right, junk) in _REVISITED.items()
        )

    return read


def read_instre(source: OfficialFiles) -> pa.Table:
    """``gnd_instre.mat`` of Iscen et al. (CVPR 2017): five queries of each thing, cut to their boxes."""
    images, queries, answers = _ground_truth(source, "instre/gnd_instre.mat", ("ok", "bbx"))
    boxes = [
        (x, y, x + width, y + height) for x, y, width, height in (np.ravel(one["bbx"]) for one in answers)
    ]
    return _rows(source, "instre/", queries, images, boxes, answers, ("ok",), (), domain=None)


def read_forb(source: OfficialFiles) -> pa.Table:
    """``metadata/KIND_gt.ndjson``, a query with its right answers in a line; the gallery is of all kinds."""
    where = "forb/metadata/all_database_images.txt"
    gallery = [line.strip() for line in source.lines(where).to_pylist()]
    tables = [
        source.rows(where, image=gallery, folder="forb/", label=gallery, role="index", domain=_kinds(gallery))
    ]
    for path in sorted(source.path("forb/metadata").glob("*_gt.ndjson")):
        where = f"forb/metadata/{path.name}"
        queries, answers = [], []
        for number, line in enumerate(source.lines(where).to_pylist(), start=1):
            try:
                entry = json.loads(line)
                queries.append(str(entry["query_image"]))
                answers.append([str(name) for name in entry["groundtruth_images"]])
            except (ValueError, KeyError, TypeError) as error:
                raise source.malformed(
                    where, f"line {number} is {line!r}", expected="query_image and groundtruth_images"
                ) from error
        labels = pa.array([[f"forb/{name}" for name in names] for names in answers], pa.list_(pa.string()))
        first = [names[0] if names else "" for names in answers]
        tables.append(
            source.rows(where, image=queries, folder="forb/", label=first, role="query",
                        domain=_kinds(queries), labels=labels)
        )  # fmt: skip
    if len(tables) == 1:
        raise source.missing("forb/metadata/*_gt.ndjson")
    return pa.concat_tables(tables, promote_options="default")


def _kinds(paths: Sequence[str]) -> list[str]:
    return [path.partition("/")[0] for path in paths]


def _ground_truth(
    source: OfficialFiles, where: str, fields: tuple[str, ...]
) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """``imlist``, ``qimlist`` and, query by query, the fields of ``gnd``."""
    with source.matlab(where, expected=f"imlist, qimlist and gnd ({', '.join(fields)})") as content:
        images, queries = (list(map(str, np.atleast_1d(content[name]))) for name in ("imlist", "qimlist"))
        answers = [{name: one[name] for name in fields} for one in np.atleast_1d(content["gnd"])]
        if len(answers) != len(queries):
            raise ValueError(f"{len(queries)} queries and {len(answers)} answers")
    return images, queries, answers


def _rows(
    source: OfficialFiles,
    folder: str,
    queries: Sequence[str],
    images: Sequence[str],
    boxes: Sequence[Any],
    answers: Sequence[Mapping[str, Any]],
    right: tuple[str, ...],
    junk: tuple[str, ...],
    *,
    domain: str | None,
) -> pa.Table:
    """A row for each query, labelled by its number, and for each image, with the queries that it answers."""
    level = "" if domain is None else f"{domain}/"
    lists: dict[str, list[list[str]]] = {name: [[] for _ in images] for name in ("labels", "junk")}
    for number, answer in enumerate(answers):
        for name, fields in (("labels", right), ("junk", junk)):
            for field in fields:
                for place in np.atleast_1d(answer[field]).ravel().astype(int):  # counted from 1
                    lists[name][place - 1].append(f"{source.dataset.key}/{level}{number}")
    columns = {name: pa.array(values, pa.list_(pa.string())) for name, values in lists.items()}
    numbers = [f"{level}{number}" for number in range(len(queries))]
    names = [f"{level}image/{name}" for name in images]
    tables = [
        source.rows(folder, image=[*paths], folder=folder, label=label, role=role, domain=domain, **more)
        for paths, label, role, more in (
            (queries, numbers, "query", box_columns(np.asarray(boxes, np.float64))),
            (images, names, "index", columns),
        )
    ]
    return pa.concat_tables(tables, promote_options="default")
