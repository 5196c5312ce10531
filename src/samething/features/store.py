"""A feature folder on disk.

Layout::

    features/NAME/
      job.json                    what the folder is for (backbone, preprocessing, dtype); written first
      data-<catalog>/             one generation, named after the catalog's fingerprint
        features.npy              float16 (n, w), one row a readable image, in catalog order
        catalog.parquet           the catalog of those rows
        unreadable.csv            image,reason of the images left out
        blocks/                   finished batches while a run is under way; removed at the end
      manifest.json               names the finished generation; written last
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import rich.markup

from samething.arrays import Bool, FeatureRows
from samething.catalog import Catalog, Dropped
from samething.checksums import require_whole
from samething.errors import ArtefactError
from samething.files import Json, Manifest, read_csv, read_manifest
from samething.images import Preprocessing

KIND: Final = "features"
FORMAT_VERSION: Final = 1
JOB_NAME: Final = "job.json"
INT8_NAME: Final = "int8.onnx"
"""The backbone in whole numbers, where that computed the features: later images need the very same."""
DATA_FILES: Final = ("features.npy", "catalog.parquet", "unreadable.csv")
"""Files of a generation."""


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """A finished feature folder."""

    folder: Path
    manifest: Manifest
    rows: FeatureRows
    """float16 (n, w), memory-mapped, in catalog order."""
    catalog: Catalog
    """The images of the rows; those that could not be read are not in it."""
    unreadable: tuple[Dropped, ...]
    """The images left out, with reasons."""
    num_computed: int = 0
    """Images that went through the backbone in this run; 0 when the folder was only read."""

    @classmethod
    def open(cls, folder: Path) -> FeatureSet:
        """Open a finished feature folder.

        Raises:
            ArtefactError: missing, unfinished, damaged, or of a newer format.
        """
        folder = Path(folder)
        manifest = read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION)
        data = folder / str(manifest.content["data"])
        require_whole(folder, manifest)
        try:
            rows = np.load(data / "features.npy", mmap_mode="r")
            unreadable = tuple(Dropped(**row) for row in read_csv(data / "unreadable.csv"))
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise ArtefactError(
                f"{data} is not whole ({error})",
                expected=f"a whole array of {manifest.content['num_rows']} rows",
                next_step=f"remove {folder} and compute the features again",
            ) from error
        catalog = Catalog.read(data / "catalog.parquet")
        shape = (manifest.content["num_rows"], manifest.made_from["backbone"]["width"])
        if rows.shape != shape or len(catalog) != len(rows):
            raise ArtefactError(
                f"{folder} holds {rows.shape} features for {len(catalog)} images",
                expected=f"the {shape} of its manifest",
                next_step=f"remove {folder} and compute the features again",
            )
        return cls(folder, manifest, rows, catalog, unreadable)

    def subset(self, chosen: Bool[np.ndarray, " n"]) -> FeatureSet:
        """The features of some images, held in memory; its identity says which images they are."""
        catalog = self.catalog.take(chosen)
        manifest = dataclasses.replace(
            self.manifest, made_from={**self.manifest.made_from, "catalog": catalog.fingerprint}
        )
        return dataclasses.replace(
            self, manifest=manifest, rows=np.asarray(self.rows[chosen]), catalog=catalog, unreadable=()
        )

    @property
    def backbone(self) -> Mapping[str, Json]:
        """Name, weights, width and preprocessing of the backbone."""
        description: Mapping[str, Json] = self.manifest.made_from["backbone"]
        return description

    @property
    def preprocessing(self) -> Preprocessing:
        """How the images were prepared."""
        return Preprocessing.from_json(self.backbone["preprocessing"])

    @property
    def exit_status(self) -> int:
        """0, or 3 when images were left out."""
        return 3 if self.unreadable else 0

    def __rich__(self) -> str:
        """What a person wants to know of the folder, in a few lines."""
        done = f"computed {self.num_computed:,}" if self.num_computed else "nothing to compute, all was there"
        lines = [
            f"[bold]{len(self.rows):,}[/bold] features × {self.rows.shape[1]} of {self.backbone['name']} "
            f"in {rich.markup.escape(str(self.folder))} ({done})"
        ]
        if self.unreadable:
            lines.append(f"[yellow]{len(self.unreadable):,} images could not be read:[/yellow]")
            lines += [f"  {rich.markup.escape(str(bad))}" for bad in self.unreadable[:5]]
            where = self.folder / str(self.manifest.content["data"]) / "unreadable.csv"
            lines.append(f"  all of them: {rich.markup.escape(str(where))}")
        return "\n".join(lines)
