"""How the images of an index are decoded: chosen once, and kept by queries, sync, rebuild and the server."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from samething.embedder import Embedder
from samething.errors import InputError
from samething.index import SqliteIndex
from samething.search import Searcher, find, index, rebuild, sync
from samething.web.guards import Limits
from samething.web.service import Service
from scenes import photographs

SIDES = (2600, 1950)


def photograph(number):
    """A photograph with the noise of a sensor: at a fraction its vector is another, if only a little."""
    pixels = np.asarray(photographs()[number].resize(SIDES, Image.Resampling.BILINEAR)).astype(np.float32)
    noise = np.random.default_rng(number).standard_normal((*pixels.shape[:2], 1), dtype=np.float32)
    stream = io.BytesIO()
    Image.fromarray((pixels + 20 * noise).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="module")
def phone(tmp_path_factory):
    """Three large photographs; the third is for queries and uploads."""
    folder = tmp_path_factory.mktemp("phone")
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(photograph(number))
    return folder


@pytest.fixture
def photos(phone, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes((phone / f"{number}.jpg").read_bytes())
    return folder


def kept_vectors(searcher):
    [batch] = searcher.index.items(columns=["path", "width", "height"])
    rows = sorted(batch.to_pylist(), key=lambda row: row["path"])
    assert {(row["width"], row["height"]) for row in rows} == {SIDES}
    return searcher.index.vectors([row["id"] for row in rows])


def agree(embedder, kept, vectors):
    """Share of numbers that are those of the vectors, in the bytes that the model keeps them in."""
    coder = embedder.coder
    expected = vectors if coder is None else coder.decode(coder.encode(vectors))
    return np.isclose(kept, expected, atol=1e-6).mean()


def test_an_index_keeps_to_its_decoding(line, phone, photos, tmp_path):
    """A photograph of 12 megapixels was unpacked whole everywhere, for four times the time."""
    exact = Embedder.load(line / "model")
    scaled = dataclasses.replace(exact, decoding="scaled")
    paths = sorted(phone.iterdir())
    as_scaled, as_exact = scaled.embed(paths), exact.embed(paths)
    assert (np.abs(as_scaled - as_exact).max(axis=1) > 1e-5).all()  # otherwise this tells nothing
    assert ((as_scaled * as_exact).sum(axis=1) > 0.99).all()

    made = index(photos, model=line / "model", output=tmp_path / "index")
    kept = kept_vectors(made)
    assert agree(exact, kept, as_scaled[:2]) > max(0.99, agree(exact, kept, as_exact[:2]))
    again = Searcher.open(tmp_path / "index")
    assert again.embedder.decoding == "scaled"
    assert find(photos / "0.jpg", index=tmp_path / "index").matches[0].path == str(photos / "0.jpg")

    (photos / "2.jpg").write_bytes(paths[2].read_bytes())
    assert agree(exact, kept_vectors(sync(tmp_path / "index")), as_scaled) > 0.99

    with pytest.raises(InputError, match="decoded scaled"):
        index(photos, model=line / "model", output=tmp_path / "index", decoding="exact")
    rebuilt = rebuild(tmp_path / "index", model=line / "model", decoding="exact")
    kept = kept_vectors(rebuilt)
    assert agree(exact, kept, as_exact) > max(0.99, agree(exact, kept, as_scaled))
    assert Searcher.open(tmp_path / "index").embedder.decoding == "exact"
    assert index(photos, model=line / "model", output=tmp_path / "index").num_added == 0


def test_a_server_decodes_as_the_index_that_was_rebuilt_meanwhile(line, phone, photos, tmp_path):
    """With the same model, another decoding: until it was started again, it decoded queries the old way."""
    index(photos, model=line / "model", output=tmp_path / "index")
    served = Service(Searcher.open(tmp_path / "index"), limits=Limits(max_pixels=10**7))
    content = (phone / "2.jpg").read_bytes()
    try:
        scaled = served._prepared(content, None)[-1]
        unchanged = served.searcher
        assert served.searcher is unchanged and unchanged.embedder.decoding == "scaled"
        rebuild(tmp_path / "index", model=line / "model", decoding="exact")
        exact = served._prepared(content, None)[-1]
        expected = served.searcher.embedder
        assert expected.decoding == "exact" and expected.max_pixels == unchanged.embedder.max_pixels
        assert (exact != scaled).any() and (exact == expected.prepare(expected.unpacked(content))).all()
    finally:
        served.close()


def test_a_rebuild_that_ends_early_leaves_the_decoding_and_keeps_its_own(line, photos, tmp_path, monkeypatch):
    """Its decoding was noted at once, so that queries of the old index were decoded that way."""
    made = index(photos, model=line / "model", output=tmp_path / "index")
    place = {"index": tmp_path / "index", "model": line / "model"}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(SqliteIndex, "swap", lambda new, of: (_ for _ in ()).throw(KeyboardInterrupt))
        rebuild(**place, decoding="exact")
    assert Searcher.open(tmp_path / "index").embedder.decoding == made.current().embedder.decoding == "scaled"
    with pytest.raises(InputError, match="decoded exact"):
        rebuild(**place, decoding="scaled")
    assert rebuild(**place).embedder.decoding == made.current().embedder.decoding == "exact"


def test_an_index_without_a_note_is_exact(line, photos, tmp_path):
    """As an earlier version made it: what comes in later is decoded as the rest was."""
    made = index(photos, model=line / "model", output=tmp_path / "index")
    made.index.set_notes("decoding", {made.embedder.fingerprint: None})
    assert Searcher.open(tmp_path / "index").embedder.decoding == "exact"
    assert index(photos, model=line / "model", output=tmp_path / "index").embedder.decoding == "exact"


def test_the_servers_uploads_and_queries_are_decoded_as_the_index_is(line, phone, photos, tmp_path):
    made = index(photos, model=line / "model", output=tmp_path / "index")
    content = (phone / "2.jpg").read_bytes()
    served = Service(Searcher.open(tmp_path / "index"), limits=Limits())
    try:
        row_id = served.add(content, label="cup", domain="things")
        pixels = served._prepared(content, None)[-1]
    finally:
        served.close()
    expected = dataclasses.replace(Embedder.load(line / "model"), decoding="scaled").embed([phone / "2.jpg"])
    assert agree(made.embedder, made.index.vectors([row_id]), expected) > 0.99
    np.testing.assert_allclose(made.embedder.embed_prepared([pixels]), expected, atol=1e-6)
    row = made.index.rows([row_id], ["width", "height"]).to_pylist()[0]
    assert (row["width"], row["height"]) == SIDES
