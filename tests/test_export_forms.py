"""Smaller and faster forms of a model: what they hold, what they cost, and when they are refused."""

import json
import shutil

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from samething.catalog import Catalog
from samething.cli import main
from samething.embedder import FORMAT_VERSION, Embedder
from samething.errors import ArtefactError, FingerprintError, InputError
from samething.evaluation import evaluate_embeddings
from samething.export import Form, export
from samething.export.quality import Parity, changes_of
from samething.files import file_sha256, read_json, read_manifest, write_json, write_manifest
from samething.heads import build_head
from samething.retrieval.codes import Coder
from samething.training import train
from samething.training.run import Run
from scenes import photographs
from tiny import read_tensors


def written(folder, name, run="run", **options):
    weights = folder / "w.safetensors"
    return export(folder / run, output=folder / name, weights=weights, allow_quality_loss=True, **options)


@pytest.mark.slow
def test_float16_halves_the_file_and_hardly_changes_a_vector(tiny, tiny_vectors):
    made = written(tiny, "float16", precision="float16")
    half, full = (tiny / name / "model.onnx" for name in ("float16", "full"))
    assert half.stat().st_size < 0.7 * full.stat().st_size
    tensors = safetensors.torch.load_file(tiny / "float16" / "model.safetensors")
    assert {value.dtype for value in tensors.values() if value.is_floating_point()} == {torch.float16}
    found = Embedder.load(tiny / "float16").embed(photographs())
    assert found.dtype == np.float32 and not np.array_equal(found, tiny_vectors)
    np.testing.assert_allclose(found, tiny_vectors, atol=5e-3)
    assert made.parity.images_per_s is not None and made.config["form"]["precision"] == "float16"
    assert "float16" in (tiny / "float16" / "README.md").read_text()


def test_whole_numbers_are_smaller_and_find_nearly_the_same(tiny, tiny_vectors):
    made = written(tiny, "int8", precision="int8")
    graph = onnx.load(tiny / "int8" / "model.onnx").graph
    assert {onnx.TensorProto.INT8} <= {tensor.data_type for tensor in graph.initializer}
    quantised = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert not any("head." in name for name in quantised)  # the head stays as it was
    found = Embedder.load(tiny / "int8").embed(photographs())
    # weights are random and photographs unlike the training images: near, not equal
    assert (found * tiny_vectors).sum(axis=1).mean() > 0.9
    before, after = made.parity.model_bytes
    assert after < before and (tiny / "int8" / "model.onnx").stat().st_size == after
    assert all(speed > 0 for speed in made.parity.images_per_s)


@pytest.mark.slow
def test_a_prefix_is_the_first_numbers_at_unit_length(tiny, tiny_vectors):
    made = written(tiny, "prefix", dim=5)
    expected = tiny_vectors[:, :5] / np.linalg.norm(tiny_vectors[:, :5], axis=1, keepdims=True)
    embedder = Embedder.load(tiny / "prefix")
    np.testing.assert_allclose(embedder.embed(photographs()), expected, atol=1e-5)
    assert embedder.dim == made.config["head"]["embedding_dim"] == 5
    assert made.parity.vector_bytes == (64, 20) and made.parity.images_per_s is None
    for dim in (0, 17):
        with pytest.raises(InputError, match=f"--dim {dim}"):
            written(tiny, f"prefix {dim}", dim=dim)


@pytest.mark.slow
def test_vectors_kept_in_fewer_bytes(tiny, tiny_vectors):
    made = written(tiny, "codes int8", codes="int8")
    embedder = Embedder.load(tiny / "codes int8")
    coded = embedder.encode(tiny_vectors)
    assert coded.dtype == np.uint8 and coded.shape == (6, 16)
    assert made.parity.vector_bytes == (64, 16)
    back = embedder.decode(coded)
    # photographs lie outside the range of the few training images, where steps of int8 are cut off
    assert (back * tiny_vectors).sum(axis=1).min() > 0.97
    # the parity is that of the decoded index
    run = Run.open(tiny / "run")
    features = run.features()
    tested = features.catalog.has_role("query", "index", "query+index")
    catalog, rows = features.catalog.take(tested), np.asarray(features.rows[tested])
    both = embedder.decode(embedder.encode(run.head.embed(rows)))
    if not made.parity.queries_coded:
        both[catalog.has_role("query")] = run.head.embed(rows)[catalog.has_role("query")]
    result = evaluate_embeddings(both, catalog)
    assert made.parity.changes["mean"].after == pytest.approx(result.value("mmp@5"))
    content = (tiny / "codes int8" / "codes.npz").read_bytes()
    (tiny / "codes int8" / "codes.npz").write_bytes(content[:-10])
    with pytest.raises(ArtefactError, match=r"codes\.npz is cut short"):
        Embedder.load(tiny / "codes int8")


@pytest.mark.parametrize(
    ("budget", "codes", "dim", "num_bytes"),
    [
        pytest.param(64, "float32", None, 64, marks=pytest.mark.slow),
        pytest.param(20, "int8", None, 16, marks=pytest.mark.slow),
        pytest.param(4, "int4", 8, 4, marks=pytest.mark.slow),
    ],
)
def test_a_budget_of_bytes_chooses_numbers_and_bits(tiny, budget, codes, dim, num_bytes):
    made = written(tiny, f"{budget} bytes", bytes=budget)
    assert (made.config["form"]["codes"], made.config["form"]["dim"]) == (codes, dim)
    embedder = Embedder.load(tiny / f"{budget} bytes")
    assert (embedder.coder.num_bytes if embedder.coder else 4 * embedder.dim) == num_bytes
    assert made.parity is None or made.parity.vector_bytes == (64, num_bytes)
    for other in ({"dim": 8}, {"codes": "int8"}):
        with pytest.raises(InputError, match=f"--bytes {budget} with --dim or --codes"):
            written(tiny, "never", bytes=budget, **other)


def test_a_model_without_a_coder_says_so(tiny, tiny_vectors):
    with pytest.raises(InputError, match="stay float32") as error:
        Embedder.load(tiny / "full").encode(tiny_vectors)
    assert "--codes" in error.value.next_step


def unit(rng, rows, dim):
    vectors = rng.normal(size=(rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.999), ("int4", 0.98)])
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_coders_come_back_from_disk_and_nearly_to_the_vector(dim, kind, least, tmp_path):
    vectors = unit(np.random.default_rng(dim), 600, dim)
    coder = Coder.fit(vectors, kind)
    assert coder.num_bytes == (dim if kind == "int8" else (dim + 1) // 2)
    coder.write(tmp_path / "codes.npz")
    read = Coder.read(tmp_path / "codes.npz")
    codes = coder.encode(vectors)
    assert codes.shape == (600, coder.num_bytes) and np.array_equal(read.encode(vectors), codes)
    back = read.decode(codes)
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, atol=1e-5)
    assert (back * vectors).sum(axis=1).mean() > least
    assert read.encode(vectors[:0]).shape == (0, coder.num_bytes)


def test_four_bits_are_whole_numbers_of_seven_steps():
    """Written again number by number; two numbers share a byte, the first one in its low half."""
    vectors = unit(np.random.default_rng(0), 500, 5)
    vectors[1:, 0] *= 0.1  # so that the first number of the first vector is beyond what seven steps reach
    vectors[0] = [1, 0, 0, 0, 0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    coder = Coder.fit(vectors, "int4")
    squares = (vectors.astype(np.float64) ** 2).sum(0)
    step = 2.5 * np.sqrt((squares + 64 / 5) / (500 + 64)) / 7
    numbers = np.clip(np.round(vectors / step), -7, 7).astype(int)
    assert (np.abs(numbers) == 7).any() and numbers.min() < 0
    for row, codes in zip(numbers, coder.encode(vectors), strict=True):
        assert codes.tolist() == [
            (row[0] % 16) + 16 * (row[1] % 16),
            (row[2] % 16) + 16 * (row[3] % 16),
            row[4] % 16,
        ]
    back = numbers * step
    back /= np.linalg.norm(back, axis=1, keepdims=True)
    np.testing.assert_allclose(coder.decode(coder.encode(vectors)), back, atol=1e-6)


def test_codes_and_formats_that_are_gone_say_to_export_again(tiny, tmp_path):
    np.savez(tmp_path / "codes.npz", kind="pq", dim=64, centres=np.zeros((16, 256, 4), np.float32))
    with pytest.raises(ArtefactError, match="codes pq") as error:
        Coder.read(tmp_path / "codes.npz")
    assert "export the run again" in error.value.next_step
    folder = shutil.copytree(tiny / "full", tmp_path / "model")
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "form": {**config["form"], "format": "torch-export"}})
    stored = read_json(folder / "manifest.json")
    for name, of in (("sha256", file_sha256), ("bytes", lambda path: path.stat().st_size)):
        stored["content"][name]["config.json"] = of(folder / "config.json")
    del stored["content_fingerprint"]
    write_json(folder / "manifest.json", stored)
    with pytest.raises(ArtefactError, match="torch-export, which has no") as error:
        Embedder.load(folder)
    assert "export the run again" in error.value.next_step


@pytest.mark.slow
def test_resizing_inside_the_graph(tiny, tiny_vectors):
    written(tiny, "inside", preprocessing_inside=True)
    embedder = Embedder.load(tiny / "inside")
    (given,) = embedder.session.get_inputs()
    assert given.name == "images" and [isinstance(side, str) for side in given.shape] == [
        True, False, True, True,
    ]  # fmt: skip
    found = embedder.embed(photographs())  # of several sizes in one batch
    assert (found * tiny_vectors).sum(axis=1).min() > 0.995
    alone = np.concatenate([embedder.embed([image]) for image in photographs()])
    np.testing.assert_allclose(found, alone, atol=1e-5)


# ---- quality


@pytest.mark.slow
def test_a_form_that_loses_too_much_is_refused_and_can_be_allowed(tiny, monkeypatch):
    target = tiny / "too short"
    options = {"output": target, "weights": tiny / "w.safetensors", "dim": 1, "tolerance": -1.0}
    with pytest.raises(ArtefactError, match="points of mMP@5") as error:
        export(tiny / "run", **options)
    assert "--allow-quality-loss" in error.value.next_step and "things" in error.value.given
    assert not (target / "manifest.json").exists()
    with pytest.raises(ArtefactError, match="not a finished model"):
        Embedder.load(target)

    def forbidden(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr("samething.export.model_folder.write_onnx", forbidden)
    monkeypatch.setattr("samething.export.model_folder.write_with_head", forbidden)
    made = export(tiny / "run", **options, allow_quality_loss=True)
    assert made.parity.tolerance == -1.0 and not made.parity.within_tolerance
    assert Embedder.load(target).dim == 1 and not (target / "refused.json").exists()
    again = export(tiny / "run", **options)  # finished: what was allowed stays allowed
    assert again.largest_difference is None and again.parity == made.parity


@pytest.mark.slow
def test_the_program_exits_with_an_error_when_a_form_loses_too_much(tiny, capsys):
    weights = ("--weights", str(tiny / "w.safetensors"))
    command = ["export", str(tiny / "run"), "-o", str(tiny / "refused"), *weights, "--dim", "1"]
    with pytest.raises(SystemExit) as done:
        main([*command, "--tolerance", "-1"])
    assert done.value.code == 1 and "points of mMP@5" in capsys.readouterr().err


def test_parity_is_the_paired_difference_and_survives_json(tiny):
    run = Run.open(tiny / "run")
    features = run.features()
    rows = features.catalog.has_role("query", "index", "query+index")
    catalog = features.catalog.take(rows)
    full = run.head.embed(np.asarray(features.rows[rows]))
    before, after = (evaluate_embeddings(full[:, :dim], catalog) for dim in (16, 1))
    changes = changes_of(before, after)
    assert set(changes) == {"things", "mean"}
    change = changes["things"]
    assert change.difference == pytest.approx(after.value("mmp@5") - before.value("mmp@5"))
    assert change.low <= change.difference <= change.high
    parity = Parity(
        measured_on="test", changes=changes, tolerance=0.01, model_bytes=(2, 1), vector_bytes=(64, 4),
        images_per_s=(1.0, 2.0),
    )  # fmt: skip
    assert Parity.from_json(json.loads(json.dumps(parity.to_json()))) == parity
    assert changes_of(before, before)["mean"].difference == 0


@pytest.mark.parametrize(
    "options",
    [
        {"format": "guiec", "precision": "int8"},
        {"format": "guiec", "codes": "int8"},
        {"format": "sentence-transformers", "precision": "int8"},
        {"format": "guiec", "input": "images"},
    ],
)
def test_options_that_do_not_go_together(options):
    with pytest.raises(InputError, match="with --format"):
        Form(**options)


# ---- the folder


def test_the_tensors_are_those_of_head_and_backbone(tiny):
    assert {name.split(".")[0] for name in read_tensors(tiny / "full")} == {"head", "backbone"}


def test_damaged_weights_each_have_their_own_error(tiny, tmp_path):
    folder = shutil.copytree(tiny / "full", tmp_path / "model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    with pytest.raises(ArtefactError, match=r"cut short: .* of .* bytes"):
        read_tensors(folder)
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="changed or damaged"):
        read_tensors(folder)
    file.unlink()
    with pytest.raises(ArtefactError, match="does not exist"):
        read_tensors(folder)
    Embedder.load(folder)  # embedding does not need them


def as_version_1(folder):
    """A model folder as the first version wrote it."""
    config = read_json(folder / "config.json")
    for name in ("form", "parity", "calibration", "licences"):
        del config[name]
    write_json(folder / "config.json", config)
    stored = read_json(folder / "manifest.json")
    del stored["content_fingerprint"]
    names = list(stored["content"]["sha256"])
    write_json(
        folder / "manifest.json",
        {
            **stored,
            "format_version": 1,
            "content": {"sha256": {name: file_sha256(folder / name) for name in names}},
            "fingerprint": _fingerprint_1(stored["made_from"]),
        },
    )


def _fingerprint_1(made_from):
    from samething.files import fingerprint

    return fingerprint({"kind": "model", "format_version": 1, "made_from": made_from})


def test_a_folder_of_version_1_is_read_and_recognised(tiny, tiny_vectors, tmp_path):
    folder = shutil.copytree(tiny / "full", tmp_path / "model")
    assert read_manifest(folder, kind="model", format_version=2).format_version == FORMAT_VERSION == 2
    as_version_1(folder)
    np.testing.assert_array_equal(Embedder.load(folder).embed(photographs()), tiny_vectors)
    again = export(tiny / "run", output=folder, weights=tiny / "w.safetensors")
    assert again.largest_difference is None
    with pytest.raises(FingerprintError, match="another model"):
        export(tiny / "run", output=folder, weights=tiny / "w.safetensors", precision="float16")


def test_a_folder_of_something_else_is_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtefactError, match=r"thesis\.txt"):
        export(tiny / "run", output=tmp_path, weights=tiny / "w.safetensors")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# ---- soups


@pytest.mark.slow
def test_an_average_is_the_mean_of_the_weights_and_needs_one_start(tiny, tiny_vectors):
    train(tiny / "f", output=tiny / "longer", recipe="demo", epochs=9.0, embedding_dim=16)
    made = written(tiny, "soup", average=(tiny / "longer",))
    heads = [Run.open(tiny / name).head.state_dict() for name in ("run", "longer")]
    for name, value in safetensors.torch.load_file(tiny / "soup" / "model.safetensors").items():
        if name.startswith("head."):
            mean = sum(head[name.removeprefix("head.")] for head in heads) / 2
            torch.testing.assert_close(value, mean)
    assert made.config["training"]["mix"]["names"] == ["run", "longer"]
    assert "uniform average of run, longer" in (tiny / "soup" / "README.md").read_text()
    assert not np.allclose(Embedder.load(tiny / "soup").embed(photographs()), tiny_vectors, atol=1e-4)
    train(tiny / "f", output=tiny / "other start", recipe="demo", epochs=1.0, embedding_dim=16, seed=5)
    with pytest.raises(InputError, match="another start"):
        written(tiny, "refused soup", average=(tiny / "other start",))


@pytest.mark.slow
def test_half_the_way_from_the_start(tiny):
    written(tiny, "wise", interpolate=0.25)
    run = Run.open(tiny / "run")
    start = build_head(run.head.config, run.head.width, seed=run.config.seed).projection.weight
    found = safetensors.torch.load_file(tiny / "wise" / "model.safetensors")["head.projection.weight"]
    torch.testing.assert_close(found, 0.25 * run.head.projection.weight + 0.75 * start)
    with pytest.raises(InputError, match=r"--interpolate 1\.5"):
        written(tiny, "refused wise", interpolate=1.5)


def test_a_head_that_an_earlier_version_joined_or_shortened_is_not_averaged(tiny):
    shutil.copytree(tiny / "run", tiny / "joined")
    manifest = read_manifest(tiny / "joined", kind="run", format_version=1)
    manifest.made_from["config"] |= {"members": 2, "train_dim": 256}
    write_manifest(tiny / "joined", manifest)
    with pytest.raises(InputError, match="after its training"):
        written(tiny, "soup of joined", average=(tiny / "joined",))
    assert written(tiny, "alone", run="joined").config["embedding_dim"] == 16


@pytest.mark.slow
def test_the_metrics_are_those_of_the_form(tiny):
    """What the card says is measured with the vectors of the written model, not with those of the run."""
    made = written(tiny, "prefix 2", dim=2)
    catalog = Catalog.read(tiny / "c.parquet")
    tested = catalog.take(catalog.has_role("query", "index", "query+index"))
    vectors = Embedder.load(tiny / "prefix 2").embed(tested.paths)
    result = evaluate_embeddings(vectors, tested)
    assert made.config["metrics"]["merged"]["mean"]["mmp@5"] == pytest.approx(result.value("mmp@5"), abs=0.02)
