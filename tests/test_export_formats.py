"""Every format loaded by what it is for: torch elsewhere, sentence-transformers, the hub's library."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from line import run_python
from samething.embedder import Embedder
from samething.errors import ArtefactError, InputError
from samething.export import export
from samething.export.guiec import PreparedInside, in_fresh_process
from samething.files import read_json
from samething.images import Preprocessing, decode, prepare
from scenes import photographs


def written(folder, name, **options):
    return export(folder / "run", output=folder / name, weights=folder / "w.safetensors", **options)


# The host's own calls, without this package: the image's bytes as they are, one at a time.
HOST = """
import sys, zipfile, tempfile, numpy as np, torch
from PIL import Image
for name in ("samething", "timm", "torchvision"):
    sys.modules[name] = None
archive, target, *images = sys.argv[1:]
with tempfile.TemporaryDirectory() as folder:
    zipfile.ZipFile(archive).extractall(folder)
    model = torch.jit.load(folder + "/saved_model.pt").eval()
rows = []
for image in images:
    pixels = torch.from_numpy(np.asarray(Image.open(image).convert("RGB")).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        rows.append(torch.flatten(model(pixels)[0]).numpy())
np.save(target, rows)
"""


@pytest.mark.slow
def test_the_challenges_submission(tiny, tiny_vectors, tmp_path):
    written(tiny, "guiec", format="guiec")
    archive = tiny / "guiec" / "submission.zip"
    assert zipfile.ZipFile(archive).namelist() == ["saved_model.pt"]
    paths = []
    for number, image in enumerate(photographs()):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    Image.new("RGB", (700, 3), "red").save(tmp_path / "strip.png")
    images = [*paths, tmp_path / "dot.png", tmp_path / "strip.png"]
    done = run_python("-c", HOST, archive, tmp_path / "rows.npy", *images)
    assert done.returncode == 0, done.stderr
    rows = np.load(tmp_path / "rows.npy")
    assert rows.shape == (8, 16) and np.isfinite(rows).all()
    assert (rows[:6] * tiny_vectors).sum(axis=1).min() > 0.995
    with pytest.raises(ArtefactError, match="guiec, which has no"):
        Embedder.load(tiny / "guiec")


def test_the_challenge_takes_64_numbers_at_most(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("samething.export.guiec.LARGEST_DIM", 15)
    with pytest.raises(InputError, match="16 numbers for --format guiec") as error:
        written(tiny, "too long", format="guiec")
    assert "--embedding-dim" in error.value.next_step
    assert not (tiny / "too long" / "manifest.json").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("resize", ["short_side_crop", "squash", "longer_side_pad"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_in_torch_is_that_of_pillow(resize, interpolation):
    preprocessing = Preprocessing(
        size=40, resize=resize, interpolation=interpolation, crop_fraction=0.875, mean=(0.2, 0.5, 0.9)
    )

    class Through(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float()

    scripted = torch.jit.script(PreparedInside(Through(), preprocessing).eval())
    for image in (photographs()[1], photographs()[2].resize((37, 91)), Image.new("RGB", (1, 5), "blue")):
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None]
        found = scripted(pixels)[0].numpy()
        expected = prepare(decode(image), preprocessing).astype(float)
        assert found.shape == expected.shape
        # Pillow rounds and cuts to 0 … 255 between its two passes, which shows at hard edges
        assert np.abs(found - expected).max() <= 8 and np.abs(found - expected).mean() < 0.5


def test_what_fails_in_a_fresh_process_is_said(tmp_path):
    with pytest.raises(ArtefactError, match=r"does not run in a fresh process.*broken"):
        in_fresh_process("raise SystemExit('broken')", tmp_path / "p", [np.zeros((1, 3, 2, 2), np.uint8)])


SENTENCES = """
import sys, numpy as np
sys.modules["samething"] = None
from PIL import Image
from sentence_transformers import SentenceTransformer
folder, target, *images = sys.argv[1:]
np.save(target, SentenceTransformer(folder).encode([Image.open(path).convert("RGB") for path in images]))
"""


@pytest.mark.slow
def test_sentence_transformers_encodes_to_the_same_vectors(tiny, tiny_vectors, tmp_path):
    written(tiny, "sentences", format="sentence-transformers")
    paths = []
    for number, image in enumerate(photographs()):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    done = run_python("-c", SENTENCES, tiny / "sentences", tmp_path / "rows.npy", *paths)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "rows.npy"), tiny_vectors, atol=1e-4)
    np.testing.assert_allclose(
        Embedder.load(tiny / "sentences").embed(photographs()), tiny_vectors, atol=1e-5
    )


@pytest.mark.slow
def test_a_folder_for_the_hub(tiny, tiny_vectors):
    from huggingface_hub import ModelCard

    written(tiny, "hub", format="hub")
    card = ModelCard.load(tiny / "hub" / "README.md")
    assert card.data.pipeline_tag == "image-feature-extraction" and card.data.license
    assert "*.onnx filter=lfs" in (tiny / "hub" / ".gitattributes").read_text()
    np.testing.assert_array_equal(Embedder.load(tiny / "hub").embed(photographs()), tiny_vectors)
    listed = read_json(tiny / "hub" / "manifest.json")["content"]["sha256"]
    assert {"README.md", "config.json", "model.onnx", "model.safetensors"} == set(listed)
    assert (tiny / "hub" / ".gitignore").exists()
