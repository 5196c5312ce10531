"""The result of ``samething curate``, and its HTML page with images of what stayed and what did not."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
import rich.console
import rich.markup

from samething.arrays import Int
from samething.catalog import Catalog
from samething.curate.curate_config import CurateConfig
from samething.curate.draws import draws_of
from samething.curate.duplicates import RELATIONS, Relation
from samething.curate.ledger import MEANINGS, Ledger, Rule
from samething.curate.pairs import METHODS, Pairs
from samething.curate.same_image import made_of_each_other
from samething.images import decode
from samething.pages import (
    Cell,
    Table,
    Thumbnail,
    as_drawn,
    drawing_url,
    image_url,
    new_axes,
    pair_url,
    write_page,
)

NUM_SAMPLES: Final = 9
"""Images shown of each domain."""
NUM_PAIRS: Final = 12
"""Pairs shown of each relation."""
NUM_DOUBTFUL: Final = 12
"""Images shown whose label is doubtful."""
NUM_QUARANTINED: Final = 100
"""Files listed that cannot be read."""

_STYLES: Final[tuple[Literal["stepfilled", "step"], ...]] = ("stepfilled", "step")

_EXPLANATIONS: Final = {
    "leak": "Images of training or validation that what is measured on has, too.",
    "within evaluation": "Twice in what is measured on; a benchmark is not changed, so it is only reported.",
    "conflict": "The same image under two labels of one data set.",
    "duplicate": "The same image twice under one label.",
    "across data sets": "The same image in two data sets; the one of the earlier data set stays.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curation:
    """A curated catalog that was written, with everything that was decided on the way."""

    catalog: Catalog
    path: Path
    """The file written."""
    report: Path
    """The HTML page."""
    counts: Mapping[str, Sequence[int]]
    """Per domain: classes of training before and after, images of training before and after."""
    dropped: Mapping[Rule, int]
    """Dropped images by rule; each is a row of ``PATH.dropped.csv``."""
    dropped_table: pa.Table
    """Columns image, label, domain, dataset, role, rule, reason, instead."""
    pairs: Mapping[Relation, int]
    """Pairs that show one image, by what they are to each other; each is a row of ``PATH.pairs.csv``."""
    pair_table: pa.Table
    """Columns first_… and second_… (image, label, dataset, role), relation, method, score, closeness,
    became."""
    published: Mapping[str, tuple[int, int | None, int, int | None]] = dataclasses.field(default_factory=dict)
    """For a recipe, per data set and of ``all``: classes, those published, images, those published."""
    notes: Sequence[str] = ()
    """What was refined, and what could not be looked at."""

    @property
    def num_unreadable(self) -> int:
        """Files that could not be read."""
        return self.dropped.get("unreadable", 0)

    @property
    def exit_status(self) -> int:
        """0, or 3 when files could not be read."""
        return 3 if self.num_unreadable else 0

    @property
    def tables(self) -> list[Table]:
        """The training images by domain, and for a recipe the published numbers beside its own."""
        rows = []
        for domain, numbers in self.counts.items():
            kept = f"{100 * numbers[3] / numbers[2]:.1f} %" if numbers[2] else "–"
            rows.append([domain, *(f"{number:,}" for number in numbers), kept])
        columns = ["domain (training)", "classes before", "after", "images before", "after", "kept"]
        tables = [Table("", columns, rows)]
        if self.published:
            rows = []
            for dataset, found in self.published.items():
                difference = f"{100 * (found[2] / found[3] - 1):+.1f} %" if found[3] else "–"
                cells = ["–" if number is None else f"{number:,}" for number in found]
                rows.append([dataset, *cells, difference])
            columns = ["data set", "classes", "published", "images", "published", "difference"]
            tables.append(Table("beside the published numbers", columns, rows))
        return tables

    def __rich__(self) -> rich.console.Group:
        escape = rich.markup.escape
        first, *further = self.tables
        first = dataclasses.replace(first, title=f"{len(self.catalog):,} images in {self.path}")
        lines = [f"{number:,} dropped: {MEANINGS[rule]}" for rule, number in self.dropped.items()]
        lines += [f"{number:,} pairs found: {name}" for name, number in self.pairs.items()]
        lines += [f"[yellow]note[/yellow] {escape(note)}" for note in self.notes]
        lines.append(f"why: {escape(str(self.path))}.dropped.csv; images: {escape(str(self.report))}")
        return rich.console.Group(*(table.printed() for table in (first, *further)), *lines)


def write_curation_page(
    result: Curation,
    before: Catalog,
    after: Catalog,
    ledger: Ledger,
    images: Catalog,
    pairs: Pairs,
    relation: Int[np.ndarray, " p"],
    config: CurateConfig,
) -> Path:
    """Write the page to ``result.report``.

    Args:
        result: what is told in numbers.
        before: the catalog as it was read.
        after: the same rows with refined labels.
        ledger: which rows were dropped.
        images: those of the catalog, and behind them those of the evaluation sets.
        pairs: images found twice.
        relation: of each pair, an index into :data:`RELATIONS`.
        config: what was asked for.
    """
    training = after.has_role("train")
    default = CurateConfig()
    facts = {
        name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        for name, value in vars(config).items()
        if value != getattr(default, name)
    }
    page = _Page(after, ledger, images)
    quarantined = ledger.dropped_rows("unreadable")
    return write_page(
        result.report,
        "curation.html",
        title=f"Curation: {result.path.name}",
        facts={"images": f"{len(result.catalog):,} of {len(before):,} stay", **facts},
        counts=result.tables[0],
        dropped=Table(
            "",
            ["images", Cell("rule", kind="text"), Cell("meaning", kind="text")],
            [
                [f"{number:,}", Cell(rule, kind="text"), Cell(MEANINGS[rule], kind="text")]
                for rule, number in result.dropped.items()
            ],
        ),
        published=dataclasses.replace(result.tables[1], title="") if result.published else None,
        notes=result.notes,
        histograms=_histograms(before, after, training, training & ledger.is_kept),
        samples=page.samples(np.flatnonzero(training & ledger.is_kept)),
        groups=page.groups(pairs, relation),
        doubtful=page.doubtful(training),
        num_doubtful=len(ledger.dropped_rows("noise")),
        quarantined=Table(
            "",
            ["file", Cell("reason", kind="text")],
            [
                [after.table["image"][int(row)].as_py(), Cell(ledger.reason_of(int(row)), kind="text")]
                for row in quarantined[:NUM_QUARANTINED]
            ],
        ),
        num_quarantined=len(quarantined),
        name=result.path.name,
    )


class _Page:
    """Images for the page."""

    def __init__(self, catalog: Catalog, ledger: Ledger, images: Catalog) -> None:
        self.catalog, self.ledger, self.images = catalog, ledger, images
        self.is_kept = ledger.is_kept

    def shown(self, row: int, small: str | None = None, *, marked: bool = True) -> Thumbnail:
        """A row of the catalog or the evaluation sets, by default with its role."""
        source = self.images.source(row)
        url, label, role, stays = image_url(source), Path(source.location).name, "evaluation set", True
        if row < len(self.catalog):
            label, role = (self.catalog.table[name][row].as_py() or "" for name in ("label", "role"))
            stays = bool(self.is_kept[row])
        if not marked:
            return Thumbnail(url, label, small="")
        return Thumbnail(
            url,
            label,
            small=role if small is None else small,
            kind="right" if stays else "wrong",
            mark="✓ stays" if stays else "✗ dropped",
        )

    def samples(self, kept: Int[np.ndarray, " k"]) -> dict[str, list[Thumbnail]]:
        """A few images of each domain, of different classes where there are as many."""
        found = {}
        domains = self.catalog.table["domain"].combine_chunks().dictionary_encode()
        codes = np.asarray(domains.indices.fill_null(-1).to_numpy(zero_copy_only=False))
        order = np.argsort(draws_of(self.catalog.table["image"], seed=0)[kept], kind="stable")
        for code, domain in sorted(enumerate(domains.dictionary.to_pylist()), key=lambda pair: pair[1]):
            own = kept[order][codes[kept[order]] == code][: 20 * NUM_SAMPLES]
            labels = [self.catalog.table["label"][int(row)].as_py() for row in own]
            firsts = sorted(dict(zip(reversed(labels), range(len(labels) - 1, -1, -1), strict=True)).values())
            chosen = firsts + sorted(set(range(len(own))) - set(firsts))
            if len(own):
                found[domain] = [self.shown(int(own[place]), marked=False) for place in chosen[:NUM_SAMPLES]]
        return found

    def groups(self, pairs: Pairs, relation: Int[np.ndarray, " p"]) -> list[dict[str, Any]]:
        """Of each relation, some pairs of each method, the least alike first: that is where mistakes are."""
        found = []
        for number, name in enumerate(RELATIONS):
            own = np.flatnonzero(relation == number)
            chosen: list[int] = []
            for method in reversed(range(len(METHODS))):
                of_method = own[pairs.method[own] == method]
                order = np.argsort(np.nan_to_num(pairs.closeness[of_method], nan=1.0), kind="stable")
                chosen += of_method[
                    order[: NUM_PAIRS // len(METHODS) if method else NUM_PAIRS - len(chosen)]
                ].tolist()
            shown = [
                {
                    "images": sorted(
                        (self.shown(int(pairs.first[pair])), self.shown(int(pairs.second[pair]))),
                        key=operator.attrgetter("kind"),  # the right one first
                    ),
                    "text": pairs.found_by(pair),
                    "drawn": self.drawn(pairs, pair),
                }
                for pair in chosen
            ]
            if shown:
                found.append({"name": name, "number": len(own), "why": _EXPLANATIONS[name], "pairs": shown})
        return found

    def drawn(self, pairs: Pairs, pair: int) -> str:
        """Both images of a pair that geometry found, with the places that agree."""
        if METHODS[pairs.method[pair]] != "geometry":
            return ""
        rows = (int(pairs.first[pair]), int(pairs.second[pair]))
        [copy] = made_of_each_other(lambda row: decode(self.images.source(row)), [rows])
        points = () if copy is None else copy.evidence.points
        return pair_url(self.images.source(rows[0]), self.images.source(rows[1]), points)

    def doubtful(self, training: np.ndarray) -> list[list[Thumbnail]]:
        """Some images dropped for their label, each beside others of its class."""
        rows = self.ledger.dropped_rows("noise")
        if not len(rows):
            return []
        places = np.unique(np.linspace(0, len(rows) - 1, NUM_DOUBTFUL).astype(np.int64))
        classes = self.catalog.class_ids()
        kept = np.flatnonzero(self.is_kept & training)
        return [
            [
                self.shown(int(row), self.ledger.reason_of(int(row))),
                *(self.shown(int(other), "") for other in kept[classes[kept] == classes[row]][:4]),
            ]
            for row in rows[places]
        ]


def _histograms(
    before: Catalog, after: Catalog, was_there: np.ndarray, is_there: np.ndarray
) -> dict[str, Any]:
    """How many classes have how many training images, before and after, a drawing's URL per domain."""
    sizes = []
    for catalog, rows in ((before, was_there), (after, is_there)):
        own = catalog.take(rows)
        _, firsts, counts = np.unique(own.class_ids(), return_index=True, return_counts=True)
        domains = own.strings("domain")[firsts]
        sizes.append({domain: counts[domains == domain] for domain in set(domains.tolist())})
    figures = {}
    for domain in sorted({*sizes[0], *sizes[1]}):
        both = [own.get(domain, np.empty(0, np.int64)) for own in sizes]
        largest = max(int(own.max(initial=1)) for own in both)
        edges = np.unique(np.geomspace(1, largest + 1, min(largest, 16) + 1).round())
        edges = edges if len(edges) > 1 else np.array([1.0, 2.0])
        figure, axes = new_axes(4.2, 2.4)
        for own, name, style in zip(both, ("before", "after"), _STYLES, strict=True):
            alpha = 0.35 if style == "stepfilled" else 1.0
            axes.hist(own, bins=edges.tolist(), label=name, histtype=style, alpha=alpha, linewidth=1.6)
        axes.set(title=as_drawn(domain), xlabel="images per class", ylabel="classes", xscale="log")
        ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50, 100, 1000, 10000) if tick <= largest]
        axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
        axes.minorticks_off()
        axes.legend(fontsize=8, frameon=False)
        figures[domain] = drawing_url(figure)
    return figures
