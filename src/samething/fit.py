"""From labelled images to an answer in one command: is a head better than the frozen backbone, and where?"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.markup import escape

from samething.datasets import catalog as list_images
from samething.errors import FingerprintError
from samething.files import is_finished
from samething.progress import Terminal
from samething.search import Searcher, index

if TYPE_CHECKING:
    from samething.export import Exported
    from samething.study.verdict import Verdict

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What came of labelled images, and where everything is."""

    folder: Path
    verdict: Verdict
    searcher: Searcher
    seconds: float

    def __rich__(self) -> str:
        """Verdict, advice and places."""
        first, *others = map(escape, self.verdict.sentences)
        lines = ["", f"[bold]{first}[/bold]", *others]
        lines += ["", "Next:", *(f"  {escape(sentence)}" for sentence in self.verdict.advice)]
        place = self.searcher.index.location
        lines += [f"  samething find IMAGE --index {place}", f"  samething serve {place}"]
        if self.verdict.report is not None:
            lines.append(f"Report: [bold]{escape(str(self.verdict.report))}[/bold] ({self.seconds:.0f} s)")
        return "\n".join(lines)


def fit(
    source: Path,
    *,
    domain: str | None = None,
    backbone: str = "efficientnet_lite0",
    recipe: str = "universal",
    output: Path = Path(),
) -> Fitted:
    """From labelled images to a searchable index and a report: is a head better than the frozen backbone?

    Runs catalog, features, train, evaluate, export and index; each writes where the command of its name
    would, below OUTPUT. What is finished is reused. Where labels were added since, the new run stands beside
    the old one, as run-2. The report opens with the answer, and with how many labelled instances it takes. If
    the head is not better, the backbone is exported, or its principal components where they do as well.

    Args:
        source: folder with a sub-folder for each thing, or a table or catalog as for samething catalog.
        domain: kind of things shown, such as "furniture".
        backbone: a name that samething backbones lists; see samething features.
        recipe: how the head is trained; see samething train.
        output: folder for everything; by default the current one.

    Raises:
        InputError: no images, or too few labels to train on.
    """
    from samething.backbones import load_from_metadata
    from samething.export import export
    from samething.export.model_folder import write_backbone
    from samething.features import FeatureSet, features
    from samething.study.verdict import verdict_on
    from samething.training import train

    console, folder, started = Terminal(), Path(output), time.monotonic()

    def step(number: int, text: str) -> None:
        console.print(f"\n[bold cyan]{number}/5[/bold cyan] {escape(text)}", highlight=False)

    images = Path(source)
    step(1, "Images and their labels")
    if images.suffix != ".parquet":
        listed = list_images(images, domain=domain, output=folder / "catalog.parquet")
        console.print(listed, highlight=False)
        images = folder / "catalog.parquet"
    step(2, f"Features: every image once through {backbone}, frozen")
    extracted = features(images, backbone=backbone, output=folder / "features")
    assert isinstance(extracted, FeatureSet)
    console.print(extracted, highlight=False)
    step(3, "A head, trained on the labels")
    run = beside(folder / "run", lambda place: train(folder / "features", output=place, recipe=recipe))
    console.print(run, highlight=False)
    step(4, "Measured on instances that the head has never seen")
    found = verdict_on(run, extracted, folder)
    console.print(found.comparison or found.sentences[0], highlight=False)
    step(5, f"Export of the {found.kept}, and an index of the images")

    def made(place: Path) -> Exported:
        if found.kept == "head":
            return export(run.folder, output=place)
        backbone_as_it_is = load_from_metadata(extracted.backbone)
        if found.kept == "backbone":
            return write_backbone(backbone_as_it_is, extracted, place, dim=None)
        dim, codes = run.head.embedding_dim, run.config.codes
        return write_backbone(backbone_as_it_is, extracted, place, dim=dim, codes=codes)

    model = beside(folder / "model", made)

    def indexed(place: Path) -> Searcher:
        return index(
            Path(source),
            model=model.folder,
            domain=domain or "default",
            output=place,
            vectors_of=extracted.folder,
        )

    searcher = beside(folder / "index", indexed)
    console.print(searcher, highlight=False, crop=False)
    return Fitted(folder, found, searcher, time.monotonic() - started)


def beside(place: Path, make: Callable[[Path], Made]) -> Made:
    """What is made at a place; beside it, as ``NAME-2``, where that holds the same of other labels."""
    number, chosen = 1, place
    while True:
        try:
            return make(chosen)
        except FingerprintError:
            if not is_finished(chosen):  # it is not the place that does not fit
                raise
            number += 1
            chosen = place.with_name(f"{place.name}-{number}")
