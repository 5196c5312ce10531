"""ONNX graphs in transformers.js' and optimum's layout, from a hub on this machine, without torch."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fake_hub import fake_hub
from line import run_python
from samething.embedder import Embedder
from samething.errors import ArtefactError
from samething.images import Preprocessing, decode, prepare
from scenes import write_things

SIDE = 32
SETTINGS = {
    "image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}, "resample": 3,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_normalize": True,
}  # fmt: skip
WEIGHT = np.random.default_rng(0).normal(size=(48, 16)).astype(np.float32)


def encoder(output: str, *, tokens: bool = False, texts: bool = False) -> bytes:
    """A graph as those repositories have: normalised pixels to the means of 4 × 4 places, mixed."""
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["m" if tokens else output]),
    ]
    weights = [helper.make_tensor("w", TensorProto.FLOAT, WEIGHT.shape, WEIGHT.ravel())]
    if tokens:  # the class token first, then another
        weights.append(helper.make_tensor("axes", TensorProto.INT64, [1], [1]))
        nodes += [
            helper.make_node("Unsqueeze", ["m", "axes"], ["c"]),
            helper.make_node("Neg", ["c"], ["n"]),
            helper.make_node("Concat", ["c", "n"], [output], axis=1),
        ]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["b", 3, SIDE, SIDE])]
    if texts:
        inputs.append(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["b", 4]))
    shape = ["b", 2, 16] if tokens else ["b", 16]
    found = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "encoder", inputs, [found], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def expected_of(paths) -> np.ndarray:
    """A second writing: prepared as the settings say, in float64."""
    how = Preprocessing(size=SIDE, resize="squash", interpolation="bicubic")
    pixels = np.stack([prepare(decode(path), how) for path in paths]).astype(np.float64)
    mean, std = (np.array(SETTINGS[name]).reshape(3, 1, 1) for name in ("image_mean", "image_std"))
    normalised = (pixels / 255 - mean) / std
    places = normalised.reshape(len(paths), 3, 4, 8, 4, 8).mean(axis=(3, 5)).reshape(len(paths), 48)
    rows = places @ WEIGHT
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


CLIENT = """
import os, sys
address, home, images, target = sys.argv[1:]
os.environ.update(HF_ENDPOINT=address, HF_HOME=home, HF_HUB_DISABLE_XET="1", HF_TOKEN="hf_none", NO_PROXY="*")
for name in ("torch", "timm", "transformers", "onnx"):
    sys.modules[name] = None  # an import of it fails
import numpy as np
from samething.search import find, index
made = index(images, model="someone/siglip-ONNX", output=os.path.join(home, "index"))
paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(images) for name in names)
np.save(target, made.embedder.embed(paths))
print(made.embedder.name, made.embedder.dim, made.index.count())
print(find(paths[3], index=os.path.join(home, "index"), k=1).matches[0].path == paths[3])
"""


def test_a_repository_of_the_hub_is_a_model_without_torch(tmp_path):
    images = write_things(tmp_path / "photos", num_things=2)
    files = {
        "config.json": json.dumps({"model_type": "siglip"}).encode(),
        "preprocessor_config.json": json.dumps(SETTINGS).encode(),
        "onnx/vision_model.onnx": encoder("pooler_output"),
        "onnx/vision_model_fp16.onnx": b"not wanted",
        "onnx/model.onnx": b"not wanted: large, with the texts' encoder",
        "tokenizer.json": b"not wanted",
    }
    with fake_hub() as hub:
        hub.repositories["someone/siglip-ONNX"] = files
        done = run_python("-c", CLIENT, hub.address, tmp_path / "home", images, tmp_path / "vectors.npy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["someone/siglip-ONNX 16 8", "True"]
    paths = sorted(images.rglob("*.jpg"))
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected_of(paths), atol=1e-4)
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/**/*") if path.is_file()}
    assert fetched == {"config.json", "preprocessor_config.json", "vision_model.onnx"}


@pytest.fixture
def repository(tmp_path):
    """The same in a folder, with tokens as its output, in optimum's layout."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    (folder / "model.onnx").write_bytes(encoder("last_hidden_state", tokens=True))
    return folder


def test_a_folder_of_that_layout_and_its_class_token(repository, tmp_path):
    paths = sorted(write_things(tmp_path / "photos", num_things=1).rglob("*.jpg"))
    embedder = Embedder.load(repository)
    np.testing.assert_allclose(embedder.embed(paths), expected_of(paths), atol=1e-4)
    moved = shutil.copytree(repository, tmp_path / "moved")
    assert Embedder.load(moved).fingerprint == embedder.fingerprint
    (moved / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, "resample": 2}))
    assert Embedder.load(moved).fingerprint != embedder.fingerprint


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 36, "crop_size": 32, "do_center_crop": True}, ("short_side_crop", 32, 32 / 36, "bicubic")),
        ({"size": 32, "feature_extractor_type": "ViTFeatureExtractor"}, ("squash", 32, 1.0, "bilinear")),
        ({"size": {"shortest_edge": 32}, "resample": 1}, ("short_side_crop", 32, 1.0, "lanczos")),
    ],
)
def test_older_ways_to_write_the_settings(repository, settings, expected):
    (repository / "preprocessor_config.json").write_text(json.dumps(settings))
    found = Embedder.load(repository).preprocessing
    assert (found.resize, found.size, pytest.approx(found.crop_fraction), found.interpolation) == expected


def test_what_is_no_image_encoder_is_refused_with_what_it_wants(repository):
    (repository / "model.onnx").write_bytes(encoder("image_embeds", texts=True))
    with pytest.raises(ArtefactError, match="takes pixel_values, input_ids"):
        Embedder.load(repository)
    (repository / "preprocessor_config.json").write_text(json.dumps({**SETTINGS, "resample": 0}))
    with pytest.raises(ArtefactError, match=r"preprocessor_config\.json asks"):
        Embedder.load(repository)
    (repository / "model.onnx").unlink()
    with pytest.raises(ArtefactError, match="no ONNX graph"):
        Embedder.load(repository)
