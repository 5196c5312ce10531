"""Published results of public benchmarks, with their source, beside one's own.

A result is listed under the benchmark or protocol it was measured by and nowhere else. An own one says how
far it was measured on the benchmark's queries. The published numbers are copied from the works named; those
that a challenge's page or a paper gives for other rules, data or metrics are not here.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import cyclopts
from rich.console import Group, RenderableType
from rich.text import Text

from samething.errors import InputError
from samething.files import Json, read_json, write_json
from samething.pages import Cell, Cells, Table
from samething.statistics import percent

Task = Literal["sop", "rp2k", "met", "gldv2", "cars196", "cub_200", "forb"]
Benchmark = Literal["guiec", "uned", "ilias", "ilias_100m", Task]


@dataclasses.dataclass(frozen=True)
class Published:
    """A result somebody has published."""

    system: str
    setting: str
    """What was trained, and how wide the embedding is, as far as the source says."""
    score: float
    """In [0, 1]."""
    source: str


@dataclasses.dataclass(frozen=True)
class Board:
    """A benchmark's metric, data and published results."""

    title: str
    metric: str
    """Name of the metric in the JSON of ``samething evaluate``."""
    rules: str
    """What the published numbers were measured on, and what makes an own number another one."""
    query_counts: Mapping[str, int]
    """Domain -> queries of the benchmark, where they are public; "" is the whole."""
    published: tuple[Published, ...]


_TABLE: Final = tomllib.loads(resources.files("samething").joinpath("leaderboard.toml").read_text("utf-8"))

_TASKS: Final = _TABLE["image_to_image"]

BOARDS: Final[Mapping[Benchmark, Board]] = {
    name: Board(**{**_TABLE[name], "published": tuple(Published(**one) for one in _TABLE[name]["published"])})
    for name in get_args(Benchmark)
    if name in _TABLE
} | {
    name: Board(
        title=f"{task['title']}, image to image, R@1",
        metric=_TASKS["metric"],
        rules=f"Published: {task['queries']:,} queries, frozen features at full width. Own: by samething "
        "bench; another number of queries is another split.",
        query_counts={"": task["queries"]},
        published=tuple(
            Published(system, "frozen, full width", round(score / 100, 3), _TASKS["source"])
            for system, score in zip(_TASKS["systems"], task["scores"], strict=True)
        ),
    )
    for name, task in _TASKS["tasks"].items()
}
"""The published results by benchmark."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own:
    """An own result, read from the JSON of ``samething evaluate``."""

    system: str
    file: Path
    dimension: int | None
    """Where the file says it."""
    score: float
    """In [0, 1], the benchmark's metric."""
    interval: tuple[float, float] | None
    """95 % bootstrap interval, where the file has it."""
    num_queries: int
    is_of_the_benchmark: bool
    """Whether the queries are as many as the benchmark's, domain by domain."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaderboard:
    """Published and own results by protocol."""

    protocols: tuple[Benchmark, ...]
    own: Mapping[Benchmark, Sequence[Own]]
    not_listed: Sequence[str]
    """Own results that belong to none of the tables, and why."""

    def to_json(self) -> Json:
        """Protocol -> metric, rules, ``published`` and ``own`` results; and ``not_listed``."""
        content: dict[str, Json] = {}
        for name in self.protocols:
            board = BOARDS[name]
            content[name] = {
                "title": board.title,
                "metric": board.metric,
                "rules": board.rules,
                "published": [dataclasses.asdict(row) for row in board.published],
                "own": [{**dataclasses.asdict(row), "file": str(row.file)} for row in self.own.get(name, ())],
            }
        return {"protocols": content, "not_listed": list(self.not_listed)}

    def __rich__(self) -> Group:
        parts: list[RenderableType] = [self._table(name).printed() for name in self.protocols]
        if self.not_listed:
            parts.append(Text("not listed: " + "; ".join(self.not_listed)))
        return Group(*parts)

    def _table(self, name: Benchmark) -> Table:
        board = BOARDS[name]
        published = sorted(board.published, key=lambda row: -row.score)
        rows: list[Cells] = [[row.system, row.setting, percent(row.score), row.source] for row in published]
        for mine in sorted(self.own.get(name, ()), key=lambda row: -row.score):
            whose = "the benchmark's number of queries" if mine.is_of_the_benchmark else "other images"
            rows.append(
                [
                    mine.system,
                    f"{mine.dimension:,}-d" if mine.dimension is not None else "–",
                    percent(mine.score, *(mine.interval or ())),
                    f"own, {mine.num_queries:,} queries, {whose}: {mine.file.name}",
                ]
            )
        setting, source = (Cell(column, kind="text") for column in ("setting", "source"))
        return Table(f"{board.title}, %", ["system", setting, "score", source], rows, board.rules)


def leaderboard(
    *results: Path,
    protocol: Annotated[tuple[Benchmark, ...], cyclopts.Parameter(consume_multiple=True)] = (),
    json: Path | None = None,
) -> Leaderboard:
    """Show published results of public benchmarks beside one's own, benchmark by benchmark.

    A result is listed only under the benchmark it was measured on: by samething bench, or by evaluate with
    --protocol guiec, uned or ilias and --json FILE. Whether its queries are as many as the benchmark's is
    said in its row.

    Args:
        results: files written by samething bench or samething evaluate --json.
        protocol: the benchmarks to show; by default all.
        json: write everything here.

    Raises:
        ArtefactError: a file is missing or not JSON.
        InputError: a file holds no results of samething evaluate.
    """
    shown: tuple[Benchmark, ...] = protocol or tuple(BOARDS)
    own: dict[Benchmark, list[Own]] = {name: [] for name in shown}
    not_listed: list[str] = []
    for file in map(Path, results):
        for system, content in _named_results(file).items():
            measured_by = content.get("benchmark", content.get("protocol", "default"))
            place = f"{system} of {file}"
            if measured_by not in BOARDS:
                not_listed.append(f"{place} was measured by the protocol {measured_by}")
            elif measured_by not in own:
                not_listed.append(f"{place} belongs to {measured_by}, which is not shown")
            else:
                found = _own(system, file, content, measured_by)
                if found is None:
                    not_listed.append(f"{place} has no {BOARDS[measured_by].metric} of {measured_by}")
                else:
                    own[measured_by].append(found)
    board = Leaderboard(protocols=shown, own=own, not_listed=not_listed)
    if json is not None:
        write_json(json, board.to_json())
    return board


def _named_results(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> numbers; a file about one embedding has no name for it but the file's."""
    content = read_json(file)
    if isinstance(content, dict):
        if _is_result(content):
            return {file.stem: content}
        if content and all(_is_result(one) for one in content.values()):
            return content
    raise InputError(
        f"{file} holds no results",
        expected="a file written by samething evaluate --json",
        next_step="for instance: samething evaluate RUN --protocol uned --json FILE",
    )


def _is_result(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    scopes = [content[name] for name in ("merged", "per_domain") if name in content]
    return bool(scopes) and all(
        isinstance(scope, dict)
        and isinstance(scope.get("mean"), dict)
        and all(isinstance(numbers, dict) and "num_queries" in numbers for numbers in scope.values())
        for scope in scopes
    )


def _own(system: str, file: Path, content: dict[str, Any], protocol: Benchmark) -> Own | None:
    """The benchmark's number of a result; None if it has none."""
    board = BOARDS[protocol]
    merged = content.get("merged", {})
    score, interval = merged.get("mean", {}).get(board.metric), None
    if protocol == "guiec":
        composite = content.get("composite", {})
        score, interval = composite.get(board.metric), composite.get("intervals", {}).get(board.metric)
    else:
        interval = content.get("intervals", {}).get("merged", {}).get("mean", {}).get(board.metric)
    if protocol == "uned":
        score = content.get("rounded", {}).get("merged", {}).get("mean", {}).get(board.metric, score)
    if score is None:
        return None
    counts = {
        name: numbers["num_queries"] + numbers.get("num_queries_without_positive", 0)
        for name, numbers in merged.items()
    }
    total = counts.pop("mean")
    wanted = board.query_counts
    matches = bool(wanted) and (wanted == {"": total} or wanted == counts)
    return Own(
        system=system,
        file=file,
        dimension=content.get("dimension"),
        score=float(score),
        interval=(interval[0], interval[1]) if interval and None not in interval else None,
        num_queries=total,
        is_of_the_benchmark=matches,
    )
