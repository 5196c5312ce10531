"""How many copies ``duplicates --verify geometry`` finds, and how many of what it finds are none.

    python benchmarks/copies.py photos/features --domain package --model demo/model
    python benchmarks/copies.py demo/features --domain photo --per-thing 1 --model demo/model

Takes a feature folder for its catalog alone, and a model. Of each image three copies are made: half of its
sides; in perspective; darker, smaller, with a fifth under a banner. All are indexed together. A pair is right
if both come of one image, and both show some of the same: two different halves are not made.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import cv2
import numpy as np
import rich
from PIL import Image, ImageDraw, ImageEnhance
from rich.table import Table

from samething.cli import run_script
from samething.errors import ImageError
from samething.features import FeatureSet
from samething.images import decode
from samething.rerank import laid_over
from samething.search import Duplicates, duplicates, index

MIN_SCORES = (0.4, 0.5, 0.6, 0.7, 0.8)
CLOSENESSES = (0.6, 0.7, 0.8, 0.9)


def main(
    features: Path, *, domain: str, model: str, per_thing: int = 3, most: int = 120, side: int = 640
) -> None:
    """Measure copies.

    Args:
        features: a feature folder.
        domain: the domain of the images.
        model: what embeds: a model folder, a hub id or a backbone's name.
        per_thing: images of one thing at most: other photographs of it are no copies.
        most: images, drawn at random.
        side: of the longer side of an image, in pixels.
    """
    catalog = FeatureSet.open(features).catalog
    catalog = catalog.take(catalog.strings("domain") == domain)
    rng = np.random.default_rng(0)
    taken: dict[str, int] = {}
    with TemporaryDirectory() as scratch:
        images, things = Path(scratch, "images"), []
        images.mkdir()
        for row in rng.permutation(len(catalog)).tolist():
            label = catalog.strings("label")[row]
            if len(things) == most or taken.get(label, 0) == per_thing:
                continue
            try:
                image = decode(catalog.source(row)).convert("RGB")
            except ImageError:
                continue
            taken[label] = taken.get(label, 0) + 1
            image.thumbnail((side, side))
            for name, copy in {"0": image, **copies_of(image, rng)}.items():
                copy.save(images / f"{len(things):04d} {name}.jpg", quality=80)
            things.append(label)
        index(images, model=model, output=Path(scratch, "index"))
        with mock.patch.object(laid_over, "COPY", min(CLOSENESSES)):  # what is below is measured, too
            found = duplicates(Path(scratch, "index"), min_score=min(MIN_SCORES), verify="geometry")
    print_tables(found, things)


def copies_of(image: Image.Image, rng: np.random.Generator) -> dict[str, Image.Image]:
    """A quarter of the area around the middle, the whole in perspective, and under a banner."""
    width, height = image.size
    left, top = (round(rng.uniform(0.15, 0.35) * length) for length in (width, height))
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    moved = (corners + rng.uniform(-0.1, 0.1, (4, 2)) * (width, height)).astype(np.float32)
    matrix = cv2.getPerspectiveTransform(corners, moved)
    small = ImageEnhance.Brightness(image).enhance(rng.uniform(0.6, 1.2))
    small = small.resize([round(0.7 * length) for length in image.size])
    ImageDraw.Draw(small).rectangle((0, 0, small.width, small.height // 5), fill="red")
    return {
        "half": image.crop((left, top, left + width // 2, top + height // 2)),
        "perspective": Image.fromarray(
            cv2.warpPerspective(np.asarray(image), matrix, image.size, borderValue=(9, 9, 9))
        ),
        "banner": small,
    }


def print_tables(found: Duplicates, things: list[str]) -> None:
    """Recall by kind of copy, and what is wrong, by both thresholds."""
    stems = {item["id"]: Path(item["path"]).stem for group in found.groups for item in group.items}
    links = [
        (*(stems[link[end]].split() for end in ("first", "second")), link["score"], link["closeness"])
        for group in found.groups
        for link in group.verified
    ]
    kinds = ["half", "perspective", "banner"]
    every = list(itertools.combinations(["0", *kinds], 2))
    table = Table(
        "--min-score", "correlation", *kinds, "all pairs", "of one thing", "of two things", "precision %"
    )
    for least_score, least in itertools.product(MIN_SCORES, CLOSENESSES):
        chosen = [link for link in links if link[2] >= least_score and link[3] >= least]
        right = [link for link in chosen if link[0][0] == link[1][0]]
        wrong = [link for link in chosen if link[0][0] != link[1][0]]
        same = sum(things[int(one[0])] == things[int(other[0])] for one, other, _, _ in wrong)
        recall = [
            sum({one[1], other[1]} == {"0", kind} for one, other, _, _ in right) / len(things)
            for kind in kinds
        ]
        recall.append(len(right) / (len(every) * len(things)))
        table.add_row(
            f"{least_score}", f"{least}", *(f"{100 * each:.1f}" for each in recall),
            str(same), str(len(wrong) - same), f"{100 * len(right) / max(1, len(chosen)):.1f}",
        )  # fmt: skip
    told = f"{len(things)} images of {len(set(things))} things and three copies of each"
    table.caption = f"{told}; recall in %, then wrong pairs"
    rich.print(table)


if __name__ == "__main__":
    run_script(main)
