"""Curation from end to end: read, refine, find what is there twice, doubt labels, count, write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from PIL import Image

from samething.arrays import Int
from samething.catalog import Catalog
from samething.configuration import changed, read_config, with_options
from samething.curate.curate_config import CurateConfig
from samething.curate.curation_report import Curation, write_curation_page
from samething.curate.duplicates import (
    EVALUATION,
    RELATIONS,
    TRAINING,
    VALIDATION,
    Rows,
    pair_table,
    resolve,
)
from samething.curate.hashes import Hashes, image_hashes
from samething.curate.ledger import COLUMNS, Ledger, Rule
from samething.curate.noise import agreement
from samething.curate.pairs import Contents, Pairs, embedding_pairs, exact_pairs, perceptual_pairs, row_ranks
from samething.curate.recipes import RECIPES, Recipe
from samething.curate.rules import Kept, Population
from samething.curate.sources import (
    KnownFeatures,
    by_attribute,
    checksums,
    evaluation_part,
    joined_catalogs,
    together,
)
from samething.errors import InputError
from samething.files import FORMULA, atomic_path, require_writable
from samething.images import decode


@with_options(
    CurateConfig,
    defaults=True,
    groups={
        "Numbers of images and classes": ("min_images", "max_images", "max_classes", "budget_images", "seed"),
        "Labels and copies": ("refine_by", "features", "duplicates", "against", "noise"),
    },
)
def curate(
    catalogs: Sequence[Path] = (),
    *,
    output: Path = Path("curated.parquet"),
    recipe: str | None = None,
    data_root: Path | None = None,
    root: Path | None = None,
    config: Path | CurateConfig | None = None,
    **changes: Any,
) -> Curation:
    """Choose what to train on: rules, budgets, finer labels, no copies, no leaks, no doubtful labels.

    Training rows are chosen; validation rows are dropped only where they leak, and evaluation rows (query,
    index) never. The steps, in this order: finer labels, unreadable files, leaks, contradictions, copies,
    doubtful labels, least images per class, classes per data set, images per class, budget.

    Beside OUTPUT are written OUTPUT.dropped.csv (a row for each image left out, and why), OUTPUT.pairs.csv
    (images that are there twice), OUTPUT.report.html, and OUTPUT.hashes.sqlite, from which a killed or
    repeated run goes on. The same input, options and seed give the same catalog, byte for byte. Files that
    cannot be read are left out, and the exit status is then 3.

    Args:
        catalogs: catalogs to choose from; several are put together.
        output: the catalog to write.
        recipe: m4d-35k: the paper's training set, rebuilt by its rules from --data-root and held against the
            published numbers.
        data_root: folder that holds the folders of the recipe's data sets.
        root: folder of the images, if they were moved since the catalog was made.
        config: a TOML file with any of the fields listed in docs/commands.md, such as mirrored = true; in
            Python also a whole CurateConfig.
        changes: fields of CurateConfig, on top of the recipe or the configuration.

    Raises:
        InputError: options that do not fit together, or nothing is left.
        ArtefactError: a catalog, data set or feature folder is missing.
    """
    catalogs, output = [Path(source) for source in catalogs], Path(output)
    if bool(catalogs) == (recipe is not None) or (recipe is None) != (data_root is None):
        raise InputError(
            f"{len(catalogs)} catalogs, --recipe {recipe}, --data-root {data_root}",
            expected="one or more catalogs, or --recipe NAME --data-root FOLDER",
            next_step="for instance: samething curate things.parquet -o curated.parquet",
        )
    if recipe is not None and recipe not in RECIPES:
        raise InputError(
            f"--recipe {recipe}", expected=f"one of {', '.join(RECIPES)}", next_step="choose one of these"
        )
    chosen = None if recipe is None else RECIPES[recipe]
    whole = config if isinstance(config, CurateConfig) else CurateConfig()
    if config is not None and not isinstance(config, CurateConfig):
        changes = {**read_config(config), **changes}
    changes = {**(chosen.changes if chosen else {}), **changes}
    if chosen and changes.get("against") and changes["duplicates"] == "none":
        changes["duplicates"] = "perceptual"  # what the recipe leaves out, the evaluation sets ask for
    whole = changed(whole, changes)
    require_writable(output)
    if chosen is not None and data_root is not None:
        parts, notes = chosen.read(Path(data_root))
    else:
        parts, notes = [Catalog.read(source, root=root) for source in catalogs], []
    catalog = joined_catalogs(parts)
    del parts
    if not len(catalog):
        raise InputError("a catalog without rows", expected="images", next_step="check the catalog")
    return _Process(catalog, whole, output, notes).run(chosen)


class _Process:
    """One curation under way."""

    def __init__(self, catalog: Catalog, config: CurateConfig, output: Path, notes: Sequence[str]) -> None:
        self.catalog, self.config, self.output, self.notes = catalog, config, output, list(notes)
        self.before = catalog
        self.ledger = Ledger(len(catalog))
        self.is_training = catalog.has_role("train")
        self.against = [evaluation_part(Catalog.read(source)) for source in config.against]
        self.images = together([catalog, *self.against], all_columns=False)
        self.known = KnownFeatures(config.features, scratch=output.parent) if config.features else None
        self.hashes: Hashes | None = None
        self.sha256: pa.Array | pa.ChunkedArray = checksums(self.images)

    def run(self, recipe: Recipe | None) -> Curation:
        """All steps, in an order in which each needs only what the earlier ones left."""
        config = self.config
        if config.refine_by is not None:
            self.catalog, note = by_attribute(self.catalog, config.refine_by)
            self.notes.append(note)
        if config.duplicates in ("perceptual", "embedding"):
            self._hash()
        if self.known is not None:
            self._place_features(self.known)
        pairs, relation, rows = self._find_pairs()
        if config.noise != "none" and self.known is not None:
            self._doubt(self.known)
        self._count()
        return self._finish(recipe, pairs, relation, rows)

    # ---- what is there twice

    def _decoded(self, row: int) -> Image.Image:
        return decode(self.images.source(row))

    def _hash(self) -> None:
        cache = self.config.hashes or self.output.with_name(f"{self.output.name}.hashes.sqlite")
        self.hashes = image_hashes(self.images, cache=cache)
        own = {row: reason for row, reason in self.hashes.unreadable.items() if row < len(self.catalog)}
        self.ledger.drop(np.asarray(list(own), np.int64), "unreadable", list(own.values()))
        if len(self.hashes.unreadable) > len(own):
            self.notes.append(
                f"{len(self.hashes.unreadable) - len(own):,} images of the evaluation sets cannot be read, "
                "so leaks of them are not found"
            )
        self.sha256 = pa.array(self.hashes.sha256, pa.string())

    def _place_features(self, known: KnownFeatures) -> None:
        places = known.place(self.images, self.sha256)
        lacking = int((places[: len(self.catalog)] < 0)[self.ledger.is_kept].sum())
        if lacking == len(self.catalog):
            raise InputError(
                f"{self.config.features[0]} holds no image of the catalog",
                expected="features of the catalog's images",
                next_step="make them with: samething features CATALOG",
            )
        others = int((places[len(self.catalog) :] < 0).sum())
        for number, of_what in ((lacking, "the catalog"), (others, "the evaluation sets")):
            if number:
                self.notes.append(f"{number:,} images of {of_what} have no features")

    def _find_pairs(self) -> tuple[Pairs, Int[np.ndarray, " p"], Rows]:
        config = self.config
        rows = self._rows()
        if config.duplicates == "none":
            return Pairs.empty(), np.empty(0, np.int64), rows
        contents = Contents.of(self.sha256, rows.ranks)
        nameless = int((contents.of_row < 0).sum()) - (len(self.hashes.unreadable) if self.hashes else 0)
        if nameless:
            self.notes.append(
                f"{nameless:,} images have no checksum in their catalog, so copies of them are not found; "
                "--duplicates perceptual reads the files"
            )
        found = [exact_pairs(contents, rows.tiers, rows.ranks)]
        if self.hashes is not None:
            found.append(perceptual_pairs(contents, self.hashes, self._decoded, config))
        if config.duplicates == "embedding":
            found.append(self._embedding_pairs(contents))
        pairs = Pairs.joined(found).once()
        relation = resolve(pairs, rows, self.ledger, leaks=config.leaks, conflicts=config.conflicts)
        return pairs, relation, rows

    def _embedding_pairs(self, contents: Contents) -> Pairs:
        assert self.known is not None and self.hashes is not None
        described = np.flatnonzero((self.known.places >= 0) & (contents.of_row >= 0))
        described = described[contents.row_of[contents.of_row[described]] == described]
        pairs, num_crowded = embedding_pairs(
            described,
            self.known.gathered(described),
            self.hashes,
            self._decoded,
            self.config,
        )
        if num_crowded:
            self.notes.append(
                f"{num_crowded:,} images have more candidates by embedding than were looked at; a higher "
                "similarity makes fewer"
            )
        return pairs

    def _rows(self) -> Rows:
        """What is known of all images."""
        num_others = len(self.images) - len(self.catalog)
        tiers = np.full(len(self.images), EVALUATION, np.int64)
        tiers[np.flatnonzero(self.catalog.has_role("train"))] = TRAINING
        tiers[np.flatnonzero(self.catalog.has_role("val"))] = VALIDATION
        encoded = self.catalog.table["dataset"].fill_null("").combine_chunks().dictionary_encode()
        datasets = encoded.indices.to_numpy().astype(np.int64)
        datasets = np.concatenate([datasets, np.full(num_others, len(encoded.dictionary), np.int64)])
        sides = [
            self.catalog.table[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width", "height")
        ]
        num_pixels = np.concatenate([sides[0] * sides[1], np.zeros(num_others, np.int64)])
        classes = np.concatenate([self.catalog.class_ids(), np.full(num_others, -1, np.int64)])
        return Rows(tiers, classes, datasets, row_ranks(tiers, datasets, num_pixels))

    def _doubt(self, known: KnownFeatures) -> None:
        has_features = known.places[: len(self.catalog)] >= 0
        rows = np.flatnonzero(self.ledger.is_kept & self.is_training & has_features)
        subset = self.catalog.take(rows)
        _, domains = np.unique(subset.strings("domain").astype(str), return_inverse=True)
        score = agreement(known.gathered(rows), subset.class_ids(), domains)
        doubtful = score < self.config.agreement
        reasons = [f"{value:.2f} agreement with its class" for value in score[doubtful]]
        self.ledger.drop(rows[doubtful], "noise", reasons)

    # ---- numbers

    def _count(self) -> None:
        """The rules on numbers, each on what the one before left."""
        config = self.config
        least, most, classes = (config.limits(name) for name in ("min_images", "max_images", "max_classes"))
        budget = (config.budget_images, config.budget_classes)
        if not (config.min_images or config.max_images or config.max_classes or any(budget)):
            return
        of = Population.of(self.catalog, seed=config.seed)
        rows = np.flatnonzero(self.ledger.is_kept & self.is_training)
        steps: list[tuple[Rule, str, Callable[..., Kept], Any]] = [
            ("too few images", f"fewer than {least} in its class", of.with_enough_images, least),
            ("too many classes", f"at most {classes} classes per data set", of.with_capped_classes, classes),
            ("too many images", f"at most {most} images per class", of.with_capped_images, most),
            ("budget", str(config.budget), of.within_budget, config.budget),
        ]
        for rule, reason, rows_that_stay, limit in steps:
            kept = rows_that_stay(rows, limit)
            self.ledger.drop(np.setdiff1d(rows, kept, assume_unique=True), rule, reason)
            rows = kept

    # ---- the end

    def _finish(
        self, recipe: Recipe | None, pairs: Pairs, relation: Int[np.ndarray, " p"], rows: Rows
    ) -> Curation:
        kept = self.ledger.is_kept
        if not kept.any():
            raise InputError(
                f"nothing of the {len(self.catalog):,} images is left: "
                + ", ".join(f"{number:,} {rule}" for rule, number in self.ledger.counts().items()),
                expected="images that stay",
                next_step="loosen the rule that dropped the most",
            )
        everything = pa.concat_tables([part.table.select(COLUMNS) for part in (self.catalog, *self.against)])
        dropped = self.ledger.table(self.catalog, everything["image"])
        twice = pair_table(pairs, relation, rows, everything, self.ledger)
        curated = self.catalog.take(kept)
        if self.hashes is not None:
            # those taken on the way, without boxes; what has none is unreadable, and so not kept
            taken = self.hashes.sha256[np.flatnonzero(kept)]
            curated = curated.with_column("sha256", [text.partition("#")[0] for text in taken])
        numbers = np.bincount(relation, minlength=len(RELATIONS))
        counts: dict[str, list[int]] = {}
        sides = ((self.before, self.is_training), (self.catalog, self.is_training & kept))
        for place, (catalog, chosen) in enumerate(sides):
            of_domains: list[dict[str, Any]] = catalog.take(chosen).counts()
            for row in of_domains:
                own = counts.setdefault(row["domain"] or "", [0, 0, 0, 0])
                own[place], own[place + 2] = row["instances"], row["images"]
        result = Curation(
            catalog=curated,
            path=self.output,
            report=self.output.with_name(f"{self.output.name}.report.html"),
            counts=dict(sorted(counts.items())),
            dropped=self.ledger.counts(),
            dropped_table=dropped,
            pairs={name: int(number) for name, number in zip(RELATIONS, numbers, strict=True) if number},
            pair_table=twice,
            published=recipe.counts(curated) if recipe else {},
            notes=(*self.notes, *([recipe.note] if recipe else [])),
        )
        for table, suffix in ((dropped, "dropped"), (twice, "pairs")):
            for place, field in enumerate(table.schema):
                if pa.types.is_string(field.type):
                    plain = pc.replace_substring_regex(table[place], FORMULA, "'\\1")
                    table = table.set_column(place, field.name, plain)
            with atomic_path(self.output.with_name(f"{self.output.name}.{suffix}.csv")) as partial:
                pa.csv.write_csv(table, partial)
        write_curation_page(
            result, self.before, self.catalog, self.ledger, self.images, pairs, relation, self.config
        )
        curated.write(self.output)  # last: it is the sign that everything is there
        return result
