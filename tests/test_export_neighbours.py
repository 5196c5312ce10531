"""The formats of one run, each loaded by what it is for, find the same neighbours as torch."""

import numpy as np
import pytest
import torch

from neighbours import CONSUMERS, by_torch, consumed, images_tested, nearest, squares_of
from samething.export import export
from samething.export.embedding_model import source_of
from samething.training import train
from samething.training.run import Run
from tiny import read_tensors


@pytest.fixture(scope="module")
def run(line, tmp_path_factory):
    """A head of 64 plain numbers, which every format can hold."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return train(line / "features", output=folder, recipe="plain", epochs=2).folder


@pytest.fixture(scope="module")
def source(run):
    return source_of(Run.open(run), weights=None)


@pytest.fixture(scope="module")
def gallery(source, tmp_path_factory):
    """The test images' catalog, their squares on disk, the crop's margin, and torch's vectors."""
    catalog = images_tested(source)
    squares, margin = squares_of(catalog, source.backbone.preprocessing)
    path = tmp_path_factory.mktemp("gallery") / "squares.npy"
    np.save(path, squares)
    return catalog, path, margin, by_torch(source.model, squares, margin)


def require_same_neighbours(found, expected, catalog):
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    theirs, scores = nearest(expected, catalog)
    ours, _ = nearest(found, catalog)
    assert theirs.shape == (len(scores), 5) and len(scores) >= 6
    index = np.flatnonzero(catalog.has_role("index", "query+index"))
    for row, (wanted, got) in enumerate(zip(theirs, ours, strict=True)):
        place = {entry: number for number, entry in enumerate(index)}
        apart = [abs(scores[row, place[a]] - scores[row, place[b]]) for a, b in zip(wanted, got, strict=True)]
        assert max(apart) < 1e-5, (row, wanted, got)  # another order only where two are equally near


@pytest.mark.parametrize(
    "form",  # each with its own library and process: tests/test_export_formats.py looks at vectors of each
    [pytest.param(form, marks=[] if form == "onnxruntime" else pytest.mark.slow) for form in CONSUMERS],
)
def test_every_format_finds_what_torch_finds(form, run, gallery, tmp_path):
    catalog, squares, margin, expected = gallery
    chosen = "folder" if form == "onnxruntime" else form
    folder = export(run, output=tmp_path / "model", format=chosen).folder
    require_same_neighbours(consumed(form, folder, squares, margin=margin), expected, catalog)


@pytest.mark.slow
def test_safetensors_in_torch_find_the_same(source, run, gallery, tmp_path):
    catalog, squares, margin, expected = gallery
    folder = export(run, output=tmp_path / "model").folder
    model = source_of(Run.open(run), weights=None).model
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()  # so that nothing but the file can give the answer
    model.load_state_dict(read_tensors(folder))
    require_same_neighbours(by_torch(model, np.load(squares), margin), expected, catalog)


def test_other_vectors_have_other_neighbours(gallery):
    catalog, _, _, expected = gallery
    noise = np.random.default_rng(0).normal(size=expected.shape).astype(np.float32) * 0.05
    with pytest.raises(AssertionError):
        require_same_neighbours(expected + noise, expected, catalog)
