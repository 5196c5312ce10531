"""A small multi-domain data set for demonstrations, built from files inside ordinary Python packages.

No image is shipped or downloaded: icons, logos, emoji, 3-D shapes and sample photographs come out of the
packages of the ``demo`` extra and are drawn on the user's machine. ``docs/demo-data.md`` says what is in it.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError
from samething.files import (
    MANIFEST_NAME,
    Json,
    Manifest,
    differences,
    fingerprint,
    is_finished,
    only_one_writer,
    read_manifest,
    write_manifest,
)
from samething_demo.instances import DOMAINS, SIDE, Instance
from samething_demo.journal import add_to_journal, read_journal, remove_journal, start_journal
from samething_demo.packages import package_versions
from samething_demo.roles import assign_roles
from samething_demo.workers import Workers, find_jobs, make_images

KIND: Final = "demo-images"
FORMAT_VERSION: Final = 1

GENERATOR_VERSION: Final = 1
"""Raise it with every change that alters an image, a name or a role."""

CATALOG_NAME: Final = "catalog.parquet"

DATASET: Final = "demo"

_IMAGES_PER_JOB: Final = 40
"""Small enough that all processes end at nearly the same time, large enough to send quickly."""


def build_demo_images(
    root: Path,
    *,
    num_workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    limit_per_domain: int | None = None,
) -> Catalog:
    """Build the demo data set: images ``root/<domain>/<instance>/<source>`` and ``root/catalog.parquet``.

    The domains are ``icon``, ``logo``, ``emoji``, ``object`` and ``photo``. The split is by instance: 40 % of
    a domain's instances are for training, 10 % for validation, 50 % for the test, with one query each, two
    from six images on. The result depends on the versions of the packages only. A finished data set made
    from the same versions is returned at once; an interrupted build resumes.

    Args:
        root: folder to build in.
        num_workers: number of processes; by default one for each processor this process may use.
        on_progress: called with the number of images done and of all images.
        limit_per_domain: take at most this many instances per domain; a few may turn out unfit.

    Returns:
        The catalog, with the dataset ``demo`` and a further column ``source``: the vendor or the view.

    Raises:
        MissingExtraError: a package of the ``demo`` extra is not installed.
        InputError: an argument is out of range, a package has another layout, or the disk is full.
        ArtefactError: ``root`` holds another artefact or catalog, or another process is building there.
    """
    root = Path(root)
    num_workers = _checked("num_workers", num_workers) or _num_processors()
    made_from: dict[str, Json] = {
        "generator_version": GENERATOR_VERSION,
        "limit_per_domain": _checked("limit_per_domain", limit_per_domain),
        "packages": package_versions(),
        "unicode": unicodedata.unidata_version,
    }
    finished = _finished(root, made_from)
    if finished is not None:
        return finished
    with only_one_writer(root):
        known, stale = _left_by_an_earlier_build(root, made_from)
        # the stale ones are listed too, without a checksum, so that a killed build does not forget them
        start_journal(root, fingerprint(made_from), {**dict.fromkeys(sorted(stale), ""), **known})
        (root / MANIFEST_NAME).unlink(missing_ok=True)
        instances, checksums = _build(root, num_workers, limit_per_domain, known, on_progress)
        for image in stale - checksums.keys():
            (root / image).unlink(missing_ok=True)
        return _finish(root, made_from, instances, checksums)


def _checked(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise InputError(
            f"{name}={value}", expected="at least 1", next_step="give a larger number, or leave it out"
        )
    return value


def _num_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _finished(root: Path, made_from: dict[str, Json]) -> Catalog | None:
    """The catalog of a finished data set made from the same things, if all its images are there."""
    if not is_finished(root):
        return None
    manifest = read_manifest(root, kind=KIND, format_version=FORMAT_VERSION)
    catalog = _catalog_in(root)
    if catalog is None or differences(made_from, manifest.made_from):
        return None
    return catalog if all(path.is_file() for path in catalog.paths) else None


def _catalog_in(root: Path) -> Catalog | None:
    try:
        catalog = Catalog.read(root / CATALOG_NAME)
    except ArtefactError:  # none, or a damaged one: it is made again
        return None
    if set(catalog.strings("dataset")) - {DATASET}:
        raise ArtefactError(
            f"{root / CATALOG_NAME} lists images that are not the demo's",
            expected="a folder of its own for the demo's images",
            next_step="choose another folder",
        )
    return catalog


def _left_by_an_earlier_build(root: Path, made_from: dict[str, Json]) -> tuple[dict[str, str], set[str]]:
    """Checksums of the images that can be taken over, and the images that may have to go."""
    known: dict[str, str] = {}
    stale: set[str] = set()
    catalog = _catalog_in(root)
    if catalog is not None:
        images = dict(zip(catalog.strings("image"), catalog.strings("sha256"), strict=True))
        stale.update(images)
        if is_finished(root):
            manifest = read_manifest(root, kind=KIND, format_version=FORMAT_VERSION)
            if not differences(made_from, manifest.made_from):
                known.update(images)
    journal_made_from, images = read_journal(root)
    stale.update(images)
    if journal_made_from == fingerprint(made_from):
        known.update(images)
    return known, {image for image in stale if image.split("/")[0] in DOMAINS}


def _build(
    root: Path,
    num_workers: int,
    limit_per_domain: int | None,
    known: dict[str, str],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Instance], dict[str, str]]:
    """Find the instances and make their images; instances in catalog order, and checksums by image."""
    checksums: dict[str, str] = {}
    with Workers(num_workers) as workers:
        instances = [instance for found in workers.results(find_jobs(limit_per_domain)) for instance in found]
        instances.sort(key=lambda instance: (DOMAINS.index(instance.domain), instance.name))
        num_images = sum(len(instance.sources) for instance in instances)
        jobs = []
        for members in _in_jobs(instances):
            images = [instance.image(source) for instance in members for source in instance.sources]
            known_here = {image: known[image] for image in images if image in known}
            jobs.append(functools.partial(make_images, members, root, known_here))
        for done in workers.results(jobs):
            checksums.update(done)
            add_to_journal(root, done)
            if on_progress is not None:
                on_progress(len(checksums), num_images)
    return instances, checksums


def _in_jobs(instances: Sequence[Instance]) -> list[list[Instance]]:
    """Consecutive instances (of one photograph, for example) with about 40 images together."""
    jobs: list[list[Instance]] = []
    num_images = 0
    for instance in instances:
        if not jobs or num_images >= _IMAGES_PER_JOB:
            jobs.append([])
            num_images = 0
        jobs[-1].append(instance)
        num_images += len(instance.sources)
    return jobs


def _finish(
    root: Path, made_from: dict[str, Json], instances: Sequence[Instance], checksums: dict[str, str]
) -> Catalog:
    """Write the catalog, then the manifest."""
    roles = assign_roles(instances)
    rows = [
        {
            "image": instance.image(source),
            "label": instance.label,
            "domain": instance.domain,
            "dataset": DATASET,
            "role": roles[instance.image(source)],
            "width": SIDE,
            "height": SIDE,
            "sha256": checksums[instance.image(source)],
            "source": source,
        }
        for instance in instances
        for source in instance.sources
    ]
    catalog = Catalog.from_rows(rows, root=root)
    if hasattr(os, "sync"):
        os.sync()  # the images were written without waiting; they must be there before the manifest is
    catalog.write(root / CATALOG_NAME)
    write_manifest(
        root,
        Manifest(
            kind=KIND,
            format_version=FORMAT_VERSION,
            made_from=made_from,
            content={"images": len(catalog), "instances": len(instances), "catalog": catalog.fingerprint},
        ),
    )
    remove_journal(root)
    return Catalog.read(root / CATALOG_NAME)
