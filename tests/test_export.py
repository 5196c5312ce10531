"""From a run to a model folder: the same vectors as torch, and a card that is complete and true."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from line import ENVIRONMENT, PROGRAM
from samething.backbones import load_backbone
from samething.catalog import Catalog
from samething.embedder import Embedder
from samething.errors import ArtefactError, FingerprintError
from samething.evaluation import Calibration, evaluate_embeddings
from samething.evaluation.no_match import measure_no_match
from samething.export import export
from samething.export.embedding_model import EmbeddingModel
from samething.files import file_sha256, read_json, read_manifest
from samething.images import decode, prepare
from samething.index import open_index
from samething.retrieval.codes import Coder
from samething.search import Searcher
from samething.training import train
from samething.training.run import Run
from scenes import photographs


@pytest.fixture(scope="module")
def run(line):
    return Run.open(line / "run")


@pytest.fixture(scope="module")
def torch_model(run):
    features = run.features()
    backbone = load_backbone("efficientnet_lite0").with_preprocessing(features.preprocessing)
    return EmbeddingModel(backbone, run.head).eval()


def test_vectors_equal_torchs_on_photographs(line, torch_model):
    embedder = Embedder.load(line / "model")
    pixels = np.stack([prepare(decode(image), embedder.preprocessing) for image in photographs()])
    with torch.inference_mode():
        expected = torch_model(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(embedder.embed(photographs()), expected, atol=1e-4, rtol=0)


def test_vectors_equal_those_of_the_cached_features(line, run):
    """Features are float16 and perhaps of another runtime, so near is enough; preprocessing must agree."""
    features = run.features()
    vectors = Embedder.load(line / "model").embed(features.catalog.paths)
    cosines = (vectors * run.head.embed(features.rows)).sum(axis=1)
    assert cosines.min() > 0.9999


def test_safetensors_hold_the_same_weights(line, torch_model):
    stored = safetensors.torch.load_file(line / "model" / "model.safetensors")
    ours = torch_model.state_dict()
    assert set(stored) == set(ours)
    assert all(torch.equal(stored[name], value) for name, value in ours.items())
    assert {name.split(".")[0] for name in stored} == {"backbone", "head"}


def test_scores_are_calibrated_on_the_validation_images(line, run, tmp_path, monkeypatch):
    """A model whose vectors are kept in codes had no calibration."""
    features = run.features()
    rows = run.head.embed(np.asarray(features.rows))
    coder = Coder.fit(run.head.embed(np.asarray(features.rows[features.catalog.has_role("train")])), "int4")
    kept = coder.decode(coder.encode(rows))  # a query stays whole, as in a search
    expected = measure_no_match(kept, features.catalog, asked=rows, target_precision=0.5)
    assert expected.fitted != measure_no_match(rows, features.catalog, target_precision=0.5).fitted
    assert read_json(line / "model" / "config.json")["calibration"] is None  # four queries are too few
    assert "Similarities are not probabilities" in (line / "model" / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr("samething.export.quality.LEAST_QUESTIONS", expected.fitted.num_with_positive)
    export(line / "run", output=tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    found = Calibration.from_json(config["calibration"])
    for name in ("slope", "intercept", "threshold", "recall", "num_queries"):
        assert getattr(found, name) == pytest.approx(getattr(expected.fitted, name), rel=1e-5), name
    assert found.index_size == features.catalog.has_role("val").sum()
    for name in ("precision", "recall", "false_alarms", "calibration_error", "num_queries"):
        value = expected.to_json()[name]
        assert config["no_match"][name] == (None if value is None else pytest.approx(value, rel=1e-5)), name
    # a search takes the size of its own index into account
    searcher = Searcher.open(line / "index")
    searcher = dataclasses.replace(searcher, embedder=Embedder.load(tmp_path / "model"))
    assert searcher.index.count() > found.index_size
    assert searcher.calibration == (found.for_index(searcher.index.count()), "labels")
    assert searcher.calibration[0] != found
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert f"calibration error of the probabilities\n{expected.calibration_error:.3f}" in card
    assert not re.search(r"\n\n\n|[{}]|None|nan", card)


def test_the_graph_is_what_the_documents_say(line):
    session = Embedder.load(line / "model").session
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [3, 280, 280]) or (
        given.name == "pixels" and given.type == "tensor(uint8)" and given.shape[2] == given.shape[3]
    )
    assert (made.name, made.type, made.shape[1]) == ("vectors", "tensor(float)", 512)
    assert isinstance(given.shape[0], str) and isinstance(made.shape[0], str)  # any batch


def test_manifest_lists_every_file_with_its_checksum(line):
    folder = line / "model"
    manifest = read_manifest(folder, kind="model", format_version=2)
    listed = manifest.content["sha256"]
    on_disk = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {"manifest.json"}
    assert (
        set(listed) == on_disk == {"README.md", "codes.npz", "config.json", "model.onnx", "model.safetensors"}
    )
    assert all(file_sha256(folder / name) == checksum for name, checksum in listed.items())
    assert len({(folder / name).stat().st_mode for name in listed}) == 1  # readable to the same people


def test_configuration_is_complete_and_true(line, run):
    config = read_json(line / "model" / "config.json")
    features = run.features()
    assert config["embedding_dim"] == 512 and config["name"] == "model"
    assert {name: config["backbone"][name] for name in features.backbone} == features.backbone
    assert config["backbone"]["licence"]
    assert config["training"]["config"] == json.loads(json.dumps(run.config.to_json()))
    assert config["training"]["domains"] == ["things"]
    train_rows = features.catalog.has_role("train")
    assert config["training"]["num_images"] == train_rows.sum()
    assert config["training"]["num_classes"] == len(set(features.catalog.class_ids()[train_rows]))
    assert config["form"]["codes"] == "int4" and config["parity"] is None
    embeddings = run.head.embed(features.rows)
    coder, catalog = Embedder.load(line / "model").coder, features.catalog
    kept = coder.decode(coder.encode(embeddings))
    if not catalog.has_role("query+index").any():
        kept[catalog.has_role("query")] = embeddings[catalog.has_role("query")]
    result = evaluate_embeddings(kept, catalog)
    assert config["metrics"] == result.to_json()
    assert config["intervals"] == json.loads(json.dumps(result.intervals()))
    assert {"samething", "torch", "timm", "onnx", "numpy", "pillow"} <= set(config["versions"])


def test_the_card_says_the_same(line):
    card = (line / "model" / "README.md").read_text(encoding="utf-8")
    config = read_json(line / "model" / "config.json")
    assert card.startswith("# model\n")
    for fact in (
        config["backbone"]["name"], config["backbone"]["licence"], config["training"]["config"]["loss"],
        f"{config['training']['num_images']} images", f"{config['training']['num_classes']} instances",
    ):  # fmt: skip
        assert str(fact) in card
    rows = re.findall(r"^\| (\w+) \| (\d+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\]", card, re.M)
    assert [row[0] for row in rows] == ["things", "mean"]
    for domain, queries, value, low, high in rows:
        numbers, ends = config["metrics"]["merged"][domain], config["intervals"]["merged"][domain]["mmp@5"]
        assert int(queries) == numbers["num_queries"]
        assert [float(value), float(low), float(high)] == pytest.approx(
            [100 * numbers["mmp@5"], 100 * ends[0], 100 * ends[1]], abs=0.051
        )
    assert not re.search(r"\n\n\n|[{}]|None|nan", card)


def test_the_cards_example_runs(line, monkeypatch, capsys):
    card = (line / "model" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    images = Catalog.read(line / "things.parquet").paths
    monkeypatch.chdir(line)
    exec(code.replace('"a.jpg"', repr(str(images[0]))).replace('"b.jpg"', repr(str(images[1]))), {})
    assert 0.3 < float(capsys.readouterr().out) <= 1.0001


@pytest.mark.slow
def test_a_killed_export_leaves_no_model_and_goes_on(line, tmp_path):
    """Killed when its first file is there: until the manifest is written the folder is no model."""
    output = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "export", line / "run", "-o", output],
        env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    with process:
        while process.poll() is None and not [path for path in output.rglob("*") if path.name != ".lock"]:
            time.sleep(0.002)
        process.kill()
    assert not (output / "manifest.json").exists(), "it was killed too late to say anything"
    with pytest.raises(ArtefactError):
        Embedder.load(output)
    export(line / "run", output=output)
    assert (output / "model.safetensors").read_bytes() == (line / "model" / "model.safetensors").read_bytes()
    image = Catalog.read(line / "things.parquet").paths[0]
    again, undisturbed = (Embedder.load(folder).embed([image]) for folder in (output, line / "model"))
    np.testing.assert_allclose(again, undisturbed, atol=1e-6)
    assert not [path for path in output.rglob("*") if "partial" in path.name or path.suffix == ".tmp"]


def test_another_run_is_refused_in_the_same_folder(line, tmp_path):
    other = train(line / "features", output=tmp_path / "run", epochs=1.0, seed=7)
    folder = shutil.copytree(line / "model", tmp_path / "model")
    with pytest.raises(FingerprintError, match="another model") as error:
        export(other.folder, output=folder)
    assert "-o" in error.value.next_step


def test_a_damaged_finished_folder_is_not_called_finished(line, line_copy):
    (line_copy / "model" / "model.onnx").write_bytes(b"cut")
    with pytest.raises(Exception, match=r"model\.onnx"):
        export(line_copy / "run", output=line_copy / "model")


def test_a_run_is_exported_and_indexed_as_it_was_trained_to_be_kept(line):
    """512 numbers of 4 bits were exported and stored as floats: 2,048 bytes instead of 256."""
    index = open_index(line / "index")
    (vectors,) = (line / "index").glob("vectors-*")
    assert vectors.name == "vectors-1.int4"
    assert vectors.stat().st_size == 256 * index.count()
    assert index.verify().problems == ()
    assert "int4, 256 bytes each" in (line / "model" / "README.md").read_text(encoding="utf-8")
