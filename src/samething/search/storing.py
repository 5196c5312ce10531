"""What a sync or an index does with new and changed images: embed them, a batch at a time, and store them."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from samething.embedder import Embedder
from samething.errors import ImageError
from samething.images import Source, in_threads
from samething.images.parts import Place
from samething.images.reading import NUM_DECODERS
from samething.index import AbstractIndex, Regions
from samething.index.sqlite_rows import chunks
from samething.progress import progress_bar, say
from samething.search.collection import is_blank, looks_of
from samething.search.feature_vectors import KnownVectors
from samething.search.region_choice import chooser
from samething.search.syncing import Changes, Plan

_ROWS_A_WRITE: Final = 256
_WITH_REGIONS: Final = 32
"""Images a write, where each is embedded many times: what a killed process has to do again."""


def carried_out(
    plan: Plan,
    index: AbstractIndex,
    embedder: Embedder,
    *,
    known: Sequence[KnownVectors] = (),
    on_progress: Callable[[int, int], object] | None = None,
) -> Changes:
    """Do what a plan says.

    Args:
        plan: what has to be done.
        index: the index.
        embedder: its model.
        known: where to take vectors from instead of embedding.
        on_progress: told how many images are embedded so far, and of how many.
    """
    on_progress = on_progress or (lambda done, total: None)
    files = [new.found[0] for name, new in plan.new.items() if not any(name in source for source in known)]
    if files:
        embedder = embedder.fastest(files, num_images=len(files))
    unreadable, blank, num_added = list(plan.changes.unreadable), [], 0
    rows_a_write = _ROWS_A_WRITE if index.description.regions is None else _WITH_REGIONS
    with progress_bar("images", disable=not plan.new) as progress:
        task = progress.add_task("index", total=len(plan.new))
        for number, names in enumerate(chunks(list(plan.new), rows_a_write)):
            on_progress(number * rows_a_write, len(plan.new))
            started = time.perf_counter()
            found = _embedded({name: plan.new[name].found for name in names}, index, embedder, known)
            unreadable += found.unreadable
            if found.looks:
                index.require_model(embedder.fingerprint)
                index.amend(
                    list(found.looks),
                    lambda name, row, looks=found.looks: plan.new[name].of(name, row, looks[name]),  # type: ignore[misc]
                    vectors=np.stack(found.vectors),
                    regions=found.regions if index.description.regions is not None else None,
                )
            if number == 0 and found.looks and index.description.regions is not None:
                _say_cost(found.regions, index, len(plan.new), time.perf_counter() - started)
            num_added += len(found.looks)
            blank += [plan.new[name].found[0].location for name in found.looks if is_blank(found.looks[name])]
            progress.advance(task, len(names))
    if plan.new:
        on_progress(len(plan.new), len(plan.new))
    for part in chunks(list(plan.changed), _ROWS_A_WRITE):
        index.amend(part, lambda name, row: plan.changed[name].of(name, row))
    return dataclasses.replace(
        plan.changes, num_added=num_added, unreadable=tuple(unreadable), blank=tuple(blank)
    )


@dataclasses.dataclass
class _Embedded:
    """Images that were embedded, in one order."""

    looks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    vectors: list[Any] = dataclasses.field(default_factory=list)
    regions: list[Regions] = dataclasses.field(default_factory=list)
    unreadable: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def _embedded(
    part: Mapping[str, list[Source]],
    index: AbstractIndex,
    embedder: Embedder,
    known: Sequence[KnownVectors],
) -> _Embedded:
    """Vectors and looks of images by their files; from features where there are any."""
    done = _Embedded()
    seen_as = functools.partial(looks_of, columns=index.description.columns)
    for source in known:
        here = [name for name in part if name in source]
        seen = in_threads(
            lambda file: seen_as(embedder.unpacked(file)),
            [part[name][0] for name in here],
            num_threads=NUM_DECODERS,
        )
        made = []
        for name, looks in zip(here, seen, strict=True):
            if isinstance(looks, ImageError):
                done.unreadable += [(file.location, looks.reason) for file in part[name]]
            else:
                made.append(name)
                done.looks[name] = looks
        if made:
            done.vectors += list(source.vectors(made))
        part = {name: files for name, files in part.items() if name not in source}
    names, files = list(part), list(part.values())
    regions = None
    if (noted := index.description.regions) is not None:
        choose = chooser(noted)

        def regions(position: int, image: Any) -> Sequence[Place]:
            return choose(image, files[position])

    for batch in embedder.embed_stream([own[0] for own in files], keep=seen_as, regions=regions):
        for position, error in batch.unreadable.items():
            done.unreadable += [(file.location, error.reason) for file in files[position]]
        for position, looks in zip(batch.positions, batch.kept, strict=True):
            done.looks[names[position]] = looks
        done.vectors += list(batch.vectors)
        done.regions += [Regions(places, vectors) for places, vectors in batch.regions]
    return done


def _say_cost(regions: Sequence[Regions], index: AbstractIndex, num_images: int, seconds: float) -> None:
    """What regions take, by the first images."""
    per_image = 1 + sum(len(own.places) for own in regions) / len(regions)
    rate, kept = len(regions) / seconds, per_image * index.description.vector_bytes
    took = num_images / rate
    say(
        f"{per_image:.1f} vectors and {kept:,.0f} bytes of them per image, {rate:.1f} images per second: "
        f"{num_images:,} images take about {f'{took:.0f} s' if took < 120 else f'{took / 60:,.0f} minutes'} "
        f"and {num_images * kept / 1e6:,.1f} MB"
    )
