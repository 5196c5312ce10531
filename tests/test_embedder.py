"""The exported model without torch: every way to give an image, bad images, damaged folders."""

import functools
import http.server
import io
import json
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from line import run_python
from samething.embedder import Embedder
from samething.errors import ArtefactError, ImageError, InputError, MissingExtraError
from samething.files import file_sha256, read_json, write_json
from samething.images import Source
from scenes import photographs


@pytest.fixture(scope="module")
def embedder(line):
    return Embedder.load(line / "model", num_threads=1)


@pytest.fixture
def model(line, tmp_path):
    """A copy of the model folder that a test may damage; the graph is shared until it is replaced."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (line / "model").iterdir():
        if path.is_file():
            (folder / path.name).hardlink_to(path)
    return folder


def test_vectors_have_unit_length_and_the_promised_shape(embedder):
    vectors = embedder.embed(photographs())
    assert vectors.dtype == np.float32 and vectors.shape == (len(photographs()), embedder.dim) == (6, 512)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert embedder.embed([]).shape == (0, 512)
    assert list(embedder.embed_stream([])) == []


def test_paths_bytes_images_and_arrays_are_the_same_image(embedder, tmp_path):
    image = photographs()[0]
    path = tmp_path / "späce é.png"
    image.save(path)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    ways = [path, str(path), buffer.getvalue(), image, np.asarray(image)]
    vectors = embedder.embed(ways)
    np.testing.assert_allclose(vectors, np.repeat(vectors[:1], len(ways), axis=0), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 6, 100])
def test_the_batch_size_does_not_matter(embedder, batch_size):
    expected = np.concatenate([embedder.embed([image]) for image in photographs()])
    np.testing.assert_allclose(
        embedder.embed(photographs(), batch_size=batch_size), expected, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_one_bad_image_costs_only_itself(embedder, batch_size):
    good = photographs()
    mixed = [good[0], b"no image", good[1], b"", good[2]]
    with pytest.raises(ImageError):
        embedder.embed(mixed, batch_size=batch_size)
    batches = list(embedder.embed_stream(iter(mixed), batch_size=batch_size))
    positions = [position for batch in batches for position in batch.positions]
    unreadable = {position: error for batch in batches for position, error in batch.unreadable.items()}
    assert positions == [0, 2, 4] and set(unreadable) == {1, 3}
    assert all(isinstance(error, ImageError) and error.given for error in unreadable.values())
    np.testing.assert_allclose(
        np.concatenate([batch.vectors for batch in batches]), embedder.embed(good[:3]), atol=1e-5
    )


def test_a_batch_size_below_one_is_refused(embedder):
    """Nothing embedded, and nothing said, would be the worst answer."""
    with pytest.raises(InputError, match="batch_size=0"):
        embedder.embed(photographs()[:1], batch_size=0)


def test_a_stream_reads_two_batches_ahead_at_most(embedder):
    taken = []

    def images():
        for image in photographs():
            taken.append(image)
            yield image

    stream = embedder.embed_stream(images(), batch_size=1)
    next(stream)
    assert len(taken) <= 2
    stream.close()


# ---- damaged folders


def replace(path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def test_a_missing_folder_and_a_folder_of_another_kind(line, tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        Embedder.load(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match="is a run folder"):
        Embedder.load(line / "run")
    with pytest.raises(ArtefactError, match="not a finished model"):
        Embedder.load(tmp_path)


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_a_missing_file(model, name):
    (model / name).unlink()
    with pytest.raises(ArtefactError, match=name) as error:
        Embedder.load(model)
    assert error.value.next_step


def test_a_graph_that_is_cut_short(model):
    content = (model / "model.onnx").read_bytes()
    replace(model / "model.onnx", content[: len(content) // 2])
    with pytest.raises(ArtefactError, match=r"model\.onnx is cut short: .* of .* bytes"):
        Embedder.load(model)


def test_a_graph_with_other_weights(model):
    """One flipped byte among the weights still loads and still answers, wrongly."""
    content = bytearray((model / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 0x40
    replace(model / "model.onnx", bytes(content))
    with pytest.raises(ArtefactError, match=r"model\.onnx.*(changed|differs|damaged)"):
        Embedder.load(model)


def test_a_configuration_that_was_changed(model):
    config = read_json(model / "config.json")
    config["backbone"]["preprocessing"]["size"] = (
        224 if config["backbone"]["preprocessing"]["size"] != 224 else 256
    )
    replace(model / "config.json", json.dumps(config).encode())
    with pytest.raises(ArtefactError, match=r"config\.json"):
        Embedder.load(model)


def test_a_newer_format_and_a_changed_manifest(model):
    stored = read_json(model / "manifest.json")
    (model / "manifest.json").unlink()
    write_json(model / "manifest.json", {**stored, "format_version": 3})
    with pytest.raises(ArtefactError, match="format version 3") as error:
        Embedder.load(model)
    assert "upgrade" in error.value.next_step
    write_json(model / "manifest.json", {**stored, "fingerprint": "0" * 16})
    with pytest.raises(ArtefactError, match="was changed"):
        Embedder.load(model)


def test_a_folder_that_was_copied_and_renamed_is_the_same_model(line, tmp_path, embedder):
    folder = shutil.copytree(line / "model", tmp_path / "another name é")
    copied = Embedder.load(folder)
    assert (copied.fingerprint, copied.name) == (embedder.fingerprint, "model")
    assert copied.manifest.content["sha256"]["model.onnx"] == file_sha256(folder / "model.onnx")


# ---- without torch

WITHOUT_TORCH = """
import sys
for name in ("torch", "timm", "onnx", "onnxscript", "open_clip", "safetensors", "matplotlib", "jaxtyping"):
    sys.modules[name] = None
from pathlib import Path
from samething.embedder import Embedder
from samething.search import find, index
folder, output = map(Path, sys.argv[1:])
print(Embedder.load(folder / "model").embed([folder / "some-image.jpg"]).shape)
print(find(folder / "some-image.jpg", index=folder / "index", k=1).matches[0].label)
made = index(folder / "my-images", model=folder / "model", output=output)
print(made.num_added, made.find(folder / "some-image.jpg", k=1).matches[0].label)
"""


def test_embedding_and_searching_need_no_torch(line, tmp_path):
    done = run_python("-c", WITHOUT_TORCH, line, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 512)", "thing 03 é", "48 thing 03 é"]


def test_an_image_object_is_not_changed(embedder):
    image = Image.new("RGBA", (40, 30), (10, 200, 30, 128))
    before = image.tobytes()
    embedder.embed([image])
    assert image.mode == "RGBA" and image.tobytes() == before


# ---- from the web and from the hub


@pytest.fixture
def web(tmp_path):
    """A folder behind a local address."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_images_by_their_address(embedder, web):
    folder, address = web
    photographs()[0].save(folder / "a.png")
    (folder / "b.png").write_bytes(b"<html>not an image</html>")
    expected = embedder.embed(photographs()[:1])
    np.testing.assert_allclose(embedder.embed([f"{address}/a.png"]), expected, atol=1e-5)
    given = [f"{address}/missing.png", f"{address}/a.png", f"{address}/b.png", "http://127.0.0.1:1/a.png"]
    (batch,) = embedder.embed_stream(given)
    assert batch.positions == [1] and set(batch.unreadable) == {0, 2, 3}
    assert batch.unreadable[0].given == f"{address}/missing.png: does not exist"
    assert batch.unreadable[0].reason == "does not exist"
    with pytest.raises(ImageError, match="11 bytes"):
        Source(f"{address}/a.png").read(max_bytes=10)
    with pytest.raises(ImageError, match="No such file"):
        embedder.embed(["ftp//nowhere"])


def hub_cache(cache, name, source):
    """A model in the layout of the hub library's cache, as a download leaves it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith("."):
            (snapshot / path.name).hardlink_to(path)


def test_a_model_of_the_hub_out_of_the_cache(line, tmp_path, monkeypatch, embedder):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub_cache(tmp_path, "someone/finder", line / "model")
    loaded = Embedder.load("someone/finder")
    assert loaded.fingerprint == embedder.fingerprint
    np.testing.assert_array_equal(loaded.embed(photographs()[:1]), embedder.embed(photographs()[:1]))
    with pytest.raises(ArtefactError, match="someone/else is no folder here") as error:
        Embedder.load("someone/else")
    assert "spelling" in error.value.next_step


def test_a_hub_id_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match="huggingface_hub"):
        Embedder.load("someone/finder")
