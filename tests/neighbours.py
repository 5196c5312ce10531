"""Every format loaded by what it is for, in a process of its own: are its vectors and neighbours torch's?

    python tests/neighbours.py RUN MODELS [--formats …] [--every N]

exports RUN into a folder of MODELS for each format and prints a table over the catalog's test images. All
formats are given the same pixels; those that resize by themselves are then given the images as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from line import run_python
from samething.arrays import Embeddings
from samething.catalog import Catalog
from samething.evaluation import evaluate_embeddings
from samething.export import export
from samething.export.embedding_model import EmbeddingModel, Source, source_of
from samething.images import Preprocessing, decode, prepare
from samething.training.run import Run

# Each consumer is told FOLDER and gives vectors of a list of uint8 images (height, width, 3).
_PREPARED = "np.stack([cropped(image) for image in images])"
CONSUMERS = {
    "onnxruntime": f"""
import onnxruntime
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx", providers=["CPUExecutionProvider"])
embed = lambda images: session.run(None, {{"pixels": {_PREPARED}}})[0]
""",
    "guiec": """
import tempfile, torch, warnings, zipfile
warnings.simplefilter("ignore")
with tempfile.TemporaryDirectory() as unpacked:
    zipfile.ZipFile(f"{folder}/submission.zip").extractall(unpacked)
    model = torch.jit.load(f"{unpacked}/saved_model.pt").eval()
def one(image):
    with torch.no_grad():
        return torch.flatten(model(torch.from_numpy(image.transpose(2, 0, 1).copy())[None])[0]).numpy()
embed = lambda images: np.stack([one(image) for image in images])
""",
    "sentence-transformers": """
from PIL import Image
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder)
embed = lambda images: model.encode([Image.fromarray(each) for each in images], show_progress_bar=False)
""",
}
RESIZES_ITSELF = ("guiec", "sentence-transformers")

_PROGRAM = """
import json, sys
sys.modules["samething"] = None
import numpy as np
from PIL import Image
folder, given, margin, target = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
def cropped(image):
    height, width = image.shape[:2]
    return image[margin : height - margin, margin : width - margin].transpose(2, 0, 1)
{consumer}
if given.endswith(".npy"):
    squares = np.load(given, mmap_mode="r")
    taken = lambda start: list(squares[start : start + 32])
    number = len(squares)
else:
    paths = json.load(open(given))
    taken = lambda start: [np.asarray(Image.open(path).convert("RGB")) for path in paths[start : start + 32]]
    number = len(paths)
np.save(target, np.concatenate([embed(taken(start)) for start in range(0, number, 32)]))
"""


def consumed(form: str, folder: Path, given: Path, *, margin: int = 0) -> Embeddings:
    """Vectors by a format's consumer, in a process that knows nothing of this package.

    Args:
        form: a key of :data:`CONSUMERS`.
        folder: the exported model.
        given: images of one size, (n, height, width, 3) in a .npy file, or paths in a .json file.
        margin: pixels that prepared squares are smaller by on every side.
    """
    with tempfile.TemporaryDirectory() as out:
        target = Path(out) / "vectors.npy"
        program = _PROGRAM.replace("{consumer}", CONSUMERS[form])
        done = run_python("-c", program, folder, given, margin, target, timeout_s=1800)
        assert done.returncode == 0, f"{form}: {done.stderr}"
        vectors: Embeddings = np.load(target)
    return vectors


def squares_of(catalog: Catalog, preprocessing: Preprocessing) -> tuple[np.ndarray, int]:
    """Images that every preprocessing leaves as they are but for its centre crop, and the crop's margin.

    They are as large as the shorter side before the crop, so that resizing changes nothing.
    """
    side = int(preprocessing.size / preprocessing.crop_fraction)
    before_crop = dataclasses.replace(preprocessing, size=side, crop_fraction=1.0)
    squares = np.empty((len(catalog), side, side, 3), np.uint8)
    for row, source in enumerate(catalog.sources):
        squares[row] = prepare(decode(source), before_crop).transpose(1, 2, 0)
    return squares, (side - preprocessing.size) // 2


@torch.inference_mode()
def by_torch(model: EmbeddingModel, squares: np.ndarray, margin: int) -> Embeddings:
    """Vectors of the centres of squares by the network itself."""
    inner = slice(margin, squares.shape[1] - margin)
    parts = [
        model(torch.from_numpy(squares[start : start + 32, inner, inner].transpose(0, 3, 1, 2).copy()))
        for start in range(0, len(squares), 32)
    ]
    return torch.cat(parts).numpy()


def nearest(vectors: Embeddings, catalog: Catalog, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Catalog rows of each query's nearest images of the index, best first, and all their scores.

    An image that is query and index does not find itself.
    """
    queries = np.flatnonzero(catalog.has_role("query", "query+index"))
    index = np.flatnonzero(catalog.has_role("index", "query+index"))
    scores = vectors[queries].astype(np.float64) @ vectors[index].astype(np.float64).T
    scores[queries[:, None] == index[None]] = -np.inf
    return index[np.argsort(-scores, axis=1, kind="stable")[:, :k]], scores


def images_tested(source: Source) -> Catalog:
    """The test images of an export's run."""
    catalog = source.features.catalog
    return catalog.take(catalog.has_role("query", "index", "query+index"))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run", type=Path)
    arguments.add_argument("models", type=Path)
    arguments.add_argument("--formats", nargs="*", default=list(CONSUMERS))
    arguments.add_argument("--every", type=int, default=1, help="take every so-manieth test image")
    given = arguments.parse_args()
    source = source_of(Run.open(given.run), weights=None)
    catalog = images_tested(source)
    catalog = catalog.take(np.arange(len(catalog)) % given.every == 0)
    squares, margin = squares_of(catalog, source.backbone.preprocessing)
    given.models.mkdir(parents=True, exist_ok=True)
    images = given.models / "squares.npy"
    np.save(images, squares)
    expected = by_torch(source.model, squares, margin)
    print("| format | images | largest difference | same top-5, % | overlap, % | mMP@5 % |")
    print("| --- | --- | --- | --- | --- | --- |")
    show("torch", "same", expected, expected, catalog)
    paths = given.models / "paths.json"
    paths.write_text(json.dumps([str(path) for path in catalog.paths]))
    for form in given.formats:
        folder = given.models / form
        export(given.run, output=folder, format="folder" if form == "onnxruntime" else form)
        show(form, "same", consumed(form, folder, images, margin=margin), expected, catalog)
        if form in RESIZES_ITSELF:
            show(form, "as they are", consumed(form, folder, paths), expected, catalog)
    images.unlink()


def show(form: str, given: str, found: Embeddings, expected: Embeddings, catalog: Catalog) -> None:
    """A line of the table."""
    theirs, ours = nearest(expected, catalog)[0], nearest(found, catalog)[0]
    same = (theirs == ours).all(axis=1).mean()
    overlap = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(theirs, ours, strict=True)])
    score = evaluate_embeddings(found, catalog).value("mmp@5")
    difference = np.abs(found - expected).max()
    print(
        f"| {form} | {given} | {difference:.0e} | {100 * same:.1f} | {100 * overlap:.1f} "
        f"| {100 * score:.1f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
