"""Public boards from end to end, on miniatures in their official layouts."""

import json

import numpy as np
import pytest

import miniatures
from samething.bench import BOARDS, bench
from samething.datasets import read_dataset
from samething.errors import ArtefactError, FingerprintError, InputError
from samething.evaluation import evaluate_embeddings
from samething.features import FeatureSet
from samething.leaderboard import leaderboard
from scenes import printed
from small_backbone import NAME


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    base = tmp_path_factory.mktemp("data roots")
    for key in {row.dataset for row in BOARDS.values() if row.dataset}:
        miniatures.BUILDERS[key](base / key)
    return base


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """CUB of three species to train on and three to search, four images each."""
    root = tmp_path_factory.mktemp("birds")
    classes = [number for number in (1, 2, 3, 101, 102, 103) for _ in range(4)]
    paths = [f"{number:03}.Bird/{place}.jpg" for place, number in enumerate(classes)]
    for place, path in enumerate(paths):
        miniatures.image(root / "CUB_200_2011/images" / path, place)
    for name, values in (("images", paths), ("image_class_labels", classes)):
        lines = "".join(f"{place} {value}\n" for place, value in enumerate(values, start=1))
        miniatures.text(root / f"CUB_200_2011/{name}.txt", lines)
    return root


def test_a_board_from_its_images_to_the_leaderboard(trees, birds, tmp_path):
    done = bench("cub_200", data_root=birds, backbone=NAME, output=tmp_path, dims=(2,))
    names = [f"{NAME} {way}" for way in ("frozen", "PCA-2", "adapted-2")]
    assert list(done.comparison.results) == names
    assert [done.comparison.dimensions[name] for name in names] == [96, 2, 2]
    content = json.loads(done.file.read_text())
    board = leaderboard(done.file, protocol=("cub_200",))
    assert [row.score for row in board.own["cub_200"]] == [
        pytest.approx(content[name]["merged"]["mean"]["r@1"]) for name in names
    ]
    assert not any(row.is_of_the_benchmark for row in board.own["cub_200"])
    assert "EVA02-CLIP-E-14-plus" in printed(board) and "84.4" in printed(board)
    again = bench("cub_200", data_root=birds, backbone=NAME, output=tmp_path, dims=(2,))
    assert json.loads(again.file.read_text()) == content


@pytest.mark.slow
def test_heads_of_one_boards_training_images_are_measured_on_another(trees, birds, tmp_path):
    bench("cub_200", data_root=birds, backbone=NAME, output=tmp_path, dims=(2,))
    other = bench("in_shop", data_root=trees / "in_shop", backbone=NAME, output=tmp_path / "other",
                  train_on=tmp_path / "features", dims=(2,))  # fmt: skip
    assert list(other.comparison.dimensions.values()) == [96, 2, 2]
    with pytest.raises(FingerprintError, match="--views whole"):
        bench("mini_ilias", data_root=trees / "mini_ilias", backbone=NAME, output=tmp_path / "third",
              train_on=tmp_path / "features")  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("forb", "mini_ilias") else pytest.mark.slow)
        for name in BOARDS
        if BOARDS[name].dataset
    ],
)
def test_every_board_runs_on_its_miniature(trees, tmp_path, name):
    root = trees / BOARDS[name].dataset
    if name == "guiec":
        with pytest.raises(InputError, match="of at most 64 numbers"):
            bench(name, data_root=root, backbone=NAME, output=tmp_path)
        return
    done = bench(name, data_root=root, backbone=NAME, output=tmp_path, adapt=False)
    (numbers,) = json.loads(done.file.read_text()).values()
    assert numbers["benchmark"] == (BOARDS[name].listed or name) and numbers["backbone"]["name"] == NAME
    scope = numbers.get("merged", numbers.get("per_domain"))
    value = scope["mean"][done.comparison.first.protocol.metrics[0]]
    assert 0 <= value <= 1 if value is not None else name in ("rp2k", "met", "cars196", "cub_200")  # no pairs


def test_a_table_of_ones_own_with_one_right_answer_per_query(tmp_path):
    """IRISP's kind of board, whose layout is not public, could not be run at all."""
    lines = ["img_path,label,role"]
    for place in range(12):
        role, label = ("query", place) if place < 4 else ("index", place - 4)
        miniatures.image(tmp_path / f"part {place}.jpg", place)
        lines.append(f"part {place}.jpg,{label},{role}")
    table = tmp_path / "parts.csv"
    miniatures.text(table, "\n".join(lines))
    done = bench("custom", data_root=table, backbone=NAME, output=tmp_path / "out")
    (numbers,) = json.loads(done.file.read_text()).values()
    opened = FeatureSet.open(tmp_path / "out" / "features")
    rows = np.asarray(opened.rows, np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = opened.catalog.strings("image").tolist()
    at = [names.index(f"part {place}.jpg") for place in range(12)]
    scores = rows[at[:4]] @ rows[at[4:]].T
    ranks = 1 + (scores > np.diagonal(scores)[:, None]).sum(axis=1)
    found = numbers["merged"]["mean"]
    assert found["mrr@10"] == pytest.approx(np.mean(1 / ranks)) and found["r@1"] == np.mean(ranks == 1)
    assert found["r@10"] == found["r@100"] == 1 and max(ranks) > 1
    with pytest.raises(ArtefactError, match=r"absent\.csv"):
        bench("custom", data_root=tmp_path / "absent.csv", backbone=NAME, dry_run=True)
    planned = bench("custom", data_root=table, backbone=NAME, dry_run=True)
    assert "all numbers: " in printed(done) and "samething leaderboard" not in printed(done)
    assert planned.estimate.num_images == 12 and "one's own images" in printed(planned)


def revisited(scores, right, junk):
    """mAP of one query by its authors' steps: rank, drop junk, trapezoids."""
    ranking = [place for place in np.argsort(-scores, kind="stable") if place not in junk]
    total = 0.0
    for number, rank in enumerate(rank for rank, place in enumerate(ranking) if place in right):
        before = 1.0 if rank == 0 else number / rank
        total += (before + (number + 1) / (rank + 1)) / 2 / len(right)
    return total


def test_revisited_oxford_equals_its_authors_steps(trees, tmp_path):
    """Junk images count neither for nor against: an image that is hard is no error of an easy question."""
    listing = read_dataset("roxford", data_root=trees / "roxford")
    random = np.random.default_rng(3)
    images, queries = random.standard_normal((6, 5)), random.standard_normal((2, 5))
    images, queries = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, queries))
    rows = np.concatenate([queries, images] * 3)  # each difficulty: its queries, then the gallery
    found = evaluate_embeddings(rows, listing.catalog, protocol="revisited", num_resamples=5)
    answers = [{"easy": {0, 1}, "hard": {2}, "junk": {3}}, {"easy": set(), "hard": {4}, "junk": {0, 5}}]
    for level, right, junk in (
        ("easy", ["easy"], ["junk", "hard"]),
        ("medium", ["easy", "hard"], ["junk"]),
        ("hard", ["hard"], ["junk", "easy"]),
    ):
        expected = []
        for number, answer in enumerate(answers):
            sets = [set().union(*(answer[name] for name in names)) for names in (right, junk)]
            if sets[0]:
                expected.append(revisited(images @ queries[number], *sets))
        measured = found.estimates("per_domain")[level]["map-trapezoid"].value
        assert measured == pytest.approx(np.mean(expected))


def test_ground_truth_by_query_is_read(trees):
    instre = read_dataset("instre", data_root=trees / "instre").catalog
    first = instre.table.slice(0, 1).to_pylist()[0]
    assert (first["box_left"], first["box_top"], first["box_right"], first["box_bottom"]) == (10, 5, 30, 35)
    assert first["image"] == "instre/INSTRE-S1/01a_canada_book/010.jpg" and first["role"] == "query"
    assert [labels for labels in instre.table["labels"].to_pylist() if labels] == [["instre/0"]] * 3 + [
        ["instre/1"]
    ]
    forb = read_dataset("forb", data_root=trees / "forb").catalog
    asked = [row for row in forb.table.to_pylist() if row["role"] == "query"]
    assert [(row["domain"], row["label"], len(row["labels"])) for row in asked] == [
        ("currency", "forb/currency/database/0.jpg", 1),
        ("currency", "forb/currency/database/0.jpg", 2),
        ("logos", "forb/logos/database/1.jpg", 1),
    ]


def test_a_dry_run_says_what_is_missing_and_what_it_takes_and_writes_nothing(trees, tmp_path):
    absent = bench("cub_200", data_root=tmp_path, backbone=NAME, output=tmp_path / "out", dry_run=True)
    said = printed(absent)
    assert "1.2 GB on disk" in said and "CUB_200_2011.tgz" in said and "CUB_200_2011/images.txt" in said
    there = bench(
        "cub_200", data_root=trees / "cub_200", backbone=NAME, output=tmp_path / "out", dry_run=True
    )
    assert there.estimate.num_images > 2 and "missing" not in printed(there)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtefactError, match=r"CUB_200_2011/images\.txt"):
        bench("cub_200", data_root=tmp_path, backbone=NAME, output=tmp_path / "out")
    with pytest.raises(InputError, match=r"the board 'cub' .*"):
        bench("cub", data_root=tmp_path, output=tmp_path / "out")


def test_features_of_a_miniature_are_in_the_order_of_its_catalog(trees, tmp_path):
    bench("roxford", data_root=trees / "roxford", backbone=NAME, output=tmp_path, adapt=False)
    opened = FeatureSet.open(tmp_path / "features")
    images = opened.catalog.strings("image")
    assert len(images) == 3 * 8 and len({*map(bytes, np.asarray(opened.rows))}) == 8  # each is computed once
