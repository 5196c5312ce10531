"""Trained runs beside what the backbone does without training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from samething.arrays import Bool, Embeddings, FeatureRows, Float, Int
from samething.backbones import Backbone
from samething.backbones.loading import load_from_metadata
from samething.catalog import Catalog
from samething.errors import InputError
from samething.evaluation.looked_again import LookedAgain
from samething.evaluation.measuring import compare_embeddings
from samething.evaluation.no_match import NoMatch, measure_no_match
from samething.evaluation.protocols import Protocol, Scope
from samething.evaluation.result import Comparison
from samething.evaluation.run_report import Analysis, write_report
from samething.evaluation.task import rows_by_role
from samething.features import FeatureSet
from samething.heads import Head, HeadConfig, fitted_head
from samething.images import prepare
from samething.rerank import reranker_of
from samething.rerank.gains import GAINS, Gain
from samething.rerank.second_look import Embed
from samething.retrieval import Precision
from samething.training.run import Run
from samething.training.validation import kept_embeddings


@dataclasses.dataclass(frozen=True, eq=False)
class OpenedRuns:
    """Runs on one catalog, with the embeddings of its test images."""

    runs: tuple[Run, ...]
    features: tuple[FeatureSet, ...]
    """Of each run."""
    catalog: Catalog
    """What all were trained on and are tested on."""
    training: Int[np.ndarray, " t"]
    """Rows of the catalog that were trained on, ascending."""
    is_tested: Bool[np.ndarray, " n"]
    """Which of its images are for the test."""
    tested: Catalog
    """These images."""

    @classmethod
    def open(cls, folders: Sequence[Path], *, moved: Sequence[Path] = ()) -> OpenedRuns:
        """Open finished runs.

        Args:
            folders: the runs.
            moved: feature folders that were moved since the runs were trained; each run finds its own.

        Raises:
            ArtefactError: a run's features are nowhere.
            InputError: the catalogs differ or hold no test images.
        """
        runs = [Run.open(folder, moved=moved) for folder in folders]
        features = [run.features() for run in runs]
        catalog = features[0].catalog
        for run, found in zip(runs, features, strict=True):
            if found.catalog.fingerprint != catalog.fingerprint:
                raise InputError(
                    f"{run.folder} and {runs[0].folder} were trained on features of different catalogs",
                    expected="runs on one catalog, so that they are asked the same questions",
                    next_step="evaluate them one by one",
                )
        is_tested = np.zeros(len(catalog), bool)
        for rows in rows_by_role(catalog, "test"):
            is_tested[rows] = True
        training = np.flatnonzero(catalog.has_role("train"))
        return cls(tuple(runs), tuple(features), catalog, training, is_tested, catalog.take(is_tested))

    def kept(
        self, number: int, asked: Bool[np.ndarray, " n"], *, head: Head | None = None
    ) -> Float[np.ndarray, "_ _"]:
        """Embeddings of some images as a run's vectors are kept, by its own head or another one."""
        run, rows = self.runs[number], self.features[number].rows
        return kept_embeddings(head or run.head, rows, np.flatnonzero(asked), self.training, run.config.codes)

    @functools.cached_property
    def embeddings(self) -> list[Float[np.ndarray, "_ _"]]:
        """Of each run, of the test images."""
        return [self.kept(number, self.is_tested) for number in range(len(self.runs))]

    @functools.cached_property
    def names(self) -> list[str]:
        """Of each run: its folder's name, or the whole path where several have that name."""
        names = [run.folder.name for run in self.runs]
        return [
            name if names.count(name) == 1 else str(run.folder)
            for name, run in zip(names, self.runs, strict=True)
        ]

    def compare(
        self,
        protocol: Protocol,
        *,
        baselines: bool = True,
        gains: Sequence[str] = (),
        rerank: Sequence[str] = (),
        no_match: float | None = None,
        shown: Scope = "merged",
        precision: Precision = "float64",
    ) -> Comparison:
        """Evaluate the runs on the test images.

        The baselines, for each backbone among the runs: its features at full width, average-pooled to the
        run's dimension (the paper's zero-shot baseline), and their principal components, fitted to the
        training images.

        Args:
            protocol: what is measured.
            baselines: whether the baselines are measured too, those that the protocol allows.
            gains: names of ``GAINS``: each is applied to every run and compared with the run.
            rerank: names of ``RERANKERS``, likewise; what their evidence is worth is learned on validation.
            no_match: precision of answers for which the threshold of "no match" is chosen on validation.
            shown: the scope that printing shows.
            precision: of the search.

        Raises:
            InputError: there are no validation images where they are needed, or a gain is unknown.
        """
        unknown = [name for name in gains if name not in GAINS]
        if unknown:
            raise InputError(
                f"gain {unknown[0]!r}", expected=f"some of {', '.join(GAINS)}", next_step="choose among them"
            )
        embeddings: dict[str, np.ndarray] = {}
        applied: dict[str, Gain | LookedAgain] = {}
        found: dict[str, NoMatch] = {}
        backbones = [str(features.backbone["name"]) for features in self.features]
        for number, name in enumerate(self.names):
            prefix = f"{backbones[number]} " if len(set(backbones)) > 1 else ""
            if baselines:
                features, run = self.features[number], self.runs[number]
                dim, codes = run.head.embedding_dim, run.config.codes.replace("float32", "")
                train: FeatureRows = np.asarray(features.rows[self.training])
                average = HeadConfig(kind="average", embedding_dim=dim, standardise=False)
                pca = HeadConfig(kind="pca", embedding_dim=dim)
                for label, rows in {
                    "backbone": np.asarray(features.rows[self.is_tested]),
                    f"average-pool-{dim} {codes}": self.kept(
                        number, self.is_tested, head=fitted_head(average, train)
                    ),
                    f"PCA-{dim} {codes}": self.kept(number, self.is_tested, head=fitted_head(pca, train)),
                }.items():
                    if protocol.largest_dim is None or rows.shape[1] <= protocol.largest_dim:
                        embeddings.setdefault(prefix + label.strip(), rows)
            for embedding in (name, *(f"{name} + {gain}" for gain in (*gains, *rerank))):
                embeddings[embedding] = self.embeddings[number]
            applied |= {f"{name} + {gain}": GAINS[gain] for gain in gains}
            applied |= {f"{name} + {look}": self._looked_again(number, look) for look in rerank}
            if no_match is not None:
                asked = self.is_tested | self.catalog.has_role("val")
                rows = self.kept(number, asked)
                found[name] = measure_no_match(rows, self.catalog.take(asked), target_precision=no_match)
        comparison = compare_embeddings(
            embeddings, self.tested, protocol=protocol, gains=applied, shown=shown, precision=precision
        )
        reference = self.names[0] if len(self.runs) > 1 or gains or rerank else None
        return dataclasses.replace(comparison, reference=reference, no_match=found)

    def _looked_again(self, number: int, rerank: str) -> LookedAgain:
        """A re-ranker on a run's test images, taught on its validation images."""
        run, features = self.runs[number], self.features[number]
        model = {"backbone": dict(features.backbone), "run": run.manifest.fingerprint}
        reranker = reranker_of(rerank, _embed(run, features), model, run.folder)
        self.catalog.require_files()
        is_validation = self.catalog.has_role("val")
        validation = self.catalog.take(is_validation)
        taught = LookedAgain.taught(reranker, validation, self.kept(number, is_validation))
        return LookedAgain(reranker, self.tested, taught.trust)

    def write_report(
        self, target: Path, comparison: Comparison, *, opening: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the HTML report of a comparison, about the first run; ``opening`` as for ``write_report``."""
        run, name, catalog = self.runs[0], self.names[0], self.tested
        return write_report(
            target,
            title=f"samething: {name}",
            comparison=comparison,
            featured=name,
            records=run.records,
            facts={
                "test images": f"{len(catalog):,} of {len(np.unique(catalog.class_ids())):,} instances",
                "domains": ", ".join(catalog.domains),
                "backbone": f"{self.features[0].backbone['name']}, frozen",
                "head": f"{run.head.embedding_dim}-d {run.config.codes} {run.config.head}, {run.config.loss}",
            },
            analysis=Analysis.of(self.embeddings[0], catalog),
            opening=opening,
        )


def _embed(run: Run, features: FeatureSet) -> Embed:
    """A run's way to embed images; its backbone is loaded when it is first used."""

    @functools.cache
    def backbone() -> Backbone:
        return load_from_metadata(features.backbone)

    def embed(images: Sequence[Image.Image]) -> Embeddings:
        pixels = np.stack([prepare(image, backbone().preprocessing) for image in images])
        with torch.inference_mode():
            return run.head.embed(backbone()(torch.from_numpy(pixels)).float().numpy())

    return embed
