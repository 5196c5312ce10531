"""``make test-torch-free``: an environment without torch searches images and gives torch's vectors.

python tests/torch_free.py make FOLDER     with everything installed: images, model, index, torch's vectors
python tests/torch_free.py check FOLDER    in an environment made by ``pip install .`` alone
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np

HEAVY = (
    "torch", "torchvision", "timm", "onnx", "safetensors", "open_clip", "matplotlib", "transformers",
    "fastapi", "uvicorn",
)  # fmt: skip


def make(folder: Path) -> None:
    import torch

    from line import make_line
    from samething.backbones import load_backbone
    from samething.export.embedding_model import EmbeddingModel
    from samething.images import decode, prepare
    from samething.training.run import Run

    make_line(folder)
    run = Run.open(folder / "run")
    features = run.features()
    backbone = load_backbone("efficientnet_lite0").with_preprocessing(features.preprocessing)
    model = EmbeddingModel(backbone, run.head).eval()
    paths = sorted((folder / "my-images").rglob("*.jpg"))
    pixels = np.stack([prepare(decode(path), features.preprocessing) for path in paths])
    with torch.inference_mode():
        np.save(folder / "torch.npy", model(torch.from_numpy(pixels)).numpy())


def check(folder: Path) -> None:
    found = [name for name in HEAVY if importlib.util.find_spec(name)]
    assert not found, f"this environment has {', '.join(found)}"
    from samething.embedder import Embedder
    from samething.search import find, index

    expected = np.load(folder / "torch.npy")
    paths = sorted((folder / "my-images").rglob("*.jpg"))
    vectors = Embedder.load(folder / "model").embed(paths)
    difference = float(np.abs(vectors - expected).max())
    assert difference <= 1e-4, difference
    made = index(folder / "my-images", model=folder / "model", output=folder / "index without torch")
    assert made.num_added == len(paths)
    for path in paths[::7]:
        found_labels = find(path, index=folder / "index without torch", k=1).matches
        assert found_labels[0].label == path.parent.name, path
    print(f"{len(paths)} images embedded, indexed and found without torch, equal within {difference:.0e}")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
