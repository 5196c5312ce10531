"""``samething fit`` on real images, and a few searches."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from rich.markup import escape

from samething.catalog import Catalog
from samething.errors import ArtefactError
from samething.files import is_finished
from samething.fit import Fitted, fit
from samething.progress import Terminal, progress_bar
from samething_demo import build_demo_images

NUM_PRINTED: Final = 3
"""Matches that are printed of a query."""


def demo(*, output: Path = Path("demo")) -> Fitted:
    """Run samething fit on real images: thousands, of five domains, all from PyPI packages.

    What an earlier run finished is reused. Everything is below OUTPUT, where the single commands would put
    it.

    Args:
        output: folder for everything the demo makes.

    Raises:
        MissingExtraError: the demo's packages are not installed.
    """
    console, folder = Terminal(), Path(output)
    console.print("Images: drawings, renderings and photographs of the same things, from PyPI packages")
    images = _build_images(folder / "images")
    console.print(_counts(images), highlight=False)
    fitted = fit(folder / "images" / "catalog.parquet", output=folder)
    console.print("\nA few images and what they find", style="bold cyan")
    for label, path in _example_queries(images):
        console.print(f"looking for [bold]{escape(label)}[/bold]", highlight=False)
        console.print(fitted.searcher.find(path, k=NUM_PRINTED), crop=False)
    return fitted


def demo_features(folder: Path) -> Path:
    """The feature folder that the demo has made.

    Args:
        folder: the demo's output.

    Raises:
        ArtefactError: the demo has not come that far there.
    """
    found = Path(folder) / "features"
    if not is_finished(found):
        raise ArtefactError(
            f"{found} is not a finished feature folder",
            expected="what samething demo makes",
            next_step=f"run samething demo -o {folder}, or give its folder with --demo-folder",
        )
    return found


def _build_images(folder: Path) -> Catalog:
    with progress_bar("images") as progress:
        task = progress.add_task("images", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return build_demo_images(folder, on_progress=on_progress)


def _counts(images: Catalog) -> str:
    roles = {"head training": ("train",), "validation": ("val",), "test": ("query", "index", "query+index")}
    labels = images.class_ids()
    parts = []
    for name, of in roles.items():
        rows = np.isin(images.strings("role").astype(str), of)
        parts.append(f"{name} {len(np.unique(labels[rows])):,} instances / {rows.sum():,} images")
    return f"{len(images):,} images of {labels.max() + 1:,} instances; " + "; ".join(parts)


def _example_queries(catalog: Catalog) -> list[tuple[str, Path]]:
    """Label and image of the same query every time, one of each domain."""
    rng = np.random.default_rng(0)
    asked, domains = catalog.has_role("query"), catalog.strings("domain")
    rows = [rng.permutation(np.flatnonzero(asked & (domains == domain)))[:1] for domain in catalog.domains]
    chosen = catalog.take(np.concatenate(rows))
    return list(zip(chosen.strings("label"), chosen.paths, strict=True))
