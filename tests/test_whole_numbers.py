"""``--runtime int8``: judged by what it finds, made once and kept, refused where it may cost too much."""

import json
import shutil

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from samething.backbones import load_backbone
from samething.backbones.whole_numbers import LARGEST_FALL, judged, judged_rows, quantise, require_near
from samething.checksums import damages
from samething.datasets import catalog
from samething.embedder import Embedder
from samething.errors import ArtefactError, FingerprintError, InputError
from samething.export.model_folder import write_backbone
from samething.features import FeatureSet, features
from samething.features.job import Job
from samething.files import read_json
from samething.search import find, index, sync
from test_graph_repositories import SETTINGS, encoder
from tiny import write_tiny


def drawn(num_labels, of_each, *, seed=0, spread=0.3):
    """Unit vectors in groups, and their labels."""
    generator = np.random.default_rng(seed)
    centres = np.repeat(generator.normal(size=(num_labels, 16)), of_each, axis=0)
    rows = centres + spread * generator.normal(size=centres.shape)
    labels = [f"thing {number // of_each}" for number in range(len(rows))]
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def naive(before, after, labels):
    """R@1 of both, and nearest neighbours kept among five, written a second time, image by image."""
    right, right_after, kept = [], [], []
    for row in range(len(before)):
        near = np.argsort(-(before @ before[row]), kind="stable")
        near_after = np.argsort(-(after @ after[row]), kind="stable")
        near, near_after = near[near != row], near_after[near_after != row]
        kept.append(near[0] in near_after[:5])
        if labels.count(labels[row]) > 1:
            right.append(labels[near[0]] == labels[row])
            right_after.append(labels[near_after[0]] == labels[row])
    return np.mean(right) if right else None, np.mean(right_after) if right else None, np.mean(kept)


@pytest.mark.parametrize("of_each", [1, 3])
def test_the_judgement_is_that_of_a_second_writing(of_each):
    before, labels = drawn(120 // of_each, of_each, spread=0.6)
    noise = np.random.default_rng(1).normal(size=before.shape)
    after = (before + 0.2 * noise).astype(np.float32)
    after /= np.linalg.norm(after, axis=1, keepdims=True)
    found = judged(before, after, labels, ["things"] * len(labels))
    right, right_after, kept = naive(before, after, labels)
    if of_each == 1:
        assert (found["by"], found["before"]) == ("neighbours", 1.0)
        assert found["after"] == pytest.approx(kept, abs=1e-4)
    else:
        assert found["by"] == "labels"
        assert (found["before"], found["after"]) == pytest.approx((right, right_after), abs=1e-4)
    assert found["low"] <= found["difference"] <= found["high"] and found["num_queries"] == 120
    assert found["difference"] == pytest.approx(found["after"] - found["before"], abs=2e-4)


def test_domains_count_alike():
    before, labels = drawn(60, 2)
    after = before.copy()
    after[:12] = np.random.default_rng(5).normal(size=(12, 16))  # a small domain that is lost
    domains = ["few"] * 12 + ["many"] * 108
    found = judged(before, after, labels, domains)
    assert found["difference"] < 0.6 * found["after"] - 0.9  # half of the mean, not a tenth


def test_what_may_cost_too_much_is_refused():
    before, labels = drawn(60, 2)
    same = judged(before, before, labels, ["d"] * 120)
    assert same["difference"] == same["low"] == same["high"] == 0
    require_near(same)
    noise = np.random.default_rng(1).normal(size=before.shape).astype(np.float32)
    with pytest.raises(InputError, match="R@1") as error:
        require_near(judged(before, before + noise, labels, ["d"] * 120))
    assert "--runtime int8" in error.value.next_step
    bound = -LARGEST_FALL["labels"]
    require_near({**same, "low": bound})
    for low in (bound - 1e-4, float("nan")):
        with pytest.raises(InputError):
            require_near({**same, "low": low})


def test_images_to_judge_on_share_their_labels():
    labels = ["" if number % 3 else f"thing {number // 30}" for number in range(3000)]
    rows = judged_rows(labels)
    assert len(rows) == len(set(rows.tolist())) == 400 and all(labels[row] for row in rows)
    names = [labels[row] for row in rows]
    assert {names.count(name) for name in names} == {4}
    alone = judged_rows([str(number) for number in range(3000)])
    assert len(set(alone.tolist())) == 1024
    assert alone.tolist() == judged_rows([str(number) for number in range(3000)]).tolist()


@pytest.mark.parametrize(("num_layers", "num_left"), [(14, 6), (12, 0)])
def test_the_first_blocks_of_a_large_network_stay_in_float32(tmp_path, num_layers, num_left):
    """In whole numbers they cost the demo's model three points, and int8 was refused for its own images."""
    helper, random = onnx.helper, np.random.default_rng(0)
    nodes = [helper.make_node("Cast", ["pixels"], ["0"], to=onnx.TensorProto.FLOAT)]
    weights = []
    for layer in range(num_layers):
        kernel = random.normal(size=(3, 3, 1, 1)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(kernel, f"kernel {layer}"))
        nodes.append(helper.make_node("Conv", [str(layer), f"kernel {layer}"], [str(layer + 1)]))
    nodes.append(helper.make_node("GlobalAveragePool", [str(num_layers)], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["vectors"]))
    given = helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, ["b", 3, 8, 8])
    made = helper.make_tensor_value_info("vectors", onnx.TensorProto.FLOAT, ["b", 3])
    graph = helper.make_graph(nodes, "layers", [given], [made], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "g.onnx")
    quantise(tmp_path / "g.onnx", random.integers(0, 256, (16, 3, 8, 8), np.uint8))
    convolutions = [node for node in onnx.load(tmp_path / "g.onnx").graph.node if node.op_type == "Conv"]
    assert [
        node.input[1].startswith("kernel") and "Dequantize" not in node.input[1] for node in convolutions
    ] == [layer < num_left for layer in range(num_layers)]


# ---- in jobs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The model of a small network with random weights, images, and a catalog of some of them."""
    folder = tmp_path_factory.mktemp("int8")
    write_tiny(folder, "conv")
    backbone = load_backbone("timm:test_efficientnet", weights=folder / "w.safetensors")
    write_backbone(
        backbone, extracted(folder, "c.parquet", folder / "f", "torch"), folder / "model", dim=None
    )
    shutil.copytree(folder / "p", folder / "few")
    shutil.rmtree(sorted((folder / "few").iterdir())[-1])
    catalog(folder / "few", domain="things", output=folder / "few.parquet")
    return folder


@pytest.fixture(autouse=True)
def lenient(monkeypatch, request):
    """Random weights suffer from whole numbers, and there are few images."""
    if "tiny" in request.fixturenames:
        monkeypatch.setitem(LARGEST_FALL, "labels", 1.0)
        monkeypatch.setattr("samething.backbones.whole_numbers._LEAST_LABELLED", 20)
        monkeypatch.setattr("samething.backbones.whole_numbers.NUM_CALIBRATION", 16)


def extracted(tiny, table, output, runtime, **options):
    return features(
        tiny / table, backbone="timm:test_efficientnet", weights=tiny / "w.safetensors", output=output,
        runtime=runtime, num_workers=0, **options,
    )  # fmt: skip


def is_whole(path):
    """Whether weights are whole numbers of 7 bits; those of 8 cost 9 points of R@1 on a CPU without VNNI."""
    weights = [onnx.numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer]
    found = [each for each in weights if each.dtype == np.int8 and each.size > 1 and each.any()]
    return bool(found) and max(abs(each.astype(int)).max() for each in found) <= 64


def test_features_in_whole_numbers(tiny, tmp_path, monkeypatch, capfd):
    """Made and judged once: later images are computed by the very same graph, whatever they are."""
    output = tmp_path / "f"
    made = extracted(tiny, "few.parquet", output, "int8")
    assert "int8 against float32 on 60 images: R@1" in capfd.readouterr().err
    content = made.manifest.content
    assert content["runtime"] == "int8" and content["runtime_record"]["int8"]["by"] == "labels"
    assert is_whole(output / "int8.onnx") and "int8.onnx" in content["sha256"]
    plain = extracted(tiny, "few.parquet", tmp_path / "g", "onnxruntime")
    ours, theirs = (np.asarray(each.rows, np.float32) for each in (made, plain))
    cosines = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert 0.5 < cosines.min() < 0.99999  # random weights suffer most
    graph = (output / "int8.onnx").read_bytes()
    monkeypatch.setattr("samething.features.extraction.write_int8", None)
    assert extracted(tiny, "c.parquet", output, "auto", dry_run=True).runtime == "int8"
    grown = extracted(tiny, "c.parquet", output, "auto")
    assert grown.num_computed == 4 and grown.manifest.content["runtime"] == "int8"
    assert grown.manifest.content["runtime_record"] == content["runtime_record"]
    assert (output / "int8.onnx").read_bytes() == graph
    (output / "int8.onnx").unlink()
    with pytest.raises(ArtefactError, match=r"int8\.onnx"):
        FeatureSet.open(output)


@pytest.mark.slow
def test_a_killed_extraction_goes_on_in_whole_numbers(tiny, tmp_path, monkeypatch):
    """The graph that began a folder is its own; without it the other rows would be of another network."""
    output, keep = tmp_path / "f", Job.keep

    def killed(job, batch, rows):
        keep(job, batch, rows)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "keep", killed)
        extracted(tiny, "few.parquet", output, "int8", batch_size=16)
    kept = output / "int8.onnx"
    graph = kept.read_bytes()
    kept.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtefactError, match="is gone"):
        extracted(tiny, "few.parquet", output, "int8", batch_size=16)
    kept.write_bytes(graph)
    monkeypatch.setattr("samething.features.extraction.write_int8", None)
    made = extracted(tiny, "few.parquet", output, "int8", batch_size=16)
    assert made.num_computed == 44 and made.manifest.content["runtime_record"]["int8"]["by"] == "labels"


def test_features_that_cannot_be_in_whole_numbers(tiny, tmp_path, monkeypatch):
    for wrong in ({"dry_run": True}, {"cluster": "local"}, {"views": "whole"}):
        with pytest.raises(InputError, match="int8"):
            extracted(tiny, "few.parquet", tmp_path / "e", "int8", **wrong)
    monkeypatch.setitem(LARGEST_FALL, "labels", -1.5)  # no graph gains as much
    with pytest.raises(InputError, match="int8 against float32"):
        extracted(tiny, "few.parquet", tmp_path / "f", "int8")
    assert not (tmp_path / "f" / "int8.onnx").exists()
    made = extracted(tiny, "few.parquet", tmp_path / "f", "onnxruntime")
    assert made.manifest.content["runtime"] == "onnxruntime"  # nothing stands in the way of another


def test_an_index_in_whole_numbers(tiny, tmp_path, monkeypatch, capfd):
    """Rows, questions and syncs are of one model: the one in int8 that lies beside the index."""
    place = tmp_path / "index"
    made = index(tiny / "few", model=tiny / "model", runtime="int8", output=place)
    assert "int8 against float32 on 60 images: R@1" in capfd.readouterr().err
    model = made.embedder.folder
    assert model.parent == tmp_path / "index-models" and is_whole(model / "model.onnx")
    config = read_json(model / "config.json")
    assert (config["form"]["precision"], config["int8"]["by"]) == ("int8", "labels")
    assert "int8" in (model / "README.md").read_text() and damages(model)[1] == []
    float32 = Embedder.load(tiny / "model")
    assert made.embedder.fingerprint != float32.fingerprint
    image = sorted((tiny / "few").rglob("*.jpg"))[5]
    assert find(image, index=place, k=1).matches[0].score > 0.999
    assert 0.5 < float32.embed([image])[0] @ made.embedder.embed([image])[0] < 0.99999
    monkeypatch.setattr("samething.export.int8_model.write_int8", None)  # it is there
    again = index(tiny / "p", model=tiny / "model", runtime="int8", output=place)
    assert again.num_added == 4 and again.embedder.fingerprint == made.embedder.fingerprint
    assert index(tiny / "p", runtime="int8", output=place).num_added == 0
    assert sync(place, tiny / "p").embedder.fingerprint == made.embedder.fingerprint
    with pytest.raises(FingerprintError):
        index(tiny / "p", model=tiny / "model", output=place)


@pytest.mark.slow
def test_models_that_cannot_be_in_whole_numbers(tiny, tmp_path, monkeypatch):
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    (folder / "model.onnx").write_bytes(encoder("image_embeds"))
    with pytest.raises(InputError, match="int8 for own"):
        index(tiny / "few", model=folder, runtime="int8", output=tmp_path / "index")
    monkeypatch.setitem(LARGEST_FALL, "labels", -1.5)
    with pytest.raises(InputError, match="int8 against float32"):
        index(tiny / "few", model=tiny / "model", runtime="int8", output=tmp_path / "index")
    assert not (tmp_path / "index").exists()  # an index of another model may still be made there
    with pytest.raises(InputError, match="readable images"):
        index(tiny / "p" / "thing 00 é", model=tiny / "model", runtime="int8", output=tmp_path / "index")
