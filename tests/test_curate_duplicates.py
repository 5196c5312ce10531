"""Hashes, pairs and what becomes of them, each against a plain second writing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.fft
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import samething.curate.hashes as hashing
import samething.retrieval.nearest as nearest_module
from samething.catalog import Catalog
from samething.curate.curate_config import CurateConfig
from samething.curate.duplicates import RELATIONS, Rows, resolve
from samething.curate.hashes import image_hashes, perceptual_hashes
from samething.curate.ledger import Ledger
from samething.curate.near_hashes import differing_bits, near_pairs
from samething.curate.pairs import Contents, Pairs, embedding_pairs, exact_pairs, perceptual_pairs, row_ranks
from samething.curate.same_image import pair_similarities
from samething.datasets.boxes import BOX_COLUMNS
from samething.errors import ArtefactError, InputError
from samething.images import decode
from scenes import photographs

PHOTOGRAPHS = photographs()


def folder_of(folder: Path, images: list[Image.Image], **columns: list[object]) -> Catalog:
    folder.mkdir(exist_ok=True)
    rows = []
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "label": f"l{number}"})
        rows[-1] |= {name: values[number] for name, values in columns.items()}
    return Catalog.from_rows(rows, root=folder)


# ---- perceptual hashes


@pytest.mark.parametrize("image", PHOTOGRAPHS, ids=lambda image: f"{image.size}")
def test_the_hash_is_its_definition(image):
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    low = scipy.fft.dctn(grey, type=2)[1:9, 1:9].ravel()
    expected = int("".join("1" if value > np.median(low) else "0" for value in low), 2)
    assert perceptual_hashes(image).own == expected


@pytest.mark.parametrize("image", PHOTOGRAPHS, ids=lambda image: f"{image.size}")
def test_copies_are_near_and_others_far(image):
    own = perceptual_hashes(image)
    small = image.resize((image.width // 3, image.height // 3), Image.Resampling.BILINEAR)
    assert (own.own ^ perceptual_hashes(small).own).bit_count() <= 4
    turned = perceptual_hashes(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert (own.mirrored ^ turned.own).bit_count() <= 2
    width, height = image.size
    crop = image.crop((width * 0.06, height * 0.06, width * 0.94, height * 0.94))
    assert (own.inner ^ perceptual_hashes(crop).own).bit_count() <= 4
    for other in PHOTOGRAPHS:
        if other.size != image.size or other.tobytes() != image.tobytes():
            assert (own.own ^ perceptual_hashes(other).own).bit_count() > 12


def test_flat_images_have_no_hash():
    noise = np.random.default_rng(0).normal(128, 1, (64, 64)).astype(np.uint8)
    assert perceptual_hashes(Image.fromarray(noise)) is None
    framed = Image.new("L", (100, 100), 255)
    framed.paste(0, (0, 0, 100, 4))
    found = perceptual_hashes(framed)
    assert found.inner == found.own  # nothing is inside


@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=40),
    st.lists(st.tuples(st.integers(0, 39), st.lists(st.integers(0, 63), max_size=16)), max_size=20),
    st.integers(0, 15),
)
@settings(max_examples=15)
def test_near_pairs_are_all_of_them(values, changes, distance):
    for place, bits in changes:
        if values:
            value = values[place % len(values)]
            for bit in bits:
                value ^= 1 << bit
            values.append(value)
    hashes = np.asarray(values, np.uint64)
    found = near_pairs(hashes, distance=distance, memory_mib=1)
    expected = [
        (a, b, (values[a] ^ values[b]).bit_count())
        for a in range(len(values))
        for b in range(a + 1, len(values))
        if (values[a] ^ values[b]).bit_count() <= distance
    ]
    assert (
        list(zip(found.first.tolist(), found.second.tolist(), found.distance.tolist(), strict=True))
        == expected
    )
    half = len(values) // 2
    across = near_pairs(hashes[:half], hashes[half:], distance=distance)
    assert set(zip(across.first.tolist(), (across.second + half).tolist(), strict=True)) == {
        (a, b) for a, b, _ in expected if a < half <= b
    }


def test_near_pairs_in_little_memory_are_the_same():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**20, 3000).astype(np.uint64)  # crowded buckets
    small, large = near_pairs(hashes, distance=5, memory_mib=1), near_pairs(hashes, distance=5)
    assert len(small) > 1000 and (small.first == large.first).all() and (small.second == large.second).all()


def test_differing_bits_are_those_written_out():
    first, second = np.random.default_rng(0).integers(0, 2**63, (2, 50)).astype(np.uint64)
    written = [bin(int(a) ^ int(b)).count("1") for a, b in zip(first, second, strict=True)]
    assert differing_bits(first, second).tolist() == written


@pytest.mark.parametrize("distance", [-1, 16])
def test_distances_that_cannot_be(distance):
    with pytest.raises(InputError):
        near_pairs(np.zeros(2, np.uint64), distance=distance)


# ---- the cache


def test_hashes_are_kept_and_renewed_with_the_file(tmp_path):
    catalog = folder_of(tmp_path / "p", PHOTOGRAPHS[:3])
    (tmp_path / "p" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    rows = [
        *catalog.table.to_pylist(),
        {"image": "broken.jpg", "label": "b"},
        {"image": "gone.jpg", "label": "g"},
    ]
    images = Catalog.from_rows(rows, root=tmp_path / "p")
    first = image_hashes(images, cache=tmp_path / "h.sqlite")
    assert first.num_computed == 5 and set(first.unreadable) == {3, 4}
    assert not first.is_hashed[3:].any() and first.is_hashed[:3].all()
    again = image_hashes(images, cache=tmp_path / "h.sqlite")
    assert again.num_computed == 1  # what is not there is looked for again
    for name in ("sha256", "perceptual", "mirrored", "inner"):
        assert (getattr(first, name) == getattr(again, name)).all()
    assert again.unreadable == first.unreadable
    PHOTOGRAPHS[4].save(tmp_path / "p" / "1.png")
    changed = image_hashes(images, cache=tmp_path / "h.sqlite")
    assert changed.num_computed == 2 and changed.sha256[1] != first.sha256[1]
    assert changed.sha256[0] == first.sha256[0]


def test_a_killed_run_loses_one_commit_at_most(tmp_path, monkeypatch):
    images = folder_of(tmp_path / "p", [PHOTOGRAPHS[n % 4] for n in range(10)])
    monkeypatch.setattr(hashing, "IMAGES_PER_COMMIT", 3)
    plain, seen = hashing._hash, []

    def dies(image):
        seen.append(image)
        if len(seen) > 7:
            raise KeyboardInterrupt
        return plain(image)

    monkeypatch.setattr(hashing, "_hash", dies)
    with pytest.raises(KeyboardInterrupt):
        image_hashes(images, cache=tmp_path / "h.sqlite")
    monkeypatch.setattr(hashing, "_hash", plain)
    assert image_hashes(images, cache=tmp_path / "h.sqlite").num_computed == 4


def test_another_file_is_no_cache(tmp_path):
    images = folder_of(tmp_path / "p", PHOTOGRAPHS[:1])
    (tmp_path / "h.sqlite").write_text("something else " * 100)
    with pytest.raises(ArtefactError, match=r"h\.sqlite"):
        image_hashes(images, cache=tmp_path / "h.sqlite")
    with sqlite3.connect(tmp_path / "t.sqlite") as database:
        database.execute("create table images (path text)")
    with pytest.raises(ArtefactError, match=r"t\.sqlite"):
        image_hashes(images, cache=tmp_path / "t.sqlite")


def test_parts_of_a_image_are_not_copies(tmp_path):
    image = PHOTOGRAPHS[0]
    image.save(tmp_path / "a.png")
    boxes = [(0, 0, 100, 100), (100, 100, 220, 220), (0, 0, 100, 100), (5000, 0, 5100, 90)]
    rows = [
        {"image": "a.png", "label": "x"} | dict(zip(BOX_COLUMNS, box, strict=True))
        for box in boxes
    ]  # fmt: skip
    rows.append({"image": "a.png", "label": "x"})
    images = Catalog.from_rows(rows, root=tmp_path)
    found = image_hashes(images, cache=tmp_path / "h.sqlite")
    assert found.sha256[0] == found.sha256[2] != found.sha256[1]
    assert found.sha256[0].startswith(found.sha256[4]) and len(found.sha256[4]) == 64
    assert list(found.unreadable) == [3] and "outside" in found.unreadable[3]
    assert int(found.perceptual[0]) == perceptual_hashes(image.crop(boxes[0])).own


# ---- looking closely


def similarity(first, second):
    return pair_similarities([first, second].__getitem__, [(0, 1, False)])[0]


@pytest.mark.slow
@given(st.integers(0, 4), *(st.floats(0, 0.07) for _ in range(4)))
@settings(max_examples=15)
def test_crops_are_the_same_image(number, left, top, right, bottom):
    # all but the bricks: of so fine and regular a pattern too little is left at 32 × 32
    image = PHOTOGRAPHS[number].resize((300, 220))
    crop = image.crop((300 * left, 220 * top, 300 * (1 - right), 220 * (1 - bottom)))
    assert similarity(image, crop) == pytest.approx(similarity(crop, image), abs=1e-5)
    assert similarity(image, crop) > 0.85
    other = PHOTOGRAPHS[(number + 1) % 5]
    assert similarity(other, crop) < 0.8


def test_another_colour_is_another_image():
    image = PHOTOGRAPHS[2]
    red, green, blue = image.split()
    assert similarity(image, Image.merge("RGB", (blue, red, green))) < 0.95
    assert similarity(Image.new("RGB", (50, 50), "red"), image) == 0


# ---- pairs


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "d", ""]), st.integers(0, 2)), min_size=1, max_size=25
    ),
    st.randoms(use_true_random=False),
)
def test_exact_pairs_connect_each_group(rows, random):
    shas = pa.array([sha for sha, _ in rows])
    tiers = np.asarray([tier for _, tier in rows])
    ranks = np.arange(len(rows))
    random.shuffle(ranks)
    contents = Contents.of(shas, ranks)
    assert [number < 0 for number in contents.of_row] == [sha == "" for sha, _ in rows]
    pairs = exact_pairs(contents, tiers, ranks)
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert len(found) == len(pairs)
    expected = set()
    for sha in "abcd":
        own = [row for row in range(len(rows)) if rows[row][0] == sha]
        if not own:
            continue
        best = min(own, key=lambda row: ranks[row])
        assert contents.row_of[contents.of_row[own[0]]] == best
        for row in own:
            in_tier = min(
                (other for other in own if tiers[other] == tiers[row]), key=lambda other: ranks[other]
            )
            expected |= {(best, row), (in_tier, row)}
    assert found == {(first, second) for first, second in expected if first != second}


def everything(catalog: Catalog, cache: Path):
    hashes = image_hashes(catalog, cache=cache)
    zeros = np.zeros(len(catalog), np.int64)
    ranks = row_ranks(zeros, zeros, zeros)
    return (
        Contents.of(pa.array(hashes.sha256, pa.string()), ranks),
        hashes,
        lambda row: decode(catalog.source(row)),
    )


def test_perceptual_pairs(tmp_path):
    a, b, c = PHOTOGRAPHS[:3]
    turned = a.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    crop = b.crop((10, 5, b.width - 15, b.height - 12))
    images = [a, a.resize((150, 150)), b, crop, c, turned, Image.new("RGB", (40, 40))]
    contents, hashes, decode = everything(folder_of(tmp_path / "p", images), tmp_path / "h.sqlite")

    def found(mirrored: bool, closeness: float = 0.9) -> set:
        config = CurateConfig(closeness=closeness, mirrored=mirrored)
        pairs = perceptual_pairs(contents, hashes, decode, config)
        assert (pairs.first < pairs.second).all() and len(pairs) == len(
            {*zip(pairs.first, pairs.second, strict=True)}
        )
        return set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))

    assert found(mirrored=False) == {(0, 1), (2, 3)}
    assert found(mirrored=True) == {(0, 1), (2, 3), (0, 5), (1, 5)}
    assert found(mirrored=False, closeness=0.0) >= {(0, 1), (2, 3)}


def test_embedding_pairs_are_confirmed_on_the_pixels(tmp_path):
    a, b, c = PHOTOGRAPHS[:3]
    images = [a, a.crop((15, 10, a.width - 12, a.height - 18)), b, c]
    _, hashes, decode = everything(folder_of(tmp_path / "p", images), tmp_path / "h.sqlite")
    vectors = np.array([[1, 0, 0], [1, 0.1, 0], [1, 0.1, 0.05], [0, 0, 1]], np.float32)
    pairs, crowded = embedding_pairs(
        np.arange(4), vectors, hashes, decode, CurateConfig(similarity=0.9, closeness=0.9)
    )
    assert (pairs.first.tolist(), pairs.second.tolist(), crowded) == ([0], [1], 0)
    assert pairs.score[0] == pytest.approx(1 / np.sqrt(1.01), abs=1e-5) and pairs.closeness[0] > 0.9


def alike(number: int) -> hashing.Hashes:
    """Of so many images that no hash tells apart."""
    zeros = np.zeros(number, np.uint64)
    return hashing.Hashes(
        sha256=np.full(number, "x", object), perceptual=zeros, mirrored=zeros, inner=zeros,
        is_hashed=np.ones(number, bool), unreadable={},
    )  # fmt: skip


def test_crowded_neighbours_are_counted():
    vectors, config = np.ones((200, 3), np.float32), CurateConfig(similarity=0.9, closeness=0.0)
    pairs, crowded = embedding_pairs(np.arange(200), vectors, alike(200), lambda row: PHOTOGRAPHS[0], config)
    assert crowded == 39  # rows with more than 160 after them
    assert len(pairs) == 39 * 160 + 160 * 161 // 2


@pytest.mark.parametrize("at_a_time", [7, 1000])
def test_embedding_pairs_are_those_of_all_cosines(at_a_time, monkeypatch):
    monkeypatch.setattr(nearest_module, "_ROWS_AT_A_TIME", at_a_time)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(9, 8))
    vectors = (centres[np.arange(60) % 9] + 0.25 * rng.normal(size=(60, 8))).astype(np.float32)
    rows, config = 3 * np.arange(60), CurateConfig(similarity=0.9, closeness=0.0)
    pairs, crowded = embedding_pairs(rows, vectors, alike(180), lambda row: PHOTOGRAPHS[0], config)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    first, second = np.nonzero(np.triu(unit @ unit.T >= 0.9, 1))
    assert len(first) > 20 and crowded == 0
    found = sorted(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    assert found == sorted(zip((3 * first).tolist(), (3 * second).tolist(), strict=True))


# ---- what becomes of them


def one_pair(first: int, second: int, method: int = 1) -> Pairs:
    number = np.asarray([0.97], np.float32)
    rows = np.asarray([first]), np.asarray([second])
    return Pairs(*rows, np.asarray([method]), number, number, np.zeros(1, bool))


def outcome(pairs: Pairs, *, tiers, classes, datasets, num_own=None, leaks="remove", conflicts="exact"):
    tiers, classes, datasets = (np.asarray(values) for values in (tiers, classes, datasets))
    ledger = Ledger(len(tiers) if num_own is None else num_own)
    rows = Rows(tiers, classes, datasets, row_ranks(tiers, datasets, np.zeros(len(tiers), np.int64)))
    relation = resolve(pairs, rows, ledger, leaks=leaks, conflicts=conflicts)
    return [RELATIONS[number] for number in relation], np.flatnonzero(~ledger.is_kept).tolist(), ledger


@pytest.mark.parametrize(
    ("tiers", "classes", "datasets", "method", "options", "relation", "dropped"),
    [
        ([0, 2], [0, 9], [0, 1], 1, {}, "leak", [0]),
        ([2, 1], [0, 0], [0, 0], 0, {}, "leak", [1]),
        ([0, 2], [0, 9], [0, 1], 1, {"leaks": "report"}, "leak", []),
        ([2, 2], [0, 1], [0, 0], 0, {}, "within evaluation", []),
        ([0, 0], [0, 0], [0, 0], 1, {}, "duplicate", [1]),
        ([0, 0], [0, 1], [1, 0], 1, {}, "across data sets", [0]),
        ([0, 0], [0, 1], [0, 0], 0, {}, "conflict", [0, 1]),
        ([0, 0], [0, 1], [0, 0], 1, {}, "conflict", []),
        ([0, 0], [0, 1], [0, 0], 1, {"conflicts": "all"}, "conflict", [0, 1]),
        ([0, 0], [0, 1], [0, 0], 0, {"conflicts": "report"}, "conflict", []),
    ],
)
def test_one_pair(tiers, classes, datasets, method, options, relation, dropped):
    found = outcome(one_pair(0, 1, method), tiers=tiers, classes=classes, datasets=datasets, **options)
    assert found[:2] == ([relation], dropped)
    ledger = found[2]
    for row in dropped:
        assert ledger._partner[row] == 1 - row and ledger.reason_of(row)


def test_a_chain_of_likeness_is_not_one_image():
    """0 ~ 1 ~ 2 ~ 3, but 0 and 2 are not alike: 1 goes for 0, and so 2 stays, and 3 goes for 2."""
    pairs = Pairs.joined([one_pair(2, 3), one_pair(1, 2), one_pair(0, 1)])
    _, dropped, ledger = outcome(pairs, tiers=[0] * 4, classes=[0] * 4, datasets=[0] * 4)
    assert dropped == [1, 3] and [ledger._partner[row] for row in dropped] == [0, 2]


def test_what_is_dropped_drops_nothing():
    """1 leaks; its copy 0 is not dropped for its sake, only for its own leak, of which there is none."""
    pairs = Pairs.joined([one_pair(0, 1), one_pair(1, 2)])
    _, dropped, _ = outcome(pairs, tiers=[0, 0, 2], classes=[0, 0, 9], datasets=[0, 0, 1], num_own=2)
    assert dropped == [1]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=20),
    st.lists(st.integers(0, 2), min_size=10, max_size=10),
)
def test_nothing_measured_is_dropped_and_no_leak_is_left(edges, tiers):
    edges = sorted({(min(edge), max(edge)) for edge in edges if edge[0] != edge[1]})
    pairs = Pairs.joined([one_pair(*edge) for edge in edges])
    _, dropped, ledger = outcome(pairs, tiers=tiers, classes=[0] * 10, datasets=[0] * 10)
    assert all(tiers[row] < 2 for row in dropped)
    for first, second in edges:
        if tiers[first] != tiers[second]:
            low = min(first, second, key=lambda row: tiers[row])
            assert low in dropped
        elif tiers[first] < 2:
            assert not (ledger.is_kept[first] and ledger.is_kept[second])
    for row in dropped:
        partner = ledger._partner[row]
        assert tiers[partner] > tiers[row] or ledger.is_kept[partner]
