"""Public data sets of a few images each, in their exact official layouts."""

from __future__ import annotations

import csv
import functools
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image


@functools.cache
def _bytes(suffix: str, number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 255, (40, 60, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG" if suffix == ".png" else "JPEG")
    return buffer.getvalue()


def image(path: Path, number: int = 0) -> None:
    """An image of 60 × 40 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_bytes(path.suffix, number))


def table(path: Path, lines: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(lines)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def jsonl(path: Path, content: object) -> None:
    text(path, json.dumps(content, ensure_ascii=False))


def products_10k(root: Path) -> None:
    folder = root / "products-10k"
    rows = [["1000.jpg", 0, 3], ["1001.jpg", 0, 3], ["1002.jpg", 1, 3], ["1003.jpg", 1, 3]]
    table(folder / "train.csv", [["name", "class", "group"], *rows])
    for name, *_ in rows:
        image(folder / "train" / name)


def gldv2(root: Path) -> None:
    folder = root / "google_landmark_recognition_2021"
    rows = [["17660ef415d37059", 1], ["92b6290d571448f6", 1], ["cd41bf948edc0340", 203_093]]
    table(folder / "train.csv", [["id", "landmark_id"], *rows])
    for name, _ in rows:
        image(folder / "train" / name[0] / name[1] / name[2] / f"{name}.jpg")


def deep_fashion(root: Path) -> None:
    folder = root / "deepfashion"
    items = {"group0": {"id_00001": ["train/a/id_00001/shop_01.jpg", "train/a/id_00001/comsumer_01.jpg"]},
             "group1": {"id_00002": ["train/b/id_00002/shop_01.jpg"]}}  # fmt: skip
    jsonl(folder / "deepfashion_train.json", items)
    for group in items.values():
        for paths in group.values():
            for path in paths:
                image(folder / path)


def met_art(root: Path) -> None:
    folder = root / "met_dataset"
    entries = [{"id": 7, "path": "0/0.jpg"}, {"id": 7, "path": "0/1.jpg"}, {"id": 9, "path": "MET/1/0.jpg"}]
    jsonl(folder / "ground_truth" / "MET_database.json", entries)
    for name in ("0/0.jpg", "0/1.jpg", "1/0.jpg"):
        image(folder / "MET" / name)


def shopee(root: Path) -> None:
    folder = root / "shopee"
    header = ["posting_id", "image", "image_phash", "title", "label_group"]
    rows = [["train_1", "a.jpg", "94974f937d4c2433", 'Paper "Bag", blue', 249114794],
            ["train_2", "b.jpg", "af3f9460c2838f0f", "Double Tape\nVHB", 249114794],
            ["train_3", "a.jpg", "94974f937d4c2433", "Paper bag", 249114794],
            ["train_4", "c.jpg", "b94cb00ed3e50f78", "Maling TTS", 2395904891]]  # fmt: skip
    table(folder / "train.csv", [header, *rows])
    for name in "abc":
        image(folder / "train_images" / f"{name}.jpg")


def hm(root: Path) -> None:
    folder = root / "hm_personalized_fashion"
    rows = [
        ["0108775015", "0108775", "Strap top"],
        ["0108775044", "0108775", "Strap top"],
        ["0110065001", "0110065", "Bra"],
    ]
    table(folder / "articles.csv", [["article_id", "product_code", "prod_name"], *rows])
    for name, *_ in rows:
        image(folder / "images" / name[:3] / f"{name}.jpg")


def rp2k(root: Path) -> None:
    folder = root / "rp2k"
    rows = [["可口可乐/1.jpg", 0], ["可口可乐/2.jpg", 0], ["other/3.jpg", 1]]
    table(folder / "train.csv", [["img_path", "img_id"], *rows])
    for name, _ in rows:
        image(folder / "train" / name)


def sop(root: Path) -> None:
    folder = root / "stanford_online_products"
    header = "image_id class_id super_class_id path\n"
    text(folder / "Ebay_train.txt", header + "1 1 1 bicycle_final/1_0.JPG\n2 1 1 bicycle_final/1_1.JPG\n")
    text(
        folder / "Ebay_test.txt",
        header + "59552 11319 1 chair_final/2_0.JPG\n59553 11319 1 chair_final/2_1.JPG\n",
    )
    for name in ("bicycle_final/1_0", "bicycle_final/1_1", "chair_final/2_0", "chair_final/2_1"):
        image(folder / f"{name}.JPG")


def fashion200k(root: Path) -> None:
    folder = root / "fashion200k"
    names = ["women/dresses/casual_dresses/517/517_0.jpeg", "women/dresses/casual_dresses/517/517_1.jpeg"]
    text(
        folder / "labels/dress_train_detect_all.txt", "".join(f"{name}\t0.91\tblue dress\n" for name in names)
    )
    others = ["women/jackets/j/1/1_0.jpeg", "women/pants/p/2/2_0.jpeg",
              "women/skirts/mini_skirts/88/88_0.jpeg", "women/tops/t/3/3_0.jpeg"]  # fmt: skip
    for kind, name in zip(("jacket", "pants", "skirt", "top"), others, strict=True):
        text(folder / f"labels/{kind}_train_detect_all.txt", f"{name}\t0.5\tred {kind}\n")
    for name in (*names, *others):
        image(folder / name)


def coco() -> dict[str, object]:
    return {
        "images": [
            {"id": 5, "file_name": "005.jpg", "width": 60, "height": 40},
            {"id": 6, "file_name": "006.jpg", "width": 60, "height": 40},
        ],
        "categories": [{"id": 1040, "name": "espresso"}, {"id": 2099, "name": "salad"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 5,
                "category_id": 1040,
                "bbox": [10, 10, 50, 25],
                "segmentation": [[1, 2, 3]],
            },
            {"id": 2, "image_id": 5, "category_id": 2099, "bbox": [0, 0, 10, 10], "segmentation": []},
            {"id": 3, "image_id": 6, "category_id": 1040, "bbox": [5.0, 5.0, 20.5, 10.0], "segmentation": []},
            {"id": 4, "image_id": 6, "category_id": 1040, "bbox": [5.0, 5.0, 0.0, 10.0], "segmentation": []},
        ],
    }


def food_rec22(root: Path) -> None:
    jsonl(root / "fr22_train_v2/annotations.json", coco())
    for name in ("005", "006"):
        image(root / "fr22_train_v2/images" / f"{name}.jpg")


def stanford_cars(root: Path) -> None:
    folder = root / "stanford_cars"
    rows = [[0, 39, 116, 569, 375, 14, "00001.jpg"], [1, 36, 116, 868, 587, 3, "00002.jpg"]]
    table(folder / "sc_train.csv", [["", "x1", "y1", "x2", "y2", "Class", "image"], *rows])
    for row in rows:
        image(folder / "cars_train/cars_train" / str(row[-1]))


def stanford_cars_refined(root: Path) -> None:
    folder = root / "stanford_cars"
    rows = [[39, 116, 569, 375, "14_8", "00001.jpg", 0.93], [36, 116, 868, 587, "3_0", "00002.jpg", 0.95]]
    table(folder / "refined_train.csv", [["x1", "y1", "x2", "y2", "Class", "image", "Probability"], *rows])
    for row in rows:
        image(folder / "cars_train/cars_train" / str(row[-2]))


def deep_fashion2(root: Path) -> None:
    folder = root / "deepfashion2"
    item = {"segmentation": [[1, 2]], "landmarks": [1, 2, 0], "category_name": "vest", "category_id": 5}
    first = {"source": "user", "pair_id": 3, "item1": {**item, "style": 1, "bounding_box": [10, 10, 40, 30]},
             "item2": {**item, "style": 0, "bounding_box": [0, 0, 5, 5]},
             "item3": {**item, "style": 2, "bounding_box": [0, 0, 55, 39]}}  # fmt: skip
    second = {"source": "shop", "pair_id": 3, "item1": {**item, "style": 1, "bounding_box": [1, 1, 51, 26]}}
    for number, content in ((1, first), (2, second)):
        jsonl(folder / "annos" / f"{number:06}.json", content)
        image(folder / "image" / f"{number:06}.jpg")


def food101(root: Path) -> None:
    classes = {"apple_pie": ["apple_pie/1011328", "apple_pie/101251"], "waffles": ["waffles/1"]}
    jsonl(root / "food-101/meta/test.json", classes)
    for entries in classes.values():
        for entry in entries:
            image(root / "food-101/images" / f"{entry}.jpg")


def furniture180(root: Path) -> None:
    for name in ("sofa_sofa/001.JPG", "sofa_sofa/002.jpg", "table desk/001.png"):
        image(root / "furniture_180" / name)


def storefronts146(root: Path) -> None:
    rows = [
        ["7-Eleven/google_in_london_1.jpg", 0],
        ["7-Eleven/google_in_london_2.jpg", 0],
        ["world market/g_1.jpg", 1],
    ]
    table(root / "storefronts_146/storefronts146_train.csv", [["img_path", "label"], *rows])
    for name, _ in rows:
        image(root / "storefronts_146" / name)


def m4d_35k(root: Path) -> None:
    rows = [["products-10k/train/1000.jpg", 0], ["products-10k/train/1001.jpg", 0],
            ["google_landmark_recognition_2021/train/1/7/6/17660ef415d37059.jpg", 9500],
            ["deepfashion/train/a/id_00001/shop_01.jpg", 19500],
            ["stanford_cars/cars_train/cars_train/00001.jpg", 33800]]  # fmt: skip
    table(root / "m4d-35k_train.csv", [["img_path", "label"], *rows])
    for name, _ in rows:
        image(root / name)


UNED = {
    "cars": {"train": [("cars/car_ims/000001.jpg", 0), ("cars/car_ims/000002.jpg", 0)],
             "val": [("cars/car_ims/000003.jpg", 0)], "test": [("cars/car_ims/000004.jpg", 0)]},
    "sop": {"train": [("sop/chair_final/1.JPG", 5)], "val": [("sop/chair_final/2.JPG", 6)],
            "test": [("sop/chair_final/3.JPG", 7), ("sop/chair_final/4.JPG", 7)]},
    "inshop": {split: [(f"deepfashion/inshop/img/WOMEN/{n}.jpg", min(n, 2))]
               for n, split in enumerate(("train", "val", "test", "index"))},
    "inat": {split: [(f"inat/iNaturalist/train_val2018/Aves/{n}.jpg", n)]
             for n, split in enumerate(("train", "val", "test"))},
    "met": {"train": [("met/MET/0/0.jpg", 0), ("met/MET/1/0.jpg", 1)], "val": [("met/test_met/v.jpg", 0)],
            "small_index": [("met/MET/0/0.jpg", 0)], "test": [("met/test_met/t.jpg", 1)],
            "index": [("met/MET/0/0.jpg", 0), ("met/MET/1/0.jpg", 1)]},
    "gldv2": {"train": [("gldv2/images/train/0/0/a.jpg", 0)], "val": [("gldv2/images/train/0/0/b.jpg", 1)],
              "test": [("gldv2/images/test/0/0/q.jpg", [10, 11]), ("gldv2/images/test/0/0/r.jpg", [12])],
              "index": [("gldv2/images/index/0/0/i.jpg", 10), ("gldv2/images/index/0/0/j.jpg", []),
                        ("gldv2/images/index/0/0/k.jpg", 12)]},
    "food2k": {split: [(f"food2k/Food2k_complete/{n}/1.jpg", n)]
               for n, split in enumerate(("train", "val", "test"))},
    "rp2k": {"train": [("rp2k/all/train/可乐/1.jpg", 0)], "val": [("rp2k/all/train/b/2.jpg", 1)],
             "test": [("rp2k/all/test/c/3.jpg", 2)]},
}  # fmt: skip


def uned(root: Path) -> None:
    for domain, splits in UNED.items():
        for split, entries in splits.items():
            content = [{"domain": domain, "class_id": number, "path": path} for path, number in entries]
            jsonl(root / f"uned/info_files/{domain}/{split}.json", content)
            for path, _ in entries:
                image(root / "uned/images" / path.replace("可乐", "#U53ef#U4e50"))


def ilias_core(root: Path) -> None:
    folder = root / "ilias"
    queries = ["bold_bimp_000/query/Q000_00.jpg", "zippy_zootlenibble_999/query/Q999_00.jpg"]
    positives = [
        "bold_bimp_000/pos/P000_00.jpg",
        "bold_bimp_000/pos/P000_01.jpg",
        "zippy_zootlenibble_999/pos/P999_00.jpg",
    ]
    text(folder / "image_ids/image_query_ids.txt", "".join(f"{name},1\n" for name in queries))
    text(folder / "image_ids/positive_ids.txt", "".join(f"{name},0.25,12\n" for name in positives))
    for name in (*queries, *positives):
        image(folder / "ilias_core" / name)
        text((folder / "ilias_core" / name).with_suffix(".txt"), "1 2 3 4\n")


def ilias(root: Path) -> None:
    ilias_core(root)
    for shard in range(2):
        path = root / "ilias/yfcc100m" / f"yfcc100m_{shard:05}.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for number in range(3):
                for suffix, content in ((".jpg", _bytes(".jpg", number)), (".txt", b"tags")):
                    entry = tarfile.TarInfo(f"{shard}{number}ab{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def mini_ilias(root: Path) -> None:
    ilias(root)
    text(root / "ilias/image_ids/mini_ilias_yfcc100m_ids.txt", "01ab\n12ab\n")


def gpr1200(root: Path) -> None:
    for name in ("0_a.jpg", "0_b.jpg", "199_x_y.jpg", "200_c.jpg", "1199_d.jpg"):
        image(root / "GPR1200/images" / name)


def cub_200(root: Path) -> None:
    folder = root / "CUB_200_2011"
    names = [
        "001.Black_footed_Albatross/B_0001.jpg",
        "100.Brown_Pelican/P_0002.jpg",
        "101.White_Pelican/P_0003.jpg",
    ]
    text(folder / "images.txt", "".join(f"{number} {name}\n" for number, name in enumerate(names, 1)))
    text(folder / "image_class_labels.txt", "1 1\n2 100\n3 101\n")
    for name in names:
        image(folder / "images" / name)


def cars196(root: Path) -> None:
    kinds = [("relative_im_path", "O"), ("bbox_x1", "O"), ("class", "O"), ("test", "O")]
    rows = [
        ("car_ims/000001.jpg", 1, 1, 0),
        ("car_ims/000002.jpg", 1, 98, 1),
        ("car_ims/000003.jpg", 1, 99, 0),
    ]
    folder = root / "cars196"
    folder.mkdir(parents=True)
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], dtype=object)
    content = {"annotations": np.array([rows], dtype=kinds), "class_names": names}
    scipy.io.savemat(folder / "cars_annos.mat", content)
    for name, *_ in rows:
        image(folder / name)


def in_shop(root: Path) -> None:
    folder = root / "in_shop"
    rows = [("img/WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "train"),
            ("img/WOMEN/Dresses/id_00000001/01_1_front.jpg", "id_00000001", "query"),
            ("img/WOMEN/Dresses/id_00000001/01_2_side.jpg", "id_00000001", "gallery")]  # fmt: skip
    lines = "".join(f"{name:<60}{item:<14}{status}\n" for name, item, status in rows)
    text(folder / "Eval/list_eval_partition.txt", f"3\nimage_name item_id evaluation_status\n{lines}")
    for name, *_ in rows:
        image(folder / "Img" / name)


def guiec(root: Path) -> None:
    for name in ("query/toys/bear/1.jpg", "index/toys/bear/2.jpg", "index/toys/loose.jpg", "index/noise.png"):
        image(root / "guiec" / name)


def _matlab(path: Path, images: list[str], queries: list[str], answers: list[dict[str, object]]) -> None:
    """Cells and a struct array, as MATLAB writes them."""
    fields = list(answers[0])
    gnd = np.empty((1, len(answers)), dtype=[(name, object) for name in fields])
    for number, answer in enumerate(answers):
        for name in fields:
            gnd[name][0, number] = np.atleast_2d(np.asarray(answer[name], np.float64))

    def cells(names: list[str]) -> np.ndarray:
        found = np.empty((len(names), 1), dtype=object)
        found[:, 0] = names
        return found

    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"imlist": cells(images), "qimlist": cells(queries), "gnd": gnd})


def _revisited(base: Path, name: str) -> None:
    images, queries = (
        [f"all_souls_{number:06d}" for number in range(6)],
        ["christ_church_000001", "magdalen_2"],
    )
    answers = [
        {"bbx": [5.5, 2.0, 50.0, 35.0], "easy": [1, 2], "hard": [3], "junk": [4]},
        {"bbx": [0.0, 0.0, 30.0, 30.0], "easy": [], "hard": [5], "junk": [1, 6]},
    ]
    _matlab(base / name / f"gnd_{name}.mat", images, queries, answers)
    for number, image_name in enumerate([*images, *queries]):
        image(base / name / "jpg" / f"{image_name}.jpg", number)


def roxford(root: Path) -> None:
    _revisited(root, "roxford5k")


def rparis(root: Path) -> None:
    _revisited(root, "rparis6k")


def instre(root: Path) -> None:
    images = [f"INSTRE-S1/01a_canada_book/{number:03d}.jpg" for number in range(3)] + ["INSTRE-M/a/001.jpg"]
    queries = ["INSTRE-S1/01a_canada_book/010.jpg", "INSTRE-S2/b/001.jpg"]
    answers = [{"ok": [1, 2, 3], "bbx": [10, 5, 20, 30]}, {"ok": [4], "bbx": [0, 0, 40, 40]}]
    _matlab(root / "instre" / "gnd_instre.mat", images, queries, answers)
    for number, name in enumerate([*images, *queries]):
        image(root / "instre" / name, number)


def forb(root: Path) -> None:
    gallery = [f"{kind}/database/{number}.jpg" for kind in ("currency", "logos", "oods") for number in (0, 1)]
    text(root / "forb/metadata/all_database_images.txt", "\n".join(gallery) + "\n")
    queries = []
    for kind, answers in {"currency": [[0], [0, 1]], "logos": [[1]]}.items():
        lines = []
        for number, right in enumerate(answers):
            queries.append(f"{kind}/query/{number}.jpg")
            names = [f"{kind}/database/{place}.jpg" for place in right]
            entry = {"query_id": number + 1, "query_image": queries[-1], "groundtruth_images": names}
            lines.append(json.dumps({**entry, "difficulty": "easy"}))
        text(root / "forb/metadata" / f"{kind}_gt.ndjson", "\n".join(lines) + "\n")
    for number, name in enumerate([*gallery, *queries]):
        image(root / "forb" / name, number)


BUILDERS = {
    name: function
    for name, function in list(globals().items())
    if callable(function) and getattr(function, "__annotations__", {}).get("root") == "Path"
}
"""Key of a data set → the function that builds its miniature below a data root."""
