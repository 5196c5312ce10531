"""Public boards: from a data set in its official layout to a file of results, in one command."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.markup import escape

from samething.datasets import DATASETS, Part
from samething.datasets import catalog as list_images
from samething.errors import FingerprintError, InputError
from samething.evaluation import Comparison, compare_embeddings
from samething.evaluation.protocols import protocol_of
from samething.features import Estimate, FeatureSet, features
from samething.files import write_json
from samething.leaderboard import BOARDS as PUBLISHED
from samething.training.config import TrainConfig

if TYPE_CHECKING:
    from samething.arrays import Embeddings

ADAPTED: Final = TrainConfig(
    loss="normface",
    scale=16.0,
    embedding_dim=512,
    standardise=False,
    dropout=0.0,
    optimiser="adam",
    learning_rate=1e-3,
    schedule="constant",
    warmup=0.0,
    weight_decay=1e-6,
    batch_size=128,
    epochs=2.0,
    validate_every=2.0,
    keep="last",
)
"""ILIAS' linear adaptation. This neither warms up nor lowers the rate, as nothing is stated of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicBoard:
    """Which images a board asks for, and how it is measured."""

    dataset: str | None
    """None: a table of one's own images."""
    protocol: str = "board"
    domain: str | None = None
    """The domain of a data set of several; None for all."""
    views: str = "own"
    """How an image is brought to the input size."""
    listed: str | None = None
    """The leaderboard's name of it, where that is another."""


BOARDS: Final[Mapping[str, PublicBoard]] = {
    "uned": PublicBoard(dataset="uned", protocol="uned"),
    "mini_ilias": PublicBoard(dataset="mini_ilias", protocol="ilias", views="whole", listed="ilias"),
    "ilias": PublicBoard(dataset="ilias", protocol="ilias", views="whole", listed="ilias_100m"),
    "guiec": PublicBoard(dataset="guiec", protocol="guiec"),
    **{key: PublicBoard(dataset=key) for key in ("gpr1200", "sop", "in_shop", "cub_200", "cars196", "forb")},
    **{key: PublicBoard(dataset="uned", domain=key) for key in ("rp2k", "met", "gldv2")},
    **{key: PublicBoard(dataset=key, protocol="revisited") for key in ("roxford", "rparis", "instre")},
    "custom": PublicBoard(dataset=None),
}
"""The boards by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benched:
    """What was measured on a board."""

    board: str
    comparison: Comparison
    file: Path
    """The results, as :func:`samething.leaderboard.leaderboard` reads them."""
    exit_status: int = 0
    """3 where images could not be read."""

    def __rich__(self) -> Group:
        file = escape(str(self.file))
        said = f"all numbers: {file}"
        if (BOARDS[self.board].listed or self.board) in PUBLISHED:
            said = f"samething leaderboard {file} shows it beside published results"
        return Group(self.comparison, said)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a board would take, without anything being written."""

    board: str
    missing: tuple[str, ...]
    """Promised files and folders that are not there."""
    estimate: Estimate | None
    """Of the features, where the images are there to measure on."""

    def __rich__(self) -> Group:
        parts: list[RenderableType] = [escape(f"{self.board}: one's own images")]
        if key := BOARDS[self.board].dataset:
            dataset = DATASETS[key]
            size = "of unknown size" if dataset.gigabytes is None else f"{dataset.gigabytes:,g} GB"
            parts = [escape(f"{self.board}: {dataset.title}, {size} on disk")]
        if self.missing:
            parts += [escape(f"to get it: {dataset.get} (from {dataset.source}; licence: {dataset.licence})"),
                      escape(f"missing: {', '.join(self.missing)}")]  # fmt: skip
        return Group(*parts, self.estimate or "the time is measured on the images, once they are there")


def bench(
    board: str,
    *,
    data_root: Path,
    backbone: str = "efficientnet_lite0",
    output: Path = Path("bench"),
    dims: tuple[int, ...] = (64, 512),
    train_on: Path | None = None,
    adapt: bool = True,
    views: str | None = None,
    sizes: tuple[int, ...] = (),
    weights: Path | None = None,
    dry_run: bool = False,
) -> Benched | Plan:
    """Measure a backbone on a public board: catalog, features, heads and a file of results.

    Measured are the frozen feature as it is, its principal components, and a linear map trained as ILIAS'
    authors do (cosine softmax without margin, two epochs). The last two are fitted to the board's own
    training images, where it has any, or to --train-on. What is finished is reused: a killed run goes on.

    Args:
        board: uned, mini_ilias, ilias, guiec, gpr1200, sop, in_shop, cub_200, cars196, forb, rp2k, met, gldv2
            (these three in UnED's split), roxford, rparis, instre, or custom for a table
            of one's own. samething datasets says how to get each of the others.
        data_root: folder that holds the folders of all data sets; for custom the table of the images itself,
            as for samething catalog, whose column role says query and index (and train).
        backbone: a name that samething backbones lists; see samething features.
        output: folder for everything; the results are OUTPUT/BOARD.json.
        dims: numbers that the feature is brought to.
        train_on: a feature folder of the same backbone whose train images the heads are fitted to.
        adapt: fit heads; --no-adapt measures the frozen feature alone, and reads no training images.
        views: how an image is brought to the input size, as for samething features; by default the board's
            own way (ILIAS: whole), or else the backbone's.
        sizes: other sides of the input than the backbone's own, in pixels.
        weights: a checkpoint on this disk, instead of the backbone's own source.
        dry_run: say what is missing, and what the features would take in time, memory and disk.

    Raises:
        InputError: there is no such board, or a number of dimensions below 1.
        ArtefactError: files of the official layout are missing; says how to get them.
        FingerprintError: --train-on holds features of another backbone or preprocessing.
    """
    if board not in BOARDS or min(dims, default=1) < 1:
        raise InputError(
            f"the board {board!r} with --dims {' '.join(map(str, dims))}",
            expected=f"one of {', '.join(BOARDS)}, and dimensions from 1",
            next_step="for instance: samething bench cub_200 --data-root FOLDER --dims 64",
        )
    row, folder = BOARDS[board], Path(output)
    part: Part = "all" if adapt and train_on is None else "test"

    def listed(place: Path) -> Path:
        if row.dataset is None:
            list_images(Path(data_root), output=place)
        else:
            list_images(dataset=row.dataset, data_root=data_root, part=part, domain=row.domain, output=place)
        return place

    views = views or row.views
    options: dict[str, Any] = {"backbone": backbone, "weights": weights, "views": views, "sizes": sizes}
    options["output"] = folder / "features"
    if dry_run:
        missing = tuple(DATASETS[row.dataset].missing(Path(data_root))) if row.dataset else ()
        if missing:
            return Plan(board=board, missing=missing, estimate=None)
        with tempfile.TemporaryDirectory() as place:
            estimate = features(listed(Path(place) / "catalog.parquet"), dry_run=True, **options)
        assert isinstance(estimate, Estimate)
        return Plan(board=board, missing=(), estimate=estimate)
    own = features(listed(folder / "catalog.parquet"), **options)
    assert isinstance(own, FeatureSet)
    teacher = own if train_on is None else FeatureSet.open(train_on)
    if teacher.backbone != own.backbone:
        raise FingerprintError(
            f"{train_on} holds features of {teacher.backbone['name']}, prepared in another way",
            expected=f"features of {own.backbone['name']} with --views {views}",
            next_step="extract them with the same backbone, weights and views",
        )
    return _measured(board, own, teacher, folder, dims if adapt else ())


def _measured(
    board: str, own: FeatureSet, teacher: FeatureSet, folder: Path, dims: tuple[int, ...]
) -> Benched:
    """Every embedding that the board's protocol allows, measured and written."""
    row = BOARDS[board]
    largest = protocol_of(row.protocol).largest_dim or np.inf
    embeddings = {
        f"{own.backbone['name']} {name}": rows
        for name, rows in _embeddings(own, teacher, folder, dims)
        if rows.shape[1] <= largest
    }
    if not embeddings:
        raise InputError(
            f"no embedding of at most {largest} numbers for {board}",
            expected="training images to fit heads to, and such a number among --dims",
            next_step="name a feature folder with train images: --train-on FEATURES --dims 64",
        )
    comparison = compare_embeddings(embeddings, own.catalog, protocol=row.protocol)
    origin = {"benchmark": row.listed or board, "backbone": dict(own.backbone)}
    results = {name: {**origin, **numbers} for name, numbers in comparison.to_json().items()}
    file = folder / f"{board}.json"
    write_json(file, results)
    return Benched(board=board, comparison=comparison, file=file, exit_status=own.exit_status)


def _embeddings(
    own: FeatureSet, teacher: FeatureSet, folder: Path, dims: tuple[int, ...]
) -> Iterator[tuple[str, Embeddings]]:
    """The frozen features, and those of heads fitted to the teacher's train images, if there are any."""
    from samething.heads import HeadConfig, fitted_head
    from samething.training import train

    yield "frozen", own.rows
    training = np.flatnonzero(teacher.catalog.has_role("train"))
    for dim in dims if len(training) else ():
        if dim < min(own.rows.shape[1], len(training)):
            principal = fitted_head(HeadConfig(kind="pca", embedding_dim=dim), teacher.rows, training)
            yield f"PCA-{dim}", principal.embed(own.rows)
        config = dataclasses.replace(ADAPTED, embedding_dim=dim)
        run = train(teacher.folder, output=folder / f"adapted-{dim}", config=config)
        yield f"adapted-{dim}", run.head.embed(own.rows)
