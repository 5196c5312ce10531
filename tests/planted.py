"""Copies, leaks and wrong labels put into a data set on purpose, and how many of them were found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from samething.catalog import Catalog

KINDS = ("re-encoded", "resized", "cropped", "mirrored")
"""What is done to a copy."""


@dataclasses.dataclass(frozen=True)
class Planted:
    """A catalog with planted copies behind its own rows."""

    catalog: Catalog
    copies: dict[str, tuple[str, str]]
    """Path of each planted copy: the path of its original, and what was done to it."""
    leaks: frozenset[str]
    """Those of the copies whose original is in the test."""


def altered(image: Image.Image, kind: str, rng: np.random.Generator) -> Image.Image:
    """A copy as it is met in the wild."""
    width, height = image.size
    if kind == "resized":
        return image.resize((round(width * 0.6), round(height * 0.6)), Image.Resampling.BICUBIC)
    if kind == "cropped":  # 0 to 6 % of each border, so that it is seldom in the middle
        left, top, right, bottom = rng.uniform(0, 0.06, 4)
        box = (width * left, height * top, width * (1 - right), height * (1 - bottom))
        return image.crop(tuple(map(round, box)))
    if kind == "mirrored":
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def plant_copies(
    catalog: Catalog, folder: Path, *, per_kind: int, domains: tuple[str, ...], seed: int = 0
) -> Planted:
    """Copy images of each domain into its training rows, half of them from training, half from the test.

    Args:
        catalog: with roles.
        folder: where the copies are written; the new catalog has the root that holds it and the images.
        per_kind: copies of each kind, in each domain.
        domains: those that are kept.
    """
    rng = np.random.default_rng(seed)
    own = catalog.take(np.isin(catalog.strings("domain"), domains))
    rows = [{**row, "image": str(own.root / row["image"])} for row in own.table.to_pylist()]
    copies: dict[str, tuple[str, str]] = {}
    leaks = set()
    for domain in domains:
        for kind in KINDS:
            for part in ("train", "test"):
                members = [
                    row for row in rows
                    if row["domain"] == domain and (row["role"] == "train") == (part == "train")
                    and row["image"] not in copies
                ]  # fmt: skip
                chosen = rng.choice(len(members), per_kind // 2, replace=False)
                for number in chosen:
                    original = members[number]
                    target = folder / f"{domain}-{kind}-{part}-{number}.jpg"
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with Image.open(original["image"]) as image:
                        altered(image.convert("RGB"), kind, rng).save(
                            target, quality=60 if kind == "re-encoded" else 85
                        )
                    copies[str(target)] = (original["image"], kind)
                    leaks |= {str(target)} if part == "test" else set()
                    rows.append(
                        {
                            **original, "image": str(target), "role": "train", "sha256": None,
                            "width": None, "height": None,
                        }
                    )  # fmt: skip
    return Planted(Catalog.from_rows(rows, root=Path("/")), copies, frozenset(leaks))


def plant_noise(
    catalog: Catalog, *, share: float, domains: tuple[str, ...], seed: int = 0
) -> tuple[Catalog, np.ndarray]:
    """Training rows of some domains, a share of them with another label of their domain; and which.

    Only images of classes with at least four are given another label.
    """
    rng = np.random.default_rng(seed)
    own = catalog.take(catalog.has_role("train") & np.isin(catalog.strings("domain"), domains))
    classes, domain_of = own.class_ids(), own.strings("domain")
    labels = own.strings("label").copy()
    wrong = np.zeros(len(own), bool)
    for domain in domains:
        large = np.flatnonzero((domain_of == domain) & (np.bincount(classes)[classes] >= 4))
        for row in rng.permutation(large)[: round(share * np.sum(domain_of == domain))]:
            others = np.flatnonzero((domain_of == domain) & (classes != classes[row]))
            labels[row] = own.strings("label")[rng.choice(others)]
            wrong[row] = True
    return own.with_column("label", labels), wrong


def rates(found: set, planted: set) -> tuple[float, float]:
    """Recall and precision.

    >>> rates({1, 2}, {2, 3, 4, 5})
    (0.25, 0.5)
    """
    hits = len(found & planted)
    return hits / max(1, len(planted)), hits / max(1, len(found))
