"""What computes: candidates agree with torch or are not used, what was asked for is had or refused."""

import itertools
import json
import types

import numpy as np
import pytest
import torch

import samething.backbones.runtimes as runtimes
from samething.backbones import Backbone, load_backbone
from samething.backbones.graphs import graph, graph_path
from samething.backbones.runtimes import Trials, choose_runtime, reason_against
from samething.errors import InputError
from samething.images import prepare
from samething.sessions import PARITY_COSINE, fastest, open_session, parity_cosine
from scenes import photographs
from test_backbones import TINY, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A graph cache of these tests' own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    checkpoint = tmp_path_factory.mktemp("weights") / "tiny.pth"
    save_tiny(checkpoint)
    return load_backbone(f"timm:{TINY}", weights=checkpoint)


@pytest.fixture(scope="module")
def sample(backbone) -> torch.Tensor:
    return torch.from_numpy(np.stack([prepare(image, backbone.preprocessing) for image in photographs()]))


@pytest.mark.parametrize("name", ["torch", "onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_runtimes_in_float32_agree_at_any_batch(cache, backbone, sample, name):
    chosen = choose_runtime(backbone, sample, runtime=name, device="cpu")
    assert (chosen.name, chosen.device) == (name, "cpu")
    with torch.inference_mode():
        expected = backbone(sample).numpy()
    for batch in (1, 3, len(sample)):
        found = chosen.extract(sample[:batch])
        assert found.dtype == np.float32
        assert np.abs(found - expected[:batch]).max() < 1e-3 * np.abs(expected).max()
    kept = chosen.extract(sample[:1])
    chosen.extract(sample[1:2])  # a result is the caller's own: the next call does not change it
    assert np.abs(kept - expected[:1]).max() < 1e-3 * np.abs(expected).max()
    json.dumps(chosen.record)
    assert chosen.record["cosines"][name] >= PARITY_COSINE


def test_threads_of_onnxruntime_each_compute_a_part_of_a_batch(cache, backbone, sample, monkeypatch):
    """Together on every image they waited for each other, which took a fifth more."""
    one = runtimes.with_graph(backbone, "cpu")
    sizes: list[int] = []

    def opened(*given, num_threads):
        assert num_threads == 1
        session = open_session(*given, num_threads=num_threads)

        def run(names, given):
            sizes.append(len(given["pixels"]))
            return session.run(names, given)

        return types.SimpleNamespace(run=run)

    monkeypatch.setattr(runtimes, "open_session", opened)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    extract = runtimes.with_graph(backbone, "cpu")
    for batch, parts in ((5, [1, 2, 2]), (2, [1, 1]), (1, [1])):
        found = extract(sample[:batch])
        assert sorted(sizes) == parts
        sizes.clear()
        ends = np.cumsum([0, *sorted(parts, reverse=True)])
        expected = [one(sample[start:end]) for start, end in itertools.pairwise(ends)]
        assert (found == np.concatenate(expected)).all()


def test_the_fastest_of_those_that_agree_is_taken():
    rates = {"torch": 10.0, "torch-bfloat16": 30.0, "openvino": 20.0, "openvino-bfloat16": 40.0}
    cosines = {"torch": 1.0, "torch-bfloat16": 0.99, "openvino": 1.0, "openvino-bfloat16": 0.9999}
    assert fastest(rates, cosines) == "openvino-bfloat16"
    assert fastest(rates, {**cosines, "openvino-bfloat16": PARITY_COSINE - 1e-6}) == "openvino"
    assert fastest({"torch": 1.0}, cosines) == "torch"


def test_a_runtime_in_float32_is_not_tried_when_another_is_far_ahead_of_float32():
    rates = {"torch": 10.0, "openvino": 20.0, "openvino-bfloat16": 40.0}
    against = {
        best: reason_against("onnxruntime", rates, best, num_images=None, export_s=1.0)
        for best in (29.0, 31.0)
    }
    assert not against[29.0] and "float32" in against[31.0]
    assert not reason_against("onnxruntime", {"torch": 10.0}, 10.0, num_images=None, export_s=1.0)


def test_an_export_has_to_pay():
    for name in ("openvino", "openvino-bfloat16", "onnxruntime"):
        few = reason_against(name, {"torch": 100.0}, 100.0, num_images=200, export_s=6.0)
        assert "export" in few
        assert not reason_against(name, {"torch": 100.0}, 100.0, num_images=1_000_000, export_s=6.0)
        assert not reason_against(name, {"torch": 100.0}, 100.0, num_images=None, export_s=6.0)


def test_auto_measures_what_may_pay_and_keeps_what_it_chose(cache, backbone, sample, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "nothing kept"))
    chosen = choose_runtime(backbone, sample, device="cpu", num_images=2)
    assert {"openvino", "openvino-bfloat16", "onnxruntime"} <= {*chosen.record["left_out"]}
    assert "export" in chosen.record["left_out"]["openvino"]
    assert chosen.record["name"] == chosen.name
    assert chosen.name == fastest(chosen.record["images_per_s"], chosen.record["cosines"])
    again = choose_runtime(backbone, sample, device="cpu", runtime=chosen.name)
    assert again.name == chosen.name


def unfaithful(extract):
    return lambda pixels: extract(255 - pixels)


def test_a_runtime_that_disagrees_is_not_used(cache, backbone, sample, monkeypatch):
    faithful = runtimes.with_graph
    monkeypatch.setattr(runtimes, "with_graph", lambda own, device: unfaithful(faithful(own, device)))
    trials = Trials(backbone, sample, "cpu")
    trials.attempt("onnxruntime")
    assert "onnxruntime" not in trials.candidates
    assert "cosine" in trials.left_out["onnxruntime"]
    with pytest.raises(InputError, match="onnxruntime have a cosine"):
        choose_runtime(backbone, sample, runtime="onnxruntime", device="cpu")


def test_a_runtime_that_cannot_be_had_is_an_error(cache, backbone, sample, monkeypatch):
    def broken(own, device):
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(runtimes, "with_graph", broken)
    with pytest.raises(InputError, match="no such operation") as caught:
        choose_runtime(backbone, sample, runtime="openvino", device="cpu")
    assert "auto" in caught.value.next_step
    trials = Trials(backbone, sample, "cpu")
    trials.attempt("openvino")  # auto goes on without it
    assert "no such operation" in trials.left_out["openvino"]
    with pytest.raises(InputError, match="runtime='fastest'"):
        choose_runtime(backbone, sample, runtime="fastest", device="cpu")


def test_features_that_are_not_finite_never_agree():
    good = np.ones((2, 3), np.float32)
    assert parity_cosine(good, good) == pytest.approx(1)
    assert parity_cosine(np.array([[1, 1, 1], [np.nan, 1, 1]], np.float32), good) == 0
    assert parity_cosine(good[:1], good) == 0  # another number of rows
    assert parity_cosine(np.zeros((2, 3), np.float32), good) == 0


def test_graphs_are_written_once_and_kept_apart(cache, backbone, monkeypatch):
    with graph(backbone) as path:
        content = path.read_bytes()
    kept = graph_path(backbone)
    assert kept.is_relative_to(cache)
    assert kept.read_bytes() == content
    monkeypatch.setattr("samething.backbones.graphs.write_onnx", lambda *_, **__: 1 / 0)
    with graph(backbone) as again:  # from the cache, as the writer is broken
        assert again == kept
    other = Backbone(
        backbone.network, name="other", width=backbone.width, preprocessing=backbone.preprocessing
    )
    assert graph_path(other) != kept
    assert not list(kept.parent.parent.glob(".partial-*"))


def write_bytes(_, target, **__):
    target.write_bytes(bytes(100))
    return target


def test_the_cache_forgets_the_oldest(tmp_path, monkeypatch, backbone):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("samething.backbones.graphs.write_onnx", write_bytes)
    monkeypatch.setattr("samething.backbones.graphs.MAX_CACHE_BYTES", 250)
    names = [f"number {number}" for number in range(4)]
    made = []
    for name in names:
        one = Backbone(
            backbone.network, name=name, width=backbone.width, preprocessing=backbone.preprocessing
        )
        with graph(one):
            made.append(graph_path(one))
    assert made[-1].is_file()
    assert sum(path.is_file() for path in made) == 2


def test_a_cache_that_cannot_be_written_costs_no_job(tmp_path, monkeypatch, backbone, sample):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("samething.backbones.graphs.write_onnx", write_bytes)
    with graph(backbone) as path:
        assert path.read_bytes() == bytes(100)


@pytest.mark.slow
def test_what_is_chosen_for_the_demos_backbone(cache):
    """The real measurement: whatever is taken agrees on other images than it was measured on."""
    lite = load_backbone("efficientnet_lite0")
    pixels = torch.from_numpy(np.stack([prepare(image, lite.preprocessing) for image in photographs()]))
    chosen = choose_runtime(lite, pixels[:4], device="cpu")
    with torch.inference_mode():
        assert parity_cosine(chosen.extract(pixels[4:]), lite(pixels[4:]).numpy()) >= 0.9995
