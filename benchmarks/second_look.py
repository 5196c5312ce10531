"""What a second look gains, where it may harm, and what it takes.

    python benchmarks/second_look.py demo/features --domains photo object logo
    python benchmarks/second_look.py photos/features --things-against-photographs --domains package
    python benchmarks/second_look.py photos/features demo/features --planted package photo

Takes feature folders of one backbone; its features as they are, of unit length, make the first search. What
evidence is worth is learned on validation images and measured on test images of other things. Tables go to
the terminal; the images must be where the catalogs say. *Planted*: things of the first domain in photographs
of the second, at several shares of the area, turned, dimmed, a sixth covered; the thing's image is the query.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich
import torch
from PIL import Image, ImageEnhance
from rich.table import Table

from samething.arrays import unit
from samething.backbones.loading import load_from_metadata
from samething.catalog import Catalog
from samething.cli import run_script
from samething.evaluation import Comparison
from samething.evaluation.looked_again import LookedAgain
from samething.features import FeatureSet
from samething.images import decode, prepare
from samething.rerank import Shown, Trust, reranker_of
from samething.statistics import paired_difference

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
SIDES = (640, 480)


def main(
    *features: Path,
    domains: tuple[str, ...] = (),
    rerank: tuple[str, ...] = ("geometry",),
    things_against_photographs: bool = False,
    planted: tuple[str, str] | None = None,
    most: int = 40,
) -> None:
    """Measure second looks.

    Args:
        features: feature folders.
        domains: measure these alone, in one gallery.
        rerank: names of re-rankers.
        things_against_photographs: the catalog has no roles: the first image of each thing, by name, is clean
            and in the gallery; a third of the things is for validation, photographs of the others ask.
        planted: instead, domains of things to plant and of photographs to plant them in.
        most: planted things.
    """
    found = [FeatureSet.open(folder) for folder in features]
    backbone = load_from_metadata(found[0].backbone)

    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        pixels = np.stack([prepare(image, backbone.preprocessing) for image in images])
        with torch.inference_mode():
            return unit(backbone(torch.from_numpy(pixels)).float().numpy(), np.float32)

    looks = [reranker_of(name, embed, dict(found[0].backbone)) for name in rerank]
    if planted is not None:
        catalogs = [each.catalog.take(each.catalog.strings("domain") == name)
                    for name in planted for each in found if name in each.catalog.domains]  # fmt: skip
        rich.print(planted_table(catalogs[0], catalogs[1], embed, looks, most))
        return
    catalog, rows = found[0].catalog, np.asarray(found[0].rows, np.float32)
    if things_against_photographs:
        catalog = with_roles(catalog)
    chosen = np.isin(catalog.strings("domain"), domains or catalog.domains)
    catalog, embeddings = catalog.take(chosen), unit(rows[chosen], np.float32)
    is_val = catalog.has_role("val")
    tested = catalog.take(~is_val)
    gains = {}
    for look in looks:
        taught = LookedAgain.taught(look, catalog.take(is_val), embeddings[is_val])
        print(look.name, taught.trust)
        gains[look.name] = LookedAgain(look, tested, taught.trust)
        gains[f"{look.name}, untaught"] = LookedAgain(
            look, tested, Trust.untaught(look.weights), gains[look.name].known
        )
    compared = Comparison.of(
        dict.fromkeys(["first search", *gains], embeddings[~is_val]), tested, gains=gains,
        protocol="default",
    )  # fmt: skip
    table = Table("R@1 %", *compared.first.domains, "mean")
    for name, result in compared.results.items():
        cells = []
        for domain in (*compared.first.domains, "mean"):
            value = f"{100 * result.value('r@1', domain=domain):.1f}"
            if name in gains:
                change = compared.difference(name, "first search", metric="r@1", domain=domain)
                value += f" ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
            cells.append(value)
        table.add_row(name, *cells)
    rich.print(table)
    rich.print(timed(tested, looks))


def with_roles(catalog: Catalog) -> Catalog:
    """Roles of a catalog without: clean images are the index, a third of the things validates, others ask."""
    labels, images = catalog.strings("label"), catalog.strings("image")
    things = sorted(set(labels))
    validating = set(np.random.default_rng(0).permutation(things)[: len(things) // 3].tolist())
    clean = {min(images[labels == thing]) for thing in things}
    roles = [
        "index" if image in clean else "val" if label in validating else "query"
        for image, label in zip(images, labels, strict=True)
    ]
    return catalog.with_column("role", roles)


def timed(catalog: Catalog, looks: Sequence[Any]) -> Table:
    """Processor time of a look at 100 candidates from what is kept, and what is kept of an image."""
    import cv2

    cv2.setNumThreads(1)
    table = Table("re-ranker", "ms per 100 candidates, one core", "ms to keep an image", "bytes per image")
    sources = [catalog.source(row) for row in range(0, len(catalog), max(1, len(catalog) // 100))][:100]
    images = [decode(source) for source in sources]
    blank = np.zeros(2, np.float32)
    for look in looks:
        started = time.process_time()
        contents = [look.keep(image) for image in images[:20]]
        keeping = (time.process_time() - started) * 1000 / 20
        contents += [look.keep(image) for image in images[20:]]
        if look.name == "regions":
            blank = np.zeros((len(contents[0]) - 100) // 25, np.float32)
        shown = [Shown("", functools.partial(decode, source), blank) for source in sources]
        times = []
        for query in range(0, len(shown), 10):
            started = time.process_time()
            list(look.compare(shown[query], contents[query], shown, contents))
            times.append((time.process_time() - started) * 1000 * 100 / len(shown))
        size = np.mean([len(content) for content in contents])
        table.add_row(
            look.name, f"{np.median(times):.0f} (at most {max(times):.0f})", f"{keeping:.0f}", f"{size:,.0f}"
        )
    return table


# ---- planted scenes


def planted_table(
    things: Catalog, photographs: Catalog, embed: Any, looks: Sequence[Any], most: int
) -> Table:
    """R@1 of things in photographs, by the share of the area, with and without second looks."""
    labels, names = things.strings("label"), things.strings("image")
    clean = sorted(min(names[labels == label]) for label in set(labels))[:most]
    queries = [decode(things.source(int(np.flatnonzero(names == name)[0]))) for name in clean]
    step = max(1, len(photographs) // (2 * most))
    grounds = [decode(photographs.source(row)).resize(SIDES) for row in range(0, len(photographs), step)]
    asked = embed(queries)
    table = Table("share of the area", "first search", *(look.name for look in looks), "all together")
    others = [
        Shown("", functools.partial(_same, ground), embed([ground])[0]) for ground in grounds[len(queries) :]
    ]
    of_others = {look.name: [look.keep(ground) for ground in grounds[len(queries) :]] for look in looks}
    for share in SHARES:
        rng = np.random.default_rng(round(1000 * share))
        scenes = [scene(thing, ground, share, rng) for thing, ground in zip(queries, grounds, strict=False)]
        gallery = [Shown("", functools.partial(_same, one), embed([one])[0]) for one in scenes] + others
        contents = {
            look.name: [look.keep(image) for image in scenes] + of_others[look.name] for look in looks
        }
        right: dict[str, list[bool]] = {name: [] for name in ("first", *contents, "all")}
        for number, (thing, vector) in enumerate(zip(queries, asked, strict=True)):
            cosines = np.array([one.vector @ vector for one in gallery])
            right["first"].append(cosines.argmax() == number)
            order = np.argsort(-cosines)[:100]
            sums = {"all": cosines.copy()}
            for look in looks:
                query = Shown("", functools.partial(_same, thing), vector)
                of_each = [contents[look.name][place] for place in order]
                evidence = look.compare(query, look.keep(thing), [gallery[place] for place in order], of_each)
                added = Trust.untaught(look.weights).added(
                    np.array([one.numbers for one in evidence]), [""] * len(order)
                )
                sums[look.name] = cosines.copy()
                sums[look.name][order] += added
                sums["all"][order] += added
            for name, own in sums.items():
                right[name].append(own.argmax() == number)
        cells = []
        for name in (*contents, "all"):
            change = paired_difference(
                *(np.array(right[one], float) for one in (name, "first")), np.zeros(len(queries), int)
            )
            cells.append(
                f"{100 * np.mean(right[name]):.0f} ({100 * change.low:+.0f} to {100 * change.high:+.0f})"
            )
        table.add_row(f"{share:.0%}", f"{100 * np.mean(right['first']):.0f}", *cells)
    table.caption = f"{len(queries)} things, {len(queries)} scenes and {len(others)} other photographs, R@1 %"
    return table


def _same(image: Image.Image) -> Image.Image:
    return image


def scene(thing: Image.Image, ground: Image.Image, share: float, rng: np.random.Generator) -> Image.Image:
    """A thing in a photograph, at a share of its area: turned by up to 25°, dimmed, a sixth of it covered."""
    width, height = ground.size
    factor = math.sqrt(share * width * height / (thing.width * thing.height))
    size = [max(8, round(side * factor)) for side in thing.size]
    size = [min(side, limit) for side, limit in zip(size, ground.size, strict=True)]
    small = ImageEnhance.Brightness(thing.resize(size)).enhance(rng.uniform(0.5, 0.9))
    part = (round(size[0] / 2), round(size[1] / 3))
    place = [int(rng.integers(0, side - covered + 1)) for side, covered in zip(size, part, strict=True)]
    small.paste(ground.crop((0, 0, *part)), tuple(place))
    angle = rng.uniform(-25, 25)
    mask = Image.new("L", small.size, 255).rotate(angle, Image.Resampling.BILINEAR, expand=True)
    small = small.rotate(angle, Image.Resampling.BILINEAR, expand=True)
    left, top = (
        int(rng.integers(0, max(1, side - own + 1)))
        for side, own in zip(ground.size, small.size, strict=True)
    )
    made = ground.copy()
    made.paste(small, (left, top), mask)
    return made


if __name__ == "__main__":
    run_script(main)
