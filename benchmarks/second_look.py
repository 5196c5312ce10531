"""What a second look gains, where it may harm, and what it takes.

    python benchmarks/second_look.py demo/features --domains photo object logo
    python benchmarks/second_look.py photos/features --things-against-photographs --domains package
    python benchmarks/second_look.py photos/features demo/features --planted package photo --model demo/model

Takes feature folders of one backbone; its features as they are, of unit length, make the first search. What
evidence is worth is learned on validation images and measured on test images of other things. Tables go to
the terminal; the images must be where the catalogs say. *Planted*: things of the first domain in photographs
of the second, at several shares of the area, turned, dimmed, a sixth covered; the thing's image is the query.
"""

from __future__ import annotations

import functools
import hashlib
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
from samething.embedder import Embedder
from samething.evaluation import compare_embeddings
from samething.evaluation.looked_again import LookedAgain
from samething.features import FeatureSet
from samething.images import decode, prepare
from samething.images.parts import cut_out, standing_out
from samething.pages import new_axes
from samething.rerank import Kept, Shown, Trust, reranker_of, second_look
from samething.rerank.second_look import NUM_CANDIDATES
from samething.statistics import paired_difference

SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
SIDES = (640, 480)
INDEXED = "proposals in the index"


def main(
    *features: Path,
    domains: tuple[str, ...] = (),
    rerank: tuple[str, ...] = ("geometry",),
    things_against_photographs: bool = False,
    planted: tuple[str, str] | None = None,
    model: str | None = None,
    most: int = 60,
    curve: Path | None = None,
) -> None:
    """Measure second looks.

    Args:
        features: feature folders.
        domains: measure these alone, in one gallery.
        rerank: names of re-rankers.
        things_against_photographs: the catalog has no roles: the first image of each thing, by name, is clean
            and in the gallery; a third of the things is for validation, photographs of the others ask.
        planted: instead, domains of things to plant and of photographs to plant them in.
        model: for planted things: a model that embeds, through onnxruntime; else the features' backbone does.
        most: planted things.
        curve: where to draw what was found of planted things, as .svg or .png.
    """
    found = [FeatureSet.open(folder) for folder in features]
    backbone = load_from_metadata(found[0].backbone)

    def embed(images: Sequence[Image.Image]) -> np.ndarray:
        pixels = np.stack([prepare(image, backbone.preprocessing) for image in images])
        with torch.inference_mode():
            return unit(backbone(torch.from_numpy(pixels)).float().numpy(), np.float32)

    if model is not None:
        embedder = Embedder.load(model)
        looks = [reranker_of(name, embedder.embed, embedder.fingerprint, embedder.folder) for name in rerank]
    else:
        looks = [reranker_of(name, embed, dict(found[0].backbone)) for name in rerank]
    if planted is not None:
        catalogs = [each.catalog.take(each.catalog.strings("domain") == name)
                    for name in planted for each in found if name in each.catalog.domains]  # fmt: skip
        embed = embed if model is None else embedder.embed
        rich.print(planted_table(catalogs[0], catalogs[1], embed, looks, most, curve))
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
    compared = compare_embeddings(
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
    """Time of a look at 100 candidates from what is kept, on one core, and what is kept of an image.

    Of each of 25 queries the best of three times.
    """
    import cv2

    cv2.setNumThreads(1)
    table = Table(
        "re-ranker", "ms of processor per 100 candidates, p50 / p95", "ms of clock, p50 / p95",
        "ms to keep an image", "bytes per image",
    )  # fmt: skip
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
        for query in range(0, len(shown), 4):
            tries = []
            for _ in range(3):  # the best: other work on the machine slows the processor, too
                started = np.array([time.process_time(), time.perf_counter()])
                list(look.compare(shown[query], contents[query], shown, contents))
                tries.append(np.array([time.process_time(), time.perf_counter()]) - started)
            times.append(np.min(tries, axis=0) * 1000 * 100 / len(shown))
        size = np.mean([len(content) for content in contents])
        told = [f"{middle:.0f} / {late:.0f}" for middle, late in np.percentile(times, [50, 95], axis=0).T]
        table.add_row(look.name, *told, f"{keeping:.0f}", f"{size:,.0f}")
    return table


# ---- planted scenes


def planted_table(
    things: Catalog, photographs: Catalog, embed: Any, looks: Sequence[Any], most: int, curve: Path | None
) -> Table:
    """R@1 of things in photographs, by the share of the area, with and without second looks.

    Every thing is planted once in a gallery, and there are as many galleries as it takes for ``most`` scenes.
    What the looks need is kept in the user's cache, so a second run takes the embedding of the scenes alone.
    """
    labels, names = things.strings("label"), things.strings("image")
    clean = sorted(min(names[labels == label]) for label in set(labels))[:most]
    queries = [decode(things.source(int(np.flatnonzero(names == name)[0]))) for name in clean]
    asked = [_shown(image, embed) for image in queries]
    rows = (
        np.random.default_rng(0).permutation(len(photographs))[: most + NUM_CANDIDATES - len(asked)].tolist()
    )
    grounds = [decode(photographs.source(row)).resize(SIDES) for row in rows]
    starts = range(0, most + 1 - len(asked), len(asked))
    others = [_shown(image, embed) for image in grounds[most:]]
    table = Table(
        "share of the area", "first search", INDEXED, *(look.name for look in looks), "all together"
    )
    curves: dict[str, list[float]] = {}
    parts: dict[str, np.ndarray] = {}
    for share in SHARES:
        rng = np.random.default_rng(round(1000 * share))
        found: dict[str, list[bool]] = {}
        for start in starts:
            scenes = [scene(*pair, share, rng) for pair in zip(queries, grounds[start:most], strict=False)]
            gallery = [_shown(one, embed) for one in scenes] + others
            parts |= {one.key: _parts(one.image(), embed) for one in gallery if one.key not in parts}
            for name, scores in _scores(asked, gallery, looks, parts).items():
                found.setdefault(name, []).extend(scores.argmax(axis=1) == np.arange(len(asked)))
        cells = []
        for name, right in found.items():
            curves.setdefault(name, []).append(100 * float(np.mean(right)))
            change = paired_difference(
                np.array(right, float), np.array(found["first search"], float), np.zeros(len(right), int)
            )
            told = f" ({100 * change.low:+.0f} to {100 * change.high:+.0f})" * (name != "first search")
            cells.append(f"{100 * np.mean(right):.0f}{told}")
        table.add_row(f"{share:.0%}", *cells)
    table.caption = (
        f"R@1 %; {len(asked)} things, {len(starts)} scenes of each, among {len(asked) - 1} scenes of other "
        f"things and {len(others)} other photographs"
    )
    if curve is not None:
        figure, axes = new_axes(5.2, 3.2)
        for name, values in curves.items():
            axes.plot([100 * share for share in SHARES], values, marker="o", label=name)
        axes.set(xlabel="share of the area (%)", ylabel="R@1 (%)", ylim=(0, 100))
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(curve)
    return table


def _parts(image: Image.Image, embed: Any) -> np.ndarray:
    """Vectors of the parts that an index keeps with ``--regions proposals``, and that of the whole."""
    return np.asarray(embed([image, *cut_out(image, standing_out(image))]))


def _scores(
    asked: Sequence[Shown], gallery: Sequence[Shown], looks: Sequence[Any], parts: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores of a gallery's images per query: the first search's, with regions, each look's, all looks'."""
    cosines = np.array([[one.vector @ query.vector for one in gallery] for query in asked])
    best = [(parts[one.key] @ np.stack([query.vector for query in asked]).T).max(axis=0) for one in gallery]
    sums = {"first search": cosines, INDEXED: np.maximum(cosines, np.stack(best, axis=1))}
    sums |= {name: cosines.copy() for name in (*(look.name for look in looks), "all")}
    for number, query in enumerate(asked):
        order = np.argsort(-cosines[number])[:NUM_CANDIDATES]
        for look in looks:
            evidence = second_look(look, query, [gallery[place] for place in order], Kept.of_user())
            numbers = np.array([one.numbers for one in evidence if one])
            added = Trust.untaught(look.weights).added(numbers, [""] * len(order))
            sums[look.name][number, order] += added
            sums["all"][number, order] += added
    return sums


def _shown(image: Image.Image, embed: Any) -> Shown:
    key = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
    return Shown(key, functools.partial(_same, image), embed([image])[0])


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
