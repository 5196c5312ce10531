"""Small real material for the tests: images of things seen several times, and features made from them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import rich.console
import skimage.data
from PIL import Image

from samething.catalog import Catalog
from samething.features import FeatureSet
from samething.features.store import FORMAT_VERSION, JOB_NAME, KIND
from samething.files import Manifest, write_json, write_manifest
from samething.images import Preprocessing


def photographs() -> list[Image.Image]:
    """A few photographs that scikit-image ships inside its package."""
    names = ("astronaut", "chelsea", "coffee", "rocket", "camera", "brick")
    folder = Path(skimage.data.__file__).parent
    files = [next(folder.glob(f"{name}.*")) for name in names]
    return [Image.open(file).convert("RGB") for file in files if file.suffix in (".png", ".jpg")]


def write_things(root: Path, *, num_things: int = 8, num_views: int = 4, side: int = 96) -> Path:
    """A folder with one sub-folder per thing: crops of photographs under several shifts and lights."""
    rng = np.random.default_rng(0)
    images = photographs()
    for thing in range(num_things):
        photograph = images[thing % len(images)]
        left = int(rng.integers(0, photograph.width - 140))
        top = int(rng.integers(0, photograph.height - 140))
        folder = root / f"thing {thing:02d} é"
        folder.mkdir(parents=True, exist_ok=True)
        for view in range(num_views):
            dx, dy = rng.integers(-8, 9, 2)
            crop = photograph.crop((left + 20 + dx, top + 20 + dy, left + 120 + dx, top + 120 + dy))
            light = np.asarray(crop, float) * rng.uniform(0.7, 1.2)
            image = Image.fromarray(light.clip(0, 255).astype(np.uint8)).resize((side, side))
            image.save(folder / f"view {view}.jpg")
    return root


def feature_folder(
    folder: Path,
    *,
    num_classes: int = 24,
    per_class: int = 6,
    width: int = 48,
    noise: float = 0.3,
    num_domains: int = 2,
    seed: int = 0,
) -> FeatureSet:
    """A finished folder of synthetic clusters: half the classes train, a quarter val, the rest test."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, width))
    # directions that say nothing of the class, so that there is something to learn
    nuisance = rng.normal(size=(num_classes * per_class, 6)) @ rng.normal(size=(6, width))
    labels = np.repeat(np.arange(num_classes), per_class)
    rows = centres[labels] + noise * rng.normal(size=(len(labels), width)) + nuisance
    roles = np.where(
        labels < num_classes // 2, "train", np.where(labels < num_classes * 3 // 4, "val", "query+index")
    )
    catalog = Catalog.from_rows(
        [
            {"image": f"{row}.jpg", "label": f"c{label}", "domain": f"d{label % num_domains}", "role": role}
            for row, (label, role) in enumerate(zip(labels, roles, strict=True))
        ],
        root=folder,
    )
    preprocessing = Preprocessing(size=32)
    backbone = {"name": "synthetic", "weights": "0", "width": width, "preprocessing": preprocessing.to_json()}
    job = {"backbone": backbone, "dtype": "float16"}
    data = folder / f"data-{catalog.fingerprint}"
    data.mkdir(parents=True)
    write_json(folder / JOB_NAME, job)
    np.save(data / "features.npy", rows.astype(np.float16))
    catalog.write(data / "catalog.parquet")
    (data / "unreadable.csv").write_text("image,reason\n")
    content = {"data": data.name, "num_rows": len(rows), "num_unreadable": 0}
    made = {**job, "catalog": catalog.fingerprint}
    write_manifest(
        folder, Manifest(kind=KIND, format_version=FORMAT_VERSION, made_from=made, content=content)
    )
    return FeatureSet.open(folder)


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = np.maximum(sides, 0).prod()
    areas = [np.subtract(box[2:], box[:2]).prod() for box in (one, other)]
    return float(shared / (sum(areas) - shared))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def printed(thing: object, width: int = 200) -> str:
    """What a terminal of so many columns shows of a result."""
    console = rich.console.Console(width=width, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()
