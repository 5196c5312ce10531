"""Tokens of patches as a second look: likeness, the trained part, the graph, what is kept."""

import dataclasses
import json
import shutil
import sqlite3

import numpy as np
import onnx
import pytest
import scipy.special
import torch
from fastapi.testclient import TestClient
from PIL import Image, ImageEnhance

from samething.backbones import load_backbone
from samething.errors import ArtefactError, InputError
from samething.evaluation import evaluate
from samething.export.token_graph import tokens
from samething.images import Preprocessing
from samething.images import prepare as prepared
from samething.rerank import Kept, Shown, Tokens, reranker_of, second_look
from samething.rerank.four_bits import packed, unpacked
from samething.rerank.tokens import METADATA, MOST_TOKENS, TokenSettings, likeness, transport
from samething.search import Searcher, find, index, prepare
from samething.training.token_head import Components, TokenHead, chamfer, compared, sinkhorn, train_token_head
from samething.web import create_app
from scenes import write_things
from tiny import write_tiny


def settings(kind="sinkhorn", **changes):
    given = {"preprocessing": {}, "likeness": kind, "temperature": 0.1, "nowhere": 0.2, "baseline": 0.0}
    return TokenSettings(**{**given, **changes})


def weighted(rng, count, dims=8):
    rows = rng.standard_normal((count, dims))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True) * rng.uniform(0.1, 1, (count, 1))


def by_hand(one, other, *, temperature=0.1, nowhere=0.2, steps=10):
    """Both kinds of likeness, pair by pair of tokens and in logarithms."""
    cosines = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in other] for a in one]
    left, right = ([float(np.linalg.norm(token)) for token in tokens] for tokens in (one, other))
    nearest = sum(weight * max(row) for weight, row in zip(left, cosines, strict=True)) / sum(left)
    kernel = np.array([[*row, nowhere] for row in cosines] + [[nowhere] * (len(other) + 1)]) / temperature
    of_rows, of_columns = np.log([*left, sum(right)]), np.log([*right, sum(left)])
    v = np.zeros(len(of_columns))
    for _ in range(steps):
        u = of_rows - scipy.special.logsumexp(kernel + v, axis=1)
        v = of_columns - scipy.special.logsumexp(kernel + u[:, None], axis=0)
    moved = np.exp(kernel + u[:, None] + v)[:-1, :-1]
    return nearest, float((moved * cosines).sum() / min(sum(left), sum(right)))


def test_likeness_is_that_of_an_independent_writing_and_of_training():
    """In numpy for searching, in torch for training, and by hand: three writings, one number."""
    rng = np.random.default_rng(0)
    for n, m in ((5, 9), (12, 3), (1, 1)):
        one, other = weighted(rng, n), weighted(rng, m)
        expected = by_hand(one, other)
        tensors = [torch.from_numpy(side)[None] for side in (one, other)]
        trained = (chamfer(*tensors), sinkhorn(*tensors, torch.tensor(0.2, dtype=torch.float64), 0.1))
        for kind, wanted, own in zip(("chamfer", "sinkhorn"), expected, trained, strict=True):
            assert likeness(one, other, settings(kind)) == pytest.approx(wanted, abs=1e-9)
            assert own.item() == pytest.approx(wanted, abs=1e-9)


def test_transport_moves_what_is_there_and_leaves_what_belongs_nowhere():
    rng = np.random.default_rng(1)
    one = weighted(rng, 6)
    other = np.concatenate([one[:3], weighted(rng, 20)])
    lengths = [np.linalg.norm(side, axis=1) for side in (one, other)]
    cosines = (one / lengths[0][:, None]) @ (other / lengths[1][:, None]).T
    moved = transport(cosines, *lengths, settings(temperature=0.02, nowhere=0.7))
    assert (moved >= 0).all() and (moved.sum(axis=0) <= lengths[1] + 1e-9).all()
    np.testing.assert_allclose(moved[range(3), range(3)], lengths[0][:3], rtol=0.1)
    assert moved[3:].sum() < 0.05 * lengths[0][3:].sum()
    assert likeness(np.zeros((2, 8)), one, settings()) == 0.0


def test_gradients_are_those_of_differences():
    torch.manual_seed(0)
    one, other = (torch.randn(2, side, 5, dtype=torch.float64, requires_grad=True) for side in (3, 4))
    nowhere = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(chamfer, (one, other))
    assert torch.autograd.gradcheck(lambda a, b, c: sinkhorn(a, b, c, 0.3), (one, other, nowhere))


@pytest.mark.parametrize("kind", ["chamfer", "sinkhorn"])
def test_training_finds_out_what_of_a_token_tells_instances_apart(kind):
    """Half of the numbers are noise, larger than the quarter that says something: R@1 of other instances.

    300 instances teach; from 32 the map of 16,384 numbers learned their noise by heart, and nothing else.
    """
    rng = np.random.default_rng(0)
    classes = np.repeat(np.arange(332), 2)
    own = rng.standard_normal((332, 4, 128))[classes] * (np.arange(128) < 32) * 0.5
    rows = own + rng.standard_normal((664, 4, 128)) * (np.arange(128) >= 64)
    rows += 0.1 * rng.standard_normal(rows.shape)
    components = torch.from_numpy(rows.astype(np.float32))
    given = {"likeness": kind, "temperature": 0.1}

    def first_right(steps):
        head = train_token_head(components[:600], classes[:600], steps=steps, **given)
        with torch.inference_mode():
            found = head(components[600:])
            likenesses = compared(head, found, found, kind, 0.1).fill_diagonal_(-1)
        assert found.norm(dim=2).max() <= 1 + 1e-6
        return float((classes[600:][likenesses.argmax(dim=1).numpy()] == classes[600:]).mean())

    before, after = first_right(0), first_right(80)
    assert before < 0.5 < 0.8 < after
    with pytest.raises(InputError, match="two images"):
        train_token_head(components[::2], classes[::2], steps=1, **given)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A tiny transformer with random weights, and a catalog of things."""
    folder = tmp_path_factory.mktemp("tokens")
    write_tiny(folder, "vit", num_things=6)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("chamfer", 0), ("sinkhorn", 3)])
def test_a_graph_of_tokens_knows_an_image_again(vit, tmp_path, kind, steps):
    """What is kept is bounded and the same each time; there are as many tokens as the network has patches.

    The baseline was that of tokens before they were kept in 4 bits: no image reached it then.
    """
    written = tokens(
        vit / "c.parquet", backbone="timm:test_vit", weights=vit / "w.safetensors",
        output=tmp_path / "tokens.onnx", likeness=kind, steps=steps,
    )  # fmt: skip
    look = reranker_of(str(written.path), lambda images: np.zeros((0, 2), np.float32), "m")
    assert isinstance(look, Tokens) and look.settings == written.settings
    folders = sorted((vit / "p").iterdir())
    images = [Image.open(folder / f"view {view}.jpg").convert("RGB") for view in (0, 1) for folder in folders]
    content = look.keep(images[0])
    assert content == look.keep(images[0]) and len(content) == 65 * written.num_tokens <= 65 * MOST_TOKENS
    backbone = load_backbone("timm:test_vit", weights=vit / "w.safetensors")
    pixels = prepared(images[0], backbone.preprocessing)[None]
    [ours] = look.session.run(None, {"pixels": pixels})
    normalised = (torch.from_numpy(pixels).float() / 255 - backbone.mean) / backbone.std
    with torch.inference_mode():
        patches = backbone.network.forward_features(normalised)[:, backbone.network.num_prefix_tokens :]
    assert ours.shape == (1, patches.shape[1], 128) and np.linalg.norm(ours, axis=2).max() <= 1 + 1e-5
    shown = [
        Shown(str(number), lambda own=own: own, np.zeros(2, np.float32)) for number, own in enumerate(images)
    ]
    for number, image in enumerate(images[: len(folders)]):
        darker = Shown("", lambda image=image: ImageEnhance.Brightness(image).enhance(0.9), shown[0].vector)
        found = [one.numbers[0] for one in second_look(look, darker, shown, Kept(tmp_path / "kept"))]
        assert int(np.argmax(found)) == number and found[number] > 0 == min(found)


def patches_graph(path, **changes):
    """A graph of 16 tokens, random directions of an image's patches, as samething tokens writes them."""
    kernel = np.random.default_rng(0).standard_normal((128, 3, 16, 16)).astype(np.float32) / 40
    nodes = [
        onnx.helper.make_node("Cast", ["pixels"], ["floats"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("Mul", ["floats", "scale"], ["small"]),
        onnx.helper.make_node("Conv", ["small", "kernel"], ["maps"], strides=[16, 16]),
        onnx.helper.make_node("Reshape", ["maps", "flat"], ["rows"]),
        onnx.helper.make_node("Transpose", ["rows"], ["vectors"], perm=[0, 2, 1]),
    ]
    constants = {"scale": np.float32(1 / 255), "kernel": kernel, "flat": np.array([0, 128, -1])}
    graph = onnx.helper.make_graph(
        nodes, "patches",
        [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.UINT8, [None, 3, 64, 64])],
        [onnx.helper.make_tensor_value_info("vectors", onnx.TensorProto.FLOAT, [None, 16, 128])],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    told = {**dataclasses.asdict(settings("chamfer", baseline=0.3)), **changes}
    told["preprocessing"] = Preprocessing(size=64, resize="squash").to_json()
    onnx.helper.set_model_props(model, {METADATA: json.dumps(told)})
    onnx.save(model, path)


def test_tokens_beside_a_model_are_a_second_look_by_name(line, tmp_path, monkeypatch):
    """One answer in Python, by find, prepare and the server; a model without them says what to write."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = shutil.copytree(line / "model", tmp_path / "model")
    images = write_things(tmp_path / "images", num_things=3)
    made, image = tmp_path / "index", images / "thing 01 é" / "view 2.jpg"
    searcher = index(images, model=model, output=made)
    graph = model / "tokens.onnx"
    with pytest.raises(InputError, match="without tokens") as refused:
        searcher.find(image, rerank="tokens")
    assert f"samething tokens CATALOG --backbone NAME --output {graph}" in str(refused.value)
    with TestClient(create_app(searcher), base_url="http://localhost") as client:
        assert "tokens" not in client.get("/info").json()["rerankers"]
    patches_graph(graph)
    expected = searcher.find(image, k=5, rerank="tokens")
    assert all(match.evidence["by"].startswith("tokens.onnx ") for match in expected.matches)
    assert expected.matches[0].evidence["added"] > 0.5
    ids = [match.id for match in expected.matches]
    assert [match.id for match in find(image, index=made, k=5, rerank="tokens").matches] == ids
    with TestClient(create_app(searcher), base_url="http://localhost") as client:
        assert "tokens" in client.get("/info").json()["rerankers"]
        given = {"files": [("image", ("i", image.read_bytes()))], "data": {"k": 5, "rerank": "tokens"}}
        answer = client.post("/search", **given).json()
    assert [match["id"] for match in answer["matches"]] == ids
    ready = prepare(made, rerank="tokens")
    assert ready.num_kept == len(searcher.index) and not ready.unreadable
    [size] = sqlite3.connect(made / "second-look.sqlite").execute("SELECT max(length(content)) FROM kept")
    assert size == (16 * 65,)
    assert "tokens.onnx" in Searcher.open(made).find(image, rerank="tokens").matches[0].evidence["by"]
    # another graph in its place: nothing that was kept by the first is taken for the second's
    first = reranker_of("tokens", searcher.embedder.embed, "m", graph.parent)
    patches_graph(graph, likeness="sinkhorn")
    second = reranker_of("tokens", searcher.embedder.embed, "m", graph.parent)
    assert second.settings.likeness == "sinkhorn" and second.made_from != first.made_from
    patches_graph(graph, unknown=1)
    with pytest.raises(ArtefactError, match="samething tokens"):
        searcher.find(image, rerank="tokens")


def test_a_run_without_tokens_is_refused_with_the_place_where_they_belong(line, monkeypatch):
    monkeypatch.chdir(line)
    with pytest.raises(InputError, match="without tokens") as refused:
        evaluate(line / "run", rerank=("tokens",), baselines=False)
    assert f"--output {line / 'run' / 'tokens.onnx'}" in str(refused.value)


def test_directions_in_four_bits_stay_what_they_were():
    rows = weighted(np.random.default_rng(0), 50, 128)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    after = unpacked(packed(rows, steps=32), 128)
    assert (after * rows).sum(axis=1).min() > 0.98 and unpacked(b"", 48).shape == (0, 48)


def test_components_are_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 150)) * np.linspace(3, 0.1, 150)
    found = Components.of(torch.from_numpy(rows.astype(np.float32)))(
        torch.from_numpy(rows.astype(np.float32))
    )
    left = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False)[:128]
    np.testing.assert_allclose(np.linalg.norm(found.numpy(), axis=0), left, rtol=1e-3)
    narrow = Components.of(torch.randn(40, 6))
    assert narrow(torch.randn(2, 3, 6)).shape == (2, 3, 128)
    assert TokenHead()(narrow(torch.randn(2, 3, 6))).shape == (2, 3, 128)


def test_a_backbone_without_patches_is_refused(vit, tmp_path):
    with pytest.raises(InputError, match="patches"):
        tokens(vit / "c.parquet", backbone="python:test_tokens:blind", output=tmp_path / "t.onnx")


def blind():
    """A backbone whose network gives a feature alone."""
    from samething.backbones import Backbone
    from samething.images import Preprocessing

    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
    return Backbone(network, name="blind", width=48, preprocessing=Preprocessing(size=32))
