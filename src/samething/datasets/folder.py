"""A folder of images in which every sub-folder shows one thing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from samething.catalog import Catalog
from samething.datasets.listing import Dropped, Labels, Listing
from samething.errors import InputError, is_utf8, visible
from samething.images import find_files


def list_folder(
    folder: Path,
    *,
    domain: str | None = None,
    labels: Labels = "folder",
    root: Path | None = None,
    exclude: Sequence[str] = (),
) -> Listing:
    """List the images of a folder and its sub-folders, in sorted order.

    Args:
        folder: where to look; see :func:`samething.images.find_files` for what is passed over.
        domain: domain of all images.
        labels: ``folder`` takes the path of the sub-folder as the label, ``a/b`` for nested ones, and drops
            images that lie in no sub-folder; ``none`` makes each image its own thing, for the index only.
        root: the folder that the catalog's paths start from, this one or one above it.
        exclude: patterns of names or paths that are passed over.

    Raises:
        InputError: no images, none in a sub-folder, or a root that does not hold the folder.
    """
    root = folder if root is None else root
    if not folder.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"{folder} does not lie in the root {root}",
            expected="the same folder or one above it",
            next_step="leave --root away, or give a folder that holds the images",
        )
    prefix = folder.resolve().relative_to(root.resolve())
    rows: list[dict[str, object]] = []
    dropped: list[Dropped] = []
    passed_over: Counter[str] = Counter()
    for found in find_files(folder, exclude):
        if not found.is_image:
            passed_over[visible(found.passed_over)] += 1
            continue
        below = Path(found.path).relative_to(folder)
        image, label = (prefix / below).as_posix(), below.parent.as_posix()
        if not is_utf8(image):
            dropped.append(Dropped(visible(image), "its path is not UTF-8; rename it"))
        elif labels == "none":
            rows.append({"image": image, "label": image, "role": "index"})
        elif label == ".":
            dropped.append(Dropped(image, "it lies in no sub-folder, so it has no label"))
        else:
            rows.append({"image": image, "label": label})
    if not rows and dropped:
        raise InputError(
            f"{folder} holds {len(dropped)} images, but none with a label "
            f"(for instance {dropped[0].image}: {dropped[0].reason})",
            expected="one sub-folder for each thing, with the images of it inside",
            next_step="sort the images into sub-folders; or give --labels none, to index them only",
        )
    if not rows:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in passed_over.most_common(5))
        seen = f"{passed_over.total()} other files were seen ({kinds})" if passed_over else "it is empty"
        raise InputError(
            f"{folder} holds no images: {seen}",
            expected="JPEG, PNG, WebP or other images in it or in its sub-folders",
            next_step="check the path",
        )
    for row in rows:
        row.update(domain=domain, dataset=visible(folder.resolve().name))
    return Listing(
        catalog=Catalog.from_rows(rows, root=root),
        has_roles=labels == "none",
        dropped=tuple(dropped),
        passed_over=dict(sorted(passed_over.items())),
    )
