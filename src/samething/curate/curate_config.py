"""What ``samething curate`` may be told: one small dataclass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final, Literal, TypeAlias

from samething.configuration import check_ranges
from samething.curate.near_hashes import LARGEST_DISTANCE
from samething.curate.noise import LEAST_AGREEMENT, Noise
from samething.curate.rules import Budget, Limit, Share, Thin
from samething.errors import InputError

Leaks: TypeAlias = Literal["remove", "report"]
Conflicts: TypeAlias = Literal["exact", "all", "report"]
Duplicates: TypeAlias = Literal["none", "exact", "perceptual", "embedding"]

Verify: TypeAlias = Literal["pixels", "geometry"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurateConfig:
    """Everything that decides which images stay.

    Raises:
        InputError: options that are out of range or do not fit together.
    """

    min_images: tuple[int | str, ...] = ()
    """Drop classes with fewer training images: NUMBER, or DATASET=NUMBER for one set; may be repeated."""
    max_images: tuple[int | str, ...] = ()
    """Keep at most so many images per class, drawn at random: NUMBER or DATASET=NUMBER; may be repeated."""
    max_classes: tuple[int | str, ...] = ()
    """Keep at most so many classes per data set, drawn at random: NUMBER or DATASET=NUMBER; repeatable."""
    budget_images: int | None = None
    """Keep at most so many training images in all, shared over the domains."""
    budget_classes: int | None = None
    """Keep at most so many classes in all, shared over the domains, instead."""
    share: Share = "proportional"
    """How a budget is shared: proportional to what each domain has, equal, or temperature, in between."""
    temperature: float = 2.0
    """For the share temperature: 1 is proportional, large is equal."""
    thin: Thin = "classes"
    """How a domain comes down to its share of images: fewer classes, or fewer images per class."""
    refine_by: Path | None = None
    """Table (.csv, .parquet) with image and attribute: labels become label/attribute."""
    features: tuple[Path, ...] = ()
    """Feature folders of the images, for embedding and noise; all of one backbone."""
    duplicates: Duplicates = "perceptual"
    """Look for the same image by checksum (exact), also by what it shows (perceptual), also by its features
    (embedding); each includes those before."""
    mirrored: bool = False
    """Count an image and its mirror image as the same."""
    bits: int = 10
    """Bits of 64 in which the perceptual hashes of candidates may differ, 0 to 15."""
    similarity: float = 0.85
    """Cosine of the features from which two images are candidates, in (0, 1]."""
    closeness: float = 0.95
    """Correlation of the pixels that makes a candidate the same image, up to 1; 0 takes every candidate."""
    verify: Verify = "pixels"
    """What confirms a candidate: its pixels as they lie (pixels), or also places that agree, under crop,
    perspective and overlays (geometry); needs the extra rerank."""
    conflicts: Conflicts = "exact"
    """The same image under two labels of a data set: drop both if the files are equal (exact), also if they
    look the same (all), or only report them."""
    against: tuple[Path, ...] = ()
    """Catalogs of evaluation sets that nothing may be trained on; their training rows do not count."""
    leaks: Leaks = "remove"
    """Training images that are in an evaluation set: remove or only report them."""
    noise: Noise = "none"
    """Drop images whose label is doubtful, by agreement with their class in the features."""
    agreement: float = LEAST_AGREEMENT
    """Agreement below which a label is doubtful; lower drops fewer."""
    hashes: Path | None = None
    """File that keeps the hashes of images for further runs; by default OUTPUT.hashes.sqlite."""
    memory_mib: int = 512
    """Ceiling in MiB of the working memory of each search for candidates."""
    seed: int = 0
    """Another number draws other images and classes."""

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        if not self.features and (self.duplicates == "embedding" or self.noise != "none"):
            raise InputError(
                f"--duplicates {self.duplicates} --noise {self.noise} without features",
                expected="a feature folder of the images",
                next_step="make one with samething features CATALOG, and give it with --features",
            )
        if self.verify == "geometry" and (self.duplicates in ("none", "exact") or self.closeness == 0):
            raise InputError(
                f"verify geometry with --duplicates {self.duplicates} and closeness {self.closeness}",
                expected="candidates that are to be confirmed",
                next_step="--duplicates embedding finds most of them; perceptual finds few crops",
            )
        if self.against and self.duplicates == "none":
            raise InputError(
                "--against with --duplicates none",
                expected="some way to find the same image",
                next_step="leave --duplicates away, or --against",
            )
        self.budget  # noqa: B018 (checks it)
        self.limits("min_images"), self.limits("max_images"), self.limits("max_classes")

    @property
    def budget(self) -> Budget:
        """The total budget, and how it is shared."""
        return Budget(
            images=self.budget_images,
            classes=self.budget_classes,
            share=self.share,
            temperature=self.temperature,
            thin=self.thin,
            least=self.limits("min_images").default or 1,
        )

    def limits(self, name: Literal["min_images", "max_images", "max_classes"]) -> Limit:
        """One of the three options that may differ between data sets."""
        texts = [str(value) for value in getattr(self, name)]
        return Limit.parsed(texts, name=f"--{name.replace('_', '-')}")


_RANGES: Final = (
    ("bits", 0, LARGEST_DISTANCE, f"a number of bits from 0 to {LARGEST_DISTANCE}"),
    ("similarity", 1e-9, 1, "a cosine in (0, 1]"),
    ("closeness", 0, 1, "a correlation in [0, 1]"),
    ("memory_mib", 1, 2**40, "at least 1"),
    ("seed", 0, 2**63 - 1, "a whole number from 0"),
)
