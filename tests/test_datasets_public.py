"""Public data sets: miniatures in their official layouts are read, broken ones refused with what to do."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

import miniatures
from line import samething
from samething.catalog import BOX_COLUMNS, Catalog
from samething.datasets import DATASETS, Dropped, Published, catalog, datasets, read_dataset
from samething.datasets.boxes import box_columns
from samething.datasets.public import find_dataset
from samething.datasets.uned import DOMAINS, splits
from samething.errors import ArtefactError, InputError, SamethingError
from samething.images import decode


def rows(listing) -> list[tuple[str, str, str, str]]:
    """Image, label, domain and role of each row, the data set's own prefix left off."""
    table = listing.catalog.table
    return list(zip(*(table[name].to_pylist() for name in ("image", "label", "domain", "role")), strict=True))


def boxes(listing) -> list[tuple[int, ...]]:
    return list(zip(*(listing.catalog.table[name].to_pylist() for name in BOX_COLUMNS), strict=True))


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A data root for each data set, with its miniature; look, but leave it as it is."""
    base = tmp_path_factory.mktemp("data roots")
    for key, build in miniatures.BUILDERS.items():
        build(base / key)
    return base


@pytest.fixture
def tree(trees, tmp_path):
    """A copy of a miniature that a test may break."""
    return lambda key: shutil.copytree(trees / key, tmp_path / key)


def test_every_data_set_has_a_miniature():
    assert {*miniatures.BUILDERS} == {*DATASETS}


@pytest.mark.parametrize("key", DATASETS)
def test_a_miniature_is_read(trees, key):
    listing = read_dataset(key, data_root=trees / key, check_files=key != "uned")
    found = listing.catalog
    assert len(found) >= 2
    assert all(decode(source).size[0] > 0 for source in found.sources), "every image can be read"
    assert all(label.startswith(f"{key}/") for label in found.strings("label"))
    domain = DATASETS[key].domain
    assert domain == "several" or found.domains == [domain]
    assert listing.has_roles == DATASETS[key].has_roles
    assert listing.has_roles or {*found.strings("role")} == {"train"}
    assert not any(problem.severity == "error" for problem in found.problems(check_files=False))
    # labels are unique across domains
    pairs = {*zip(found.strings("label"), found.strings("domain"), strict=True)}
    assert len(pairs) == len({label for label, _ in pairs})


def test_labels_are_unique_across_data_sets(trees):
    owners: dict[str, str] = {}
    for key in DATASETS:
        for label in {*read_dataset(key, data_root=trees / key).catalog.strings("label")}:
            assert owners.setdefault(label, key) == key


EXPECTED = {
    "products_10k": ("products-10k/train/1000.jpg", "products_10k/0", "packaged goods", "train"),
    "gldv2": (
        "google_landmark_recognition_2021/train/1/7/6/17660ef415d37059.jpg", "gldv2/1", "landmarks", "train",
    ),
    "deep_fashion": (
        "deepfashion/train/a/id_00001/shop_01.jpg", "deep_fashion/id_00001", "apparel", "train",
    ),
    "met_art": ("met_dataset/MET/1/0.jpg", "met_art/9", "artwork", "train"),
    "shopee": ("shopee/train_images/c.jpg", "shopee/2395904891", "packaged goods", "train"),
    "hm": ("hm_personalized_fashion/images/010/0108775015.jpg", "hm/0108775", "apparel", "train"),
    "rp2k": ("rp2k/train/可口可乐/1.jpg", "rp2k/0", "packaged goods", "train"),
    "sop": ("stanford_online_products/chair_final/2_0.JPG", "sop/11319", "packaged goods", "query+index"),
    "fashion200k": (
        "fashion200k/women/dresses/casual_dresses/517/517_0.jpeg", "fashion200k/517", "apparel", "train",
    ),
    "food_rec22": ("fr22_train_v2/images/005.jpg", "food_rec22/1040", "dishes", "train"),
    "stanford_cars": ("stanford_cars/cars_train/cars_train/00001.jpg", "stanford_cars/14", "cars", "train"),
    "stanford_cars_refined": (
        "stanford_cars/cars_train/cars_train/00001.jpg", "stanford_cars_refined/14_8", "cars", "train",
    ),
    "deep_fashion2": ("deepfashion2/image/000001.jpg", "deep_fashion2/3_1", "apparel", "train"),
    "food101": ("food-101/images/apple_pie/1011328.jpg", "food101/apple_pie", "dishes", "train"),
    "furniture180": ("furniture_180/table desk/001.png", "furniture180/table desk", "furniture", "train"),
    "storefronts146": ("storefronts_146/world market/g_1.jpg", "storefronts146/1", "storefronts", "train"),
    "gpr1200": ("GPR1200/images/200_c.jpg", "gpr1200/200", "nature", "query+index"),
    "cub_200": (
        "CUB_200_2011/images/101.White_Pelican/P_0003.jpg", "cub_200/101", "birds", "query+index",
    ),
    "cars196": ("cars196/car_ims/000003.jpg", "cars196/99", "cars", "query+index"),
    "in_shop": (
        "in_shop/Img/img/WOMEN/Dresses/id_00000001/01_2_side.jpg", "in_shop/id_00000001", "apparel", "index",
    ),
    "guiec": ("guiec/query/toys/bear/1.jpg", "guiec/toys/bear", "toys", "query"),
}  # fmt: skip


@pytest.mark.parametrize("key", EXPECTED)
def test_a_row_is_what_the_official_files_say(trees, key):
    assert EXPECTED[key] in rows(read_dataset(key, data_root=trees / key))


def test_splits_of_metric_learning_are_by_class(trees):
    for key, train, test in (("cub_200", {"1", "100"}, {"101"}), ("cars196", {"1", "98"}, {"99"})):
        found = rows(read_dataset(key, data_root=trees / key))
        assert {label.split("/")[1] for _, label, _, role in found if role == "train"} == train
        assert {label.split("/")[1] for _, label, _, role in found if role == "query+index"} == test
    roles = [role for *_, role in rows(read_dataset("in_shop", data_root=trees / "in_shop"))]
    assert roles == ["train", "query", "index"]


def test_a_list_of_images_is_preferred_to_the_folders(tree):
    root = tree("furniture180")
    assert len(read_dataset("furniture180", data_root=root).catalog) == 3
    (root / "furniture_180/furniture180_train.csv").write_text("img_path,label\nsofa_sofa/001.JPG,4\n")
    assert [row[1] for row in rows(read_dataset("furniture180", data_root=root))] == ["furniture180/4"]
    root = tree("fashion200k")
    (root / "fashion200k/train.csv").write_text("img_path,img_id\nwomen/skirts/mini_skirts/88/88_0.jpeg,2\n")
    assert [row[1] for row in rows(read_dataset("fashion200k", data_root=root))] == ["fashion200k/2"]


def test_a_image_listed_twice_is_one_row(trees):
    listing = read_dataset("shopee", data_root=trees / "shopee")
    assert [row[0][-5:] for row in rows(listing)] == ["a.jpg", "b.jpg", "c.jpg"]
    assert listing.dropped == (Dropped("shopee/train_images/a.jpg", "row 2: listed before"),)


def test_a_image_listed_under_two_labels_says_so(tree):
    root = tree("products_10k")
    with (root / "products-10k/train.csv").open("a") as stream:
        stream.write("1000.jpg,1,3\n")
    (dropped,) = read_dataset("products_10k", data_root=root).dropped
    assert "with the label 'products_10k/0' and not 'products_10k/1'" in dropped.reason


# ---- M4D-35k


def test_m4d_knows_where_its_rows_come_from(trees):
    table = read_dataset("m4d_35k", data_root=trees / "m4d_35k").catalog.table
    assert table["dataset"].to_pylist() == [
        "products_10k",
        "products_10k",
        "gldv2",
        "deep_fashion",
        "stanford_cars",
    ]
    assert table["domain"].to_pylist()[2:] == ["landmarks", "apparel", "cars"]
    assert table["label"].to_pylist()[-1] == "m4d_35k/33800"


def test_m4ds_published_counts_are_in_the_table():
    found = {
        row.where.get("dataset", "all"): (row.classes, row.images) for row in DATASETS["m4d_35k"].published
    }
    assert found == {
        "products_10k": (9_500, 141_500), "gldv2": (10_000, 79_200), "deep_fashion": (14_300, 100_400),
        "stanford_cars": (1_000, 7_300), "all": (34_800, 328_400),
    }  # fmt: skip
    assert all(row.rounded_to == 100 for row in DATASETS["m4d_35k"].published)


def test_a_rounded_number_is_compared_as_rounded():
    table = pa.table({"label": [str(number % 120) for number in range(1_040)]})
    assert not Published(classes=100, images=1_000, rounded_to=100).differs(table)
    assert Published(images=1_100, rounded_to=100).differs(table)
    assert Published(classes=121).differs(table)


# ---- boxes


def test_boxes_have_their_margin_and_end_at_the_image(trees):
    found = boxes(read_dataset("food_rec22", data_root=trees / "food_rec22"))
    # 2 % of 50 × 25 are 1 and half a pixel; the first box reaches the right edge of an image of 60 × 40
    assert found == [(9, 10, 60, 36), (0, 0, 10, 10), (5, 5, 26, 15)]
    wide = boxes(read_dataset("food_rec22", data_root=trees / "food_rec22", margin=20.0))
    assert wide[1] == (0, 0, 12, 12)
    assert boxes(read_dataset("food_rec22", data_root=trees / "food_rec22", margin=0.0))[0] == (
        10,
        10,
        60,
        35,
    )


def test_items_without_a_style_are_no_pair_and_left_out(trees):
    listing = read_dataset("deep_fashion2", data_root=trees / "deep_fashion2")
    assert [label for _, label, *_ in rows(listing)] == [
        "deep_fashion2/3_1",
        "deep_fashion2/3_2",
        "deep_fashion2/3_1",
    ]
    assert boxes(listing)[0] == (9, 10, 41, 30)
    assert boxes(listing)[2] == (0, 0, 52, 26)
    assert listing.catalog.table.schema.field("box_left").type == pa.int32()
    assert listing.dropped == ()


def test_box_columns_against_the_papers_cropping():
    """The paper's own arithmetic, a box at a time: offset, the image's edges, rounding as Pillow does."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(0, 200, (500, 2))
    given = np.concatenate([corners, corners + generator.uniform(1, 300, (500, 2))], axis=1)
    size = np.ceil(given[:, 2:] + generator.uniform(0, 3, (500, 2)))
    expected = []
    for (left, top, right, bottom), (width, height) in zip(given, size, strict=True):
        across, down = (right - left) * 0.02, (bottom - top) * 0.02
        crop = (
            max(left - across, 0),
            max(top - down, 0),
            min(right + across, width),
            min(bottom + down, height),
        )
        expected.append(tuple(map(int, map(round, crop))))
    found = box_columns(given, margin_percent=2.0, size=size)
    assert list(zip(*(found[name].to_pylist() for name in BOX_COLUMNS), strict=True)) == expected


# ---- UnED


def of_domain(listing, domain: str) -> list[dict[str, object]]:
    return [row for row in listing.catalog.table.to_pylist() if row["domain"] == domain]


def test_uned_has_eight_domains_and_the_official_roles(trees):
    listing = read_dataset("uned", data_root=trees / "uned")
    assert listing.catalog.domains == sorted(DOMAINS)
    roles = {domain: {row["split"]: row["role"] for row in of_domain(listing, domain)} for domain in DOMAINS}
    both = {"train": "train", "val": "val", "test": "query+index"}
    apart = {"train": "train", "val": "val", "test": "query", "index": "index"}
    assert roles == {
        "cars": both, "sop": both, "inat": both, "food2k": both, "rp2k": both,
        "inshop": apart, "met": apart, "gldv2": apart,
    }  # fmt: skip


def test_uned_queries_may_have_several_labels(trees):
    found = {
        row["image"].split("/")[-1]: row
        for row in of_domain(read_dataset("uned", data_root=trees / "uned"), "gldv2")
    }
    assert found["q.jpg"]["label"] == "uned/gldv2/test/10"
    assert found["q.jpg"]["labels"] == ["uned/gldv2/test/10", "uned/gldv2/test/11"]
    assert found["r.jpg"]["label"] == "uned/gldv2/test/12" and found["r.jpg"]["labels"] is None
    assert found["i.jpg"]["label"] == "uned/gldv2/test/10"
    assert found["j.jpg"]["label"] == "uned/gldv2/test/of no class/gldv2/images/index/0/0/j.jpg"
    assert found["a.jpg"]["label"] == "uned/gldv2/train/0", "training numbers its classes on its own"
    schema = read_dataset("uned", data_root=trees / "uned", domains=("cars",)).catalog.table.schema
    assert schema.field("labels").type == pa.list_(pa.string())


def test_the_mets_index_is_its_training_set(trees):
    found = of_domain(read_dataset("uned", data_root=trees / "uned"), "met")
    index = {(row["image"], row["label"]) for row in found if row["role"] == "index"}
    assert index == {(row["image"], row["label"]) for row in found if row["role"] == "train"}
    assert len(index) == 2


def test_a_part_of_uned_leaves_the_other_files_unread(tree):
    root = tree("uned")
    for path in (root / "uned/info_files").glob("*/*.json"):
        if path.stem not in ("val", "small_index"):
            path.unlink()
    listing = read_dataset("uned", data_root=root, part="val")
    roles = {domain: {row["split"]: row["role"] for row in of_domain(listing, domain)} for domain in DOMAINS}
    assert roles["met"] == {"val": "query", "small_index": "index"}
    assert roles["gldv2"] == roles["cars"] == {"val": "query+index"}
    with pytest.raises(ArtefactError, match=r"cars/test\.json"):
        read_dataset("uned", data_root=root, part="test")


def test_some_domains_of_uned_will_do(tree):
    root = tree("uned")
    for domain in {*DOMAINS} - {"cars", "met"}:
        shutil.rmtree(root / "uned/info_files" / domain)
    assert read_dataset("uned", data_root=root, domains=("met", "cars")).catalog.domains == ["cars", "met"]
    with pytest.raises(ArtefactError, match=r"sop/train\.json") as caught:
        read_dataset("uned", data_root=root)
    assert "--domain cars,met" in caught.value.next_step
    with pytest.raises(InputError, match="UnED has no domain planes"):
        read_dataset("uned", data_root=root, domains=("planes",))


def test_uneds_escaped_names_are_found(tree):
    root = tree("uned")
    read = lambda: {row["image"] for row in of_domain(read_dataset("uned", data_root=root), "rp2k")}  # noqa: E731
    assert "uned/images/rp2k/all/train/#U53ef#U4e50/1.jpg" in read()
    folder = root / "uned/images/rp2k/all/train"
    (folder / "#U53ef#U4e50").rename(folder / "可乐")
    assert "uned/images/rp2k/all/train/可乐/1.jpg" in read()


def test_uned_with_the_key_class(tree):
    root = tree("uned")
    path = root / "uned/info_files/cars/test.json"
    path.write_text(json.dumps([{"domain": 0, "class": 3, "path": "cars/car_ims/000004.jpg"}]))
    (row,) = read_dataset("uned", data_root=root, domains=("cars",), part="test").catalog.table.to_pylist()
    assert row["label"] == "uned/cars/test/3"


def test_uneds_published_sizes():
    assert sum(row.train_classes for row in DOMAINS.values()) == 316_446
    assert sum(row.sizes["train"] for row in DOMAINS.values()) == 2_831_222
    assert {name for name in DOMAINS if "index" in splits(name, "test")} == {"inshop", "met", "gldv2"}


# ---- ILIAS


def test_ilias_has_queries_positives_and_distractors(trees):
    core = rows(read_dataset("ilias_core", data_root=trees / "ilias_core"))
    assert [role for *_, role in core] == ["query", "query", "index", "index", "index"]
    assert core[2][:2] == ("ilias/ilias_core/bold_bimp_000/pos/P000_00.jpg", "ilias_core/bold_bimp_000")
    whole = rows(read_dataset("ilias", data_root=trees / "ilias"))
    assert len(whole) == 5 + 6
    assert whole[-1][0] == "tar://12ab.jpg::ilias/yfcc100m/yfcc100m_00001.tar"
    assert whole[-1][3] == "index"
    assert len({label for _, label, *_ in whole[5:]}) == 6, "a distractor is a thing of its own"
    mini = [image for image, *_ in rows(read_dataset("mini_ilias", data_root=trees / "mini_ilias"))][5:]
    assert mini == [
        "tar://01ab.jpg::ilias/yfcc100m/yfcc100m_00000.tar",
        "tar://12ab.jpg::ilias/yfcc100m/yfcc100m_00001.tar",
    ]


def test_iliass_shards_may_be_unpacked(tree):
    root = tree("mini_ilias")
    for path in (root / "ilias/yfcc100m").glob("*.tar"):
        shutil.unpack_archive(path, path.with_suffix(""))
        path.unlink()
    listing = read_dataset("mini_ilias", data_root=root, check_files=True)
    assert len(listing.catalog) == 5 + 2 and listing.dropped == ()


def test_a_shard_that_is_cut_off(tree):
    root = tree("ilias")
    path = root / "ilias/yfcc100m/yfcc100m_00001.tar"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(
        InputError, match=r"yfcc100m_00001\.tar: is no whole, uncompressed tar file"
    ) as caught:
        read_dataset("ilias", data_root=root)
    assert "download_ilias.sh" in caught.value.next_step


def test_a_list_that_fits_no_shard(tree):
    root = tree("mini_ilias")
    (root / "ilias/image_ids/mini_ilias_yfcc100m_ids.txt").write_text("nothing\n")
    with pytest.raises(InputError, match="its 2 shards hold none of the images"):
        read_dataset("mini_ilias", data_root=root)


def test_unlabelled_images_of_ones_own_benchmark_are_distractors(trees):
    found = rows(read_dataset("guiec", data_root=trees / "guiec"))
    assert ("guiec/index/noise.png", "guiec/distractor/guiec/index/noise.png", "guiec", "index") in found
    assert (
        "guiec/index/toys/loose.jpg",
        "guiec/distractor/guiec/index/toys/loose.jpg",
        "toys",
        "index",
    ) in found


# ---- broken trees


def refusal(key: str, root) -> SamethingError:
    """The error of reading, which names the data set, where to get it and its licence."""
    with pytest.raises(SamethingError) as caught:
        read_dataset(key, data_root=root)
    dataset = DATASETS[key]
    assert caught.value.given.startswith(dataset.title)
    for words in (dataset.get, dataset.source, dataset.licence):
        assert words in caught.value.next_step
    assert "\n" not in caught.value.given
    return caught.value


PROMISED = [(key, name) for key, dataset in DATASETS.items() for name in dataset.files]


@pytest.mark.parametrize(("key", "name"), PROMISED, ids="-".join)
def test_a_missing_file_or_folder_is_named(tree, key, name):
    root = tree(key)
    path = root / name
    if name.endswith("/"):
        shutil.rmtree(path)
    else:
        path.unlink()
    error = refusal(key, root)
    assert isinstance(error, ArtefactError)
    assert str(path) in error.given and "not exist" in error.given
    assert name in error.expected


@pytest.mark.parametrize("key", [key for key in DATASETS if key not in ("guiec", "gpr1200", "furniture180")])
def test_missing_images_are_noticed_without_looking_for_all(tree, key):
    root = tree(key)
    removed = 0
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            path.unlink()
            removed += 1
    if key in ("ilias", "mini_ilias"):
        for path in (root / "ilias/yfcc100m").iterdir():
            path.write_bytes(b"")
    assert removed
    error = refusal(key, root)
    assert "images looked for is there" in error.given or "is no whole" in error.given


MALFORMED = [
    ("products_10k", "products-10k/train.csv", "name,class,group\n1000.jpg,,3\n", "row 0 has no label"),
    ("products_10k", "products-10k/train.csv", "name,class,group\n,4,3\n", "row 0 has no image"),
    ("products_10k", "products-10k/train.csv", "name,class,group\na.jpg,4\n", "Expected 3 columns, got 2"),
    ("products_10k", "products-10k/train.csv", "name,group\n1000.jpg,3\n", "without class"),
    ("products_10k", "products-10k/train.csv", "name,class,group\n", "lists no images"),
    ("products_10k", "products-10k/train.csv", "", "without name, class"),
    (
        "gldv2",
        "google_landmark_recognition_2021/train.csv",
        "id,landmark_id\nab,1\n",
        "row 0 has the id 'ab'",
    ),
    ("deep_fashion", "deepfashion/deepfashion_train.json", '{"g": {"id": "x"}}', "item 'id' of 'g' is 'x'"),
    ("deep_fashion", "deepfashion/deepfashion_train.json", '{"g": [1]}', "group 'g' is [1]"),
    ("deep_fashion", "deepfashion/deepfashion_train.json", '{"g": ', "is not JSON"),
    (
        "met_art",
        "met_dataset/ground_truth/MET_database.json",
        '[{"id": 1, "path": "a"}, {"id": 2}]',
        "entry 1 is",
    ),
    (
        "met_art",
        "met_dataset/ground_truth/MET_database.json",
        '[{"id": 1, "path": "a"}',
        "is not JSON",
    ),
    (
        "met_art",
        "met_dataset/ground_truth/MET_database.json",
        '[{"id": 1, "path": "a"}, {"i',
        "is not JSON",
    ),
    ("met_art", "met_dataset/ground_truth/MET_database.json", '[{"id": 1, "path": "a"}, 4]', "entry 1 is 4"),
    ("met_art", "met_dataset/ground_truth/MET_database.json", '{"id": 1}', "is no list"),
    ("shopee", "shopee/train.csv", "posting_id,image\nt,a.jpg\n", "without label_group"),
    (
        "hm",
        "hm_personalized_fashion/articles.csv",
        "article_id,product_code\n108775015,1\n",
        "row 0 has the article",
    ),
    ("rp2k", "rp2k/train.csv", "img_path,img_id\na/1.jpg,\n", "row 0 has no label"),
    (
        "sop",
        "stanford_online_products/Ebay_train.txt",
        "image_id class_id super_class_id path\n1 1 a.JPG\n",
        "line 2 is",
    ),
    ("sop", "stanford_online_products/Ebay_train.txt", "h\n1 x 1 a.JPG\n", "line 2 has the class 'x'"),
    ("sop", "stanford_online_products/Ebay_train.txt", "h\n", "lists no images"),
    ("fashion200k", "fashion200k/labels/dress_train_detect_all.txt", "women/1.jpeg 0.9 dress\n", "line 1 is"),
    ("food_rec22", "fr22_train_v2/annotations.json", '{"images": []}', "has no list annotations"),
    (
        "food_rec22",
        "fr22_train_v2/annotations.json",
        '{"images": [{"id": 1}], "annotations": []}',
        "entry 0 of images",
    ),
    (
        "food_rec22",
        "fr22_train_v2/annotations.json",
        '{"images": [], "annotations": [{"image_id": 3}]}',
        "annotation 0",
    ),
    (
        "food_rec22",
        "fr22_train_v2/annotations.json",
        '{"images": [{"id": 3, "file_name": "a"}],'
        ' "annotations": [{"image_id": 3, "category_id": 1, "bbox": [1, 2]}]}',
        "annotation 0",
    ),
    ("stanford_cars", "stanford_cars/sc_train.csv", "image,Klasse\n1.jpg,1\n", "without Label"),
    (
        "stanford_cars_refined",
        "stanford_cars/refined_train.csv",
        "image,Class\n1.jpg,\n",
        "row 0 has no label",
    ),
    (
        "deep_fashion2",
        "deepfashion2/annos/000001.json",
        '{"pair_id": 1, "item1": {"style": 1}}',
        "cannot be used",
    ),
    ("deep_fashion2", "deepfashion2/annos/000001.json", "[]", "cannot be used"),
    ("food101", "food-101/meta/test.json", '{"pie": [1]}', "class 'pie' is [1]"),
    (
        "storefronts146",
        "storefronts_146/storefronts146_train.csv",
        "img_path,label\na,\n",
        "row 0 has no label",
    ),
    ("m4d_35k", "m4d-35k_train.csv", "img_path,label\nother/a.jpg,1\n", "row 0 has the path 'other/a.jpg'"),
    ("uned", "uned/info_files/met/index.json", '[{"path": "met/MET/a.jpg"}]', "entry 0 is"),
    ("uned", "uned/info_files/met/index.json", '[{"path": "met/MET/a.jpg", "class_id": 1},]]', "is not JSON"),
    ("uned", "uned/info_files/met/index.json", "[]", "lists no images"),
    ("uned", "uned/info_files/gldv2/test.json", '[{"path": "a.jpg", "class_id": [[1]]}]', "entry 0 is"),
    ("ilias_core", "ilias/image_ids/positive_ids.txt", "bold_bimp_000/P000.jpg,1\n", "line 1 is"),
    ("gpr1200", "GPR1200/images/1200_a.jpg", "", "holds 1200_a.jpg"),
    ("gpr1200", "GPR1200/images/a.jpg", "", "holds a.jpg"),
    ("cub_200", "CUB_200_2011/image_class_labels.txt", "1 1\n2 100\n", "has no class for the image 3"),
    ("cub_200", "CUB_200_2011/image_class_labels.txt", "1 1\n2 100\n3 bird\n", "has the class 'bird'"),
    ("cub_200", "CUB_200_2011/images.txt", "1 a b\n", "line 1 is '1 a b'"),
    ("cars196", "cars196/cars_annos.mat", "no MATLAB file", "cannot be read"),
    ("roxford", "roxford5k/gnd_roxford5k.mat", "no MATLAB file", "cannot be read"),
    ("rparis", "rparis6k/gnd_rparis6k.mat", "", "cannot be read"),
    ("instre", "instre/gnd_instre.mat", "no MATLAB file", "cannot be read"),
    ("forb", "forb/metadata/currency_gt.ndjson", '{"query_image": "a.jpg"}', "line 1 is"),
    (
        "in_shop",
        "in_shop/Eval/list_eval_partition.txt",
        "5\nh\na.jpg id_1 train\n",
        "says 5 images and lists 1",
    ),
    (
        "in_shop",
        "in_shop/Eval/list_eval_partition.txt",
        "1\nh\na.jpg id_1 other\n",
        "line 3 has the status 'other'",
    ),
    ("guiec", "guiec/query/loose.jpg", "", "holds guiec/query/loose.jpg"),
    ("furniture180", "furniture_180/furniture180_train.csv", "img_path\na\n", "without label"),
    ("ilias", "ilias/image_ids/image_query_ids.txt", "P000.jpg\n", "line 1 is"),
    ("mini_ilias", "ilias/image_ids/image_query_ids.txt", "", "lists no images"),
]


def test_every_reader_meets_a_malformed_file():
    assert {key for key, *_ in MALFORMED} == {*DATASETS}


@pytest.mark.parametrize(("key", "name", "content", "words"), MALFORMED, ids=lambda value: str(value)[:30])
def test_a_malformed_file_is_refused_with_the_place(tree, key, name, content, words):
    root = tree(key)
    (root / name).write_text(content)
    error = refusal(key, root)
    assert isinstance(error, InputError)
    assert words in error.given
    assert error.expected


def test_bytes_that_are_no_text(tree):
    root = tree("sop")
    (root / "stanford_online_products/Ebay_test.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refusal("sop", root).given
    root = tree("hm")
    (root / "hm_personalized_fashion/articles.csv").write_bytes(b"article_id,product_code\n\xff\xfe,1\n")
    assert "cannot be read" in refusal("hm", root).given


@pytest.mark.parametrize("key", ["guiec", "gpr1200", "furniture180"])
def test_folders_without_images(tree, key):
    root = tree(key)
    for path in root.rglob("*.*"):
        path.unlink()
    assert "images" in refusal(key, root).given


def test_missing_label_files(tree):
    root = tree("fashion200k")
    (root / "fashion200k/labels/top_train_detect_all.txt").unlink()
    assert "top_train_detect_all.txt does not exist" in refusal("fashion200k", root).given
    shutil.rmtree(root / "fashion200k/labels")
    assert "fashion200k/train.csv" in refusal("fashion200k", root).given


def test_boxes_in_which_nothing_is_to_be_seen(tree):
    root = tree("food_rec22")
    content = miniatures.coco()
    # beyond the right edge, and less than half a pixel wide
    content["annotations"][0]["bbox"], content["annotations"][1]["bbox"] = [70, 0, 5, 5], [1, 1, 0.4, 9]
    miniatures.jsonl(root / "fr22_train_v2/annotations.json", content)
    assert boxes(read_dataset("food_rec22", data_root=root)) == [(5, 5, 26, 15)]
    content["annotations"] = content["annotations"][:2]
    miniatures.jsonl(root / "fr22_train_v2/annotations.json", content)
    assert "nothing that can be seen" in refusal("food_rec22", root).given


# ---- what is missing, what is asked for


def test_some_missing_images_are_a_warning_and_a_reason_when_all_are_looked_for(tree):
    root = tree("hm")
    (root / "hm_personalized_fashion/images/011/0110065001.jpg").unlink()
    listing = read_dataset("hm", data_root=root)
    assert len(listing.catalog) == 3
    assert any("1 are missing" in line and "--check-files" in line for line in listing.warnings)
    listing = read_dataset("hm", data_root=root, check_files=True)
    assert len(listing.catalog) == 2
    assert listing.dropped == (
        Dropped("hm_personalized_fashion/images/011/0110065001.jpg", "row 2: does not exist"),
    )


def test_other_numbers_than_the_published_ones_are_a_warning(trees):
    (warning,) = read_dataset("food101", data_root=trees / "food101").warnings
    assert warning == (
        "Food-101 (test part), in all: 101 classes, 25,250 images are published; "
        "here there are 2 classes, 3 images"
    )


def test_parts(trees):
    for part, roles in (
        ("train", {"train"}),
        ("test", {"query", "index"}),
        ("all", {"train", "query", "index"}),
    ):
        found = read_dataset("in_shop", data_root=trees / "in_shop", part=part)
        assert {*found.catalog.strings("role")} == roles
    with pytest.raises(InputError, match="no rows for --part val") as caught:
        read_dataset("in_shop", data_root=trees / "in_shop", part="val")
    assert "index, query, train" in caught.value.expected


@pytest.mark.parametrize(
    ("key", "options", "words"),
    [
        ("hm", {"margin": 2.0}, "--margin 2 for H&M"),
        ("food_rec22", {"margin": -1.0}, "--margin -1"),
        ("hm", {"domains": ("apparel",)}, "which is all apparel"),
        ("no_such", {}, "there is no data set 'no_such'"),
    ],
)
def test_arguments_that_do_not_fit(trees, key, options, words):
    with pytest.raises(InputError, match=words):
        read_dataset(key, data_root=trees, **options)


def test_a_misspelt_key_is_recognised():
    with pytest.raises(InputError, match="cub-200") as caught:
        find_dataset("cub-200")
    assert "cub_200" in caught.value.next_step


# ---- the commands


def test_the_list_says_everything_and_what_is_here(trees):
    done = samething("datasets", "--data-root", trees / "sop")
    assert done.returncode == 0, done.stderr
    for dataset in DATASETS.values():
        for words in (dataset.key, dataset.domain, dataset.licence, dataset.source):
            assert words in done.stdout
        if dataset.images is not None:
            assert f"{dataset.images:,}" in done.stdout
    present = [line.split()[0] for line in done.stdout.splitlines() if line.endswith("present")]
    assert present == ["sop"]


def test_one_data_set_in_full(tree):
    root = tree("sop")
    (root / "stanford_online_products/Ebay_test.txt").unlink()
    report = datasets("sop", data_root=root)
    assert report.rows[0].state == "in part"
    assert report.rows[0].missing == ("stanford_online_products/Ebay_test.txt",)
    done = samething("datasets", "sop", "--data-root", root)
    assert "Ebay_test.txt missing" in done.stdout
    assert "11,318 classes, 59,551 images" in done.stdout
    assert datasets("sop").rows[0].state == "?"
    with pytest.raises(ArtefactError, match="is not a folder"):
        datasets(data_root=root / "nothing")


def test_a_catalog_of_a_public_data_set(trees, tmp_path):
    done = samething(
        "catalog", "--dataset", "in_shop", "--data-root", trees / "in_shop", "-o", tmp_path / "c.parquet"
    )
    assert done.returncode == 0, done.stderr
    assert "are published; here there are" in done.stdout
    read = Catalog.read(tmp_path / "c.parquet")
    assert read.table["sha256"].null_count == 3, "no image is opened unless asked for"
    assert all(path.is_file() for path in read.paths)
    report = catalog(
        dataset="in_shop", data_root=trees / "in_shop", checksums=True, output=tmp_path / "d.parquet"
    )
    assert report.catalog.table["width"].to_pylist() == [60, 60, 60]
    assert report.exit_status == 0


def test_a_public_training_set_is_divided_by_class(tree, tmp_path):
    root = tree("products_10k")
    lines = [f"{number // 2}.jpg,{number // 4},0" for number in range(0, 80, 2)]
    (root / "products-10k/train.csv").write_text("\n".join(["name,class,group", *lines]))
    for number in range(40):
        miniatures.image(root / "products-10k/train" / f"{number}.jpg", number)
    report = catalog(dataset="products_10k", data_root=root, checksums=True, output=tmp_path / "c.parquet")
    assert {row["role"]: row["instances"] for row in report.counts} == {
        "train": 14,
        "val": 2,
        "query+index": 4,
    }
    report = catalog(dataset="products_10k", data_root=root, val=0.0, test=0.0, output=tmp_path / "d.parquet")
    assert {row["role"]: row["instances"] for row in report.counts} == {"train": 20}
    assert (
        report.path.read_bytes()
        == catalog(
            dataset="products_10k", data_root=root, val=0.0, test=0.0, output=tmp_path / "e.parquet"
        ).path.read_bytes()
    )


def test_boxes_are_in_the_file_and_no_image_is_written(tree, tmp_path):
    root = tree("food_rec22")
    before = sorted(root.rglob("*"))
    report = catalog(dataset="food_rec22", data_root=root, checksums=True, output=tmp_path / "c.parquet")
    table = Catalog.read(report.path).table
    assert [table[name][0].as_py() for name in BOX_COLUMNS] == [9, 10, 60, 36]
    assert not any("listed twice" in line for line in report.warnings)
    assert sorted(root.rglob("*")) == before


def test_one_domain_of_several(trees, tmp_path):
    report = catalog(
        dataset="uned", data_root=trees / "uned", domain="met, gldv2", part="test", output=tmp_path / "c"
    )
    assert report.catalog.domains == ["gldv2", "met"]
    assert (
        Catalog.read(report.path)
        .table["labels"]
        .to_pylist()
        .count(["uned/gldv2/test/10", "uned/gldv2/test/11"])
        == 1
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dataset": "sop"},
        {"source": "x", "dataset": "sop", "data_root": "x"},
        {"dataset": "sop", "data_root": "x", "root": "x"},
        {"dataset": "sop", "data_root": "x", "labels": "none"},
        {"source": "x", "checksums": True},
        {"source": "x", "part": "test"},
    ],
    ids=str,
)
def test_arguments_that_exclude_each_other(trees, tmp_path, options):
    paths = {name: trees / "sop" for name in ("source", "data_root", "root") if name in options}
    with pytest.raises(InputError, match=r"SOURCE|--data-root"):
        catalog(**{**options, **paths}, output=tmp_path / "c.parquet")
