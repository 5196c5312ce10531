"""What an index needs now and then: tuned, compacted, copied, brought back, made ready, verified."""

from __future__ import annotations

import contextlib
import dataclasses
from itertools import islice
from pathlib import Path
from typing import Final

from rich.markup import escape

from samething.checksums import damages
from samething.errors import ArtefactError, ImageError, InputError
from samething.files import read_manifest
from samething.index import RecallReport, SqliteIndex, back_up, exists_index, open_index
from samething.index import restore as restore_index
from samething.progress import progress_bar
from samething.rerank import Trust, keep_all
from samething.search.looking_again import learn
from samething.search.remembered import remembered_model
from samething.search.searcher import Searcher

_IMAGES_AT_ONCE: Final = 64


def tune(
    index: str | Path = "index", *, recall: float = 0.98, k: int = 5, exact: bool = False
) -> RecallReport | str:
    """Choose how a large index is searched, by a recall measured on its own vectors.

    Searches are exact until this is called, which reads all vectors for each. Afterwards they follow a graph;
    those with a filter stay exact.

    Args:
        index: the index folder.
        recall: share of the exact nearest images that is to be found; it is kept with 95 % confidence.
        k: neighbours per query that the recall is about.
        exact: search exactly again, instead.

    Raises:
        InputError: an engine elsewhere, which has its own settings; or a recall out of range.
    """
    opened = _embedded(index, otherwise="a Milvus index is chosen by its URL: ?index=hnsw&ef=NUMBER")
    if exact:
        opened.search_exactly()
        return f"{index} is searched exactly"
    return opened.tune(recall, k=k)


def compact(index: str | Path = "index") -> str:
    """Write an index anew; what was deleted or replaced leaves the disk.

    The old files are searched meanwhile, and writers wait. A killed process leaves them as they were. A tuned
    index is exact afterwards: tune it again.

    Args:
        index: the index folder.

    Raises:
        InputError: an engine elsewhere, which does this by itself.
    """
    old = _embedded(index, otherwise="a Milvus server compacts its collections by itself")
    before = _num_bytes(Path(index))
    old.compact()
    after = _num_bytes(Path(index))
    return f"{old.count():,} rows in {after / 1e6:,.1f} MB; before {before / 1e6:,.1f} MB"


def backup(index: str | Path, target: Path) -> str:
    """Copy an index while it is searched and written to, with the images that were uploaded into it.

    The copy is one state of it, compared with its checksums, and an index itself. It notes folders and model
    by their place relative to the index, so restore it where that was.

    Args:
        index: the index folder.
        target: a new folder.

    Raises:
        InputError: an engine elsewhere, or a target that holds something.
        ArtefactError: the index is damaged.
    """
    num_rows = back_up(_embedded(index, otherwise="back up the Milvus server with its own tools"), target)
    return f"{num_rows:,} rows in {target}, verified"


def restore(copy: Path, index: Path) -> str:
    """Bring an index back from a copy; one that is there gets its content in one step.

    What was written after the copy was made is lost. Open handles and servers follow.

    Args:
        copy: a folder that samething index backup made.
        index: the index folder, new or there already.

    Raises:
        ArtefactError: the copy is damaged, or the index so much that its lock cannot be taken.
    """
    with contextlib.closing(_embedded(copy, otherwise="name the folder of a backup")) as source:
        if not exists_index(index):
            num_rows = back_up(source, index)
        else:
            with contextlib.closing(_embedded(index, otherwise="name the index folder")) as opened:
                num_rows = restore_index(source, opened)
    return f"{num_rows:,} rows in {index}, verified"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An index made ready for a second look."""

    reranker: str
    num_kept: int
    """Images of which the re-ranker has what it needs."""
    unreadable: tuple[tuple[str, str], ...]
    """Path and reason of each image that cannot be read."""
    trust: Trust

    @property
    def exit_status(self) -> int:
        """0, or 3 where images cannot be read."""
        return 3 if self.unreadable else 0

    def __rich__(self) -> str:
        lines = [
            f"{self.num_kept:,} images are ready for --rerank {self.reranker}; what its evidence is worth was"
            f" learned from {self.trust.num_pairs:,} pairs ({self.trust.taught_by})"
        ]
        for domain, weights in self.trust.weights.items():
            if not any(weights):
                lines.append(escape(f"  {domain or 'other domains'}: nothing, results stay as they are"))
        lines += [escape(f"  {path}: {reason}") for path, reason in self.unreadable[:5]]
        return "\n".join(lines)


def prepare(
    index: str | Path = "index",
    *,
    model: str | Path | None = None,
    rerank: str = "geometry",
    labels: bool = False,
) -> Prepared:
    """Make an index ready for a second look: keep what it needs of each image, and learn what it is worth.

    Without this a search looks as well, computes what it needs of its candidates on the way, and trusts the
    evidence as far as the re-ranker's own careful weights go. Run it again after the index has grown; it goes
    on where it stopped.

    Args:
        index: the index folder, or the URL of a distributed engine.
        model: the model folder, if it was moved since the index was made.
        rerank: which second look: geometry, or regions, which embeds 25 windows of each image.
        labels: learn from images with one label, where labels name things; else from views of the images.

    Raises:
        InputError: no such re-ranker.
        MissingExtraError: a package that it needs is not installed.
    """
    searcher = Searcher.open(index, model=model)
    look = searcher.second_look(rerank)
    num_kept, unreadable, ids = 0, [], []
    rows = (row for batch in searcher.index.items() for row in batch.to_pylist())
    with progress_bar("images") as progress:
        task = progress.add_task("second look", total=searcher.index.count())
        while part := list(islice(rows, _IMAGES_AT_ONCE)):
            ids += [row["id"] for row in part]
            for row, content in zip(part, keep_all(look.reranker, look.shown(part), look.kept), strict=True):
                num_kept += not isinstance(content, ImageError)
                if isinstance(content, ImageError):
                    unreadable.append((row["path"], content.reason))
            progress.advance(task, len(part))
    look.kept.keep_only(ids)
    return Prepared(rerank, num_kept, tuple(unreadable), learn(look, searcher.embedder, labels=labels))


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a complete check of an artefact found."""

    location: str
    checked: str
    """What was compared, with its number."""
    problems: tuple[str, ...]
    """A sentence for each damage."""

    @property
    def exit_status(self) -> int:
        """0, or 1 when something is damaged."""
        return 1 if self.problems else 0

    def __rich__(self) -> str:
        """A line, and one for each damage."""
        line = f"{escape(self.location)}: {self.checked}, {len(self.problems):,} damages"
        return "\n".join([line, *map(escape, self.problems)])


def verify(path: str | Path = "index") -> Verified:
    """Read all of an artefact and compare it with its checksums; name every damaged file and row.

    An index is read with its model's folder, where that is at its place.

    Args:
        path: a catalog (.parquet), a folder of features, a run, a study, a model or an index, or the URL of a
            distributed engine's index.

    Raises:
        ArtefactError: there is no such artefact, it is unfinished, or it holds no checksums.
    """
    place = Path(path)
    if place.is_file():
        from samething.catalog.tables import verify_catalog

        verify_catalog(place)
        return Verified(str(path), "1 file", ())
    if "://" in str(path) or read_manifest(place).kind == "index":
        with open_index(path) as opened:
            found = opened.verify()
            with contextlib.suppress(ArtefactError):  # a copy may be elsewhere than its model
                model = remembered_model(opened)
                if isinstance(model, Path):
                    num_files, problems = damages(model)
                    return Verified(
                        str(path),
                        f"{found.num_rows:,} rows and {num_files:,} files of its model",
                        (*found.problems, *problems),
                    )
        return Verified(str(path), f"{found.num_rows:,} rows", found.problems)
    num_files, problems = damages(place)
    return Verified(str(path), f"{num_files:,} files", tuple(problems))


def _embedded(index: str | Path, *, otherwise: str) -> SqliteIndex:
    opened = open_index(index)
    if not isinstance(opened, SqliteIndex):
        raise InputError(
            f"{index} is not an index folder", expected="an index of the embedded engine", next_step=otherwise
        )
    return opened


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
