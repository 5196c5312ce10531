"""What an index with regions finds of things inside photographs, whether it says where, and what it takes.

    python benchmarks/region_index.py photos/features demo/features --model demo/model --planted package photo

Takes feature folders for their catalogs alone, and a model. Things of the first domain are planted in
photographs of the second as ``second_look.py`` does, at several shares of the area. Each gallery (a scene per
thing, and other photographs) is indexed with every ``--regions``; the thing's own image is the query.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rich
from PIL import Image, ImageChops
from rich.table import Table

from samething.arrays import unit
from samething.cli import run_script
from samething.features import FeatureSet
from samething.images import decode
from samething.images.parts import Place
from samething.search import Searcher, index
from second_look import SHARES, SIDES, scene


def main(
    *features: Path,
    model: str,
    planted: tuple[str, str],
    regions: tuple[str, ...] = ("none", "grid", "proposals"),
    shares: tuple[float, ...] = SHARES,
    most: int = 30,
    others: int = 30,
) -> None:
    """Measure indexes with regions.

    Args:
        features: feature folders whose images are used.
        model: what embeds: a model folder, a hub id or a backbone's name.
        planted: domains of things to plant and of photographs to plant them in.
        regions: ways to choose regions; none: whole images.
        shares: of the photograph's area that a thing covers.
        most: planted things.
        others: photographs without one.
    """
    found = [FeatureSet.open(folder).catalog for folder in features]
    things, photographs = (
        next(each.take(each.strings("domain") == name) for each in found if name in each.domains)
        for name in planted
    )
    labels, names = things.strings("label"), things.strings("image")
    clean = sorted(min(names[labels == label]) for label in set(labels))[:most]
    asked = [decode(things.source(int(np.flatnonzero(names == name)[0]))) for name in clean]
    rows = np.random.default_rng(0).permutation(len(photographs))[: len(asked) + others].tolist()
    grounds = [decode(photographs.source(row)).resize(SIDES) for row in rows]
    table = Table("share of the area", "regions", "R@1 %", "IoU ≥ ½ %", "centre inside %", "R@1 % by scales")
    costs: dict[str, list[Any]] = {way: [] for way in regions}
    with TemporaryDirectory() as scratch:
        for share in shares:
            rng = np.random.default_rng(round(1000 * share))
            scenes = [scene(thing, ground, share, rng) for thing, ground in zip(asked, grounds, strict=False)]
            folder = Path(scratch, f"{share}")
            folder.mkdir()
            for number, image in enumerate([*scenes, *grounds[len(asked) :]]):
                image.save(folder / f"{number:03d}.png")
            there = [_changed(*pair) for pair in zip(scenes, grounds, strict=False)]
            for way in regions:
                started = time.perf_counter()
                made = index(
                    folder, model=model, output=Path(scratch, f"{share} {way}"),
                    regions=None if way == "none" else way,
                )  # fmt: skip
                costs[way].append((len(grounds) / (time.perf_counter() - started), _bytes(made)))
                table.add_row(f"{share:.0%}", way, *_measured(made, asked, there))
    for way, own in costs.items():
        rate, size = np.median(np.array(own), axis=0)
        table.caption = f"{table.caption or ''}{way}: {rate:.1f} images per second, {size:,.0f} bytes each\n"
    rich.print(table)


def _measured(made: Searcher, asked: Sequence[Image.Image], there: Sequence[Place]) -> list[str]:
    right, near, inside, scaled = [], [], [], []
    for number, (thing, box) in enumerate(zip(asked, there, strict=True)):
        best = made.find(thing, k=1).matches[0]
        right.append(Path(best.path).stem == f"{number:03d}")
        if right[-1]:
            near.append(best.place is not None and overlap(best.place, box) >= 0.5)
            inside.append(best.place is not None and centre_inside(best.place, box))
        views = made.embedder.embed(_at_scales(thing))
        fused = unit(views.mean(axis=0)[None], np.float32)
        scaled.append(Path(made.find_vectors(fused, name="", k=1).matches[0].path).stem == f"{number:03d}")
    return [f"{100 * np.mean(each):.0f}" if each else "-" for each in (right, near, inside, scaled)]


def _at_scales(thing: Image.Image) -> list[Image.Image]:
    """The query as it is, its middle, and with a border of its mean colour."""
    colour = thing.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    views = [thing]
    for factor in (0.8, 1.3, 1.7):
        width, height = (round(side * factor) for side in thing.size)
        view = Image.new("RGB", (width, height), colour)
        view.paste(thing, ((width - thing.width) // 2, (height - thing.height) // 2))
        views.append(view)
    return views


def _changed(scene: Image.Image, ground: Image.Image) -> Place:
    """The box of what was planted."""
    left, top, right, bottom = ImageChops.difference(scene, ground).getbbox() or (0, 0, *SIDES)
    return left / SIDES[0], top / SIDES[1], right / SIDES[0], bottom / SIDES[1]


def _bytes(made: Searcher) -> float:
    files = [
        path for path in Path(made.index.location).iterdir() if path.name.startswith(("vectors", "rows"))
    ]
    return sum(path.stat().st_size for path in files) / len(made.index)


def overlap(one: Place, other: Place) -> float:
    """Intersection over union, in [0, 1].

    >>> overlap((0.0, 0.0, 0.5, 1.0), (0.25, 0.0, 0.75, 1.0))
    0.3333333333333333
    """
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (one, other)]
    return shared / (sum(areas) - shared)


def centre_inside(one: Place, other: Place) -> bool:
    """Whether the centre of one part lies in the other.

    >>> whole = (0.0, 0.0, 1.0, 1.0)
    >>> centre_inside((0.0, 0.0, 0.5, 1.0), whole), centre_inside(whole, (0.0, 0.0, 0.4, 1.0))
    (True, False)
    """
    across, down = (one[0] + one[2]) / 2, (one[1] + one[3]) / 2
    return other[0] <= across <= other[2] and other[1] <= down <= other[3]


if __name__ == "__main__":
    run_script(main)
