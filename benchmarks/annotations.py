"""How fast the annotations of large public data sets are read, and in how much memory, against the plain way.

    python benchmarks/annotations.py

Annotation files of the size and form of Google Landmarks v2 (``train.csv``, 1,580,470 rows) and of UnED's
landmarks (four JSON lists, 2,343,356 entries) are written to a temporary folder; the images themselves are
not needed but for one. Each way runs in a process of its own, in turns; time is CPU time, memory the most
that the process held beyond what it held after its imports.

The rival is the same by the plain means of Python: csv or json, a mapping per row, ``Catalog.from_rows``. It
checks nothing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from samething.catalog import Catalog
from samething.datasets import read_dataset
from samething.datasets.uned import DOMAINS

ROWS, TURNS = 1_580_470, 3
LANDMARKS = "google_landmark_recognition_2021"
ROLES = {"train": "train", "val": "val", "test": "query", "index": "index"}


def write_files(root: Path) -> None:
    (root / LANDMARKS).mkdir()
    with (root / LANDMARKS / "train.csv").open("w") as stream:
        stream.write("id,landmark_id\n")
        for number in range(ROWS):
            stream.write(f"{identifier(number)},{number // 20}\n")
    touch(root / LANDMARKS / "train", identifier(0))
    for folder in DOMAINS["gldv2"].folders:
        (root / "uned/images" / folder).mkdir(parents=True)
    (root / "uned/info_files/gldv2").mkdir(parents=True)
    (root / "uned/images" / path_of("train", 0)).touch()
    for split, size in DOMAINS["gldv2"].sizes.items():
        entries = [
            {
                "path": path_of(split, number),
                "class_id": [number, number + 1] if split == "test" else number // 20,
            }
            for number in range(size)
        ]
        (root / f"uned/info_files/gldv2/{split}.json").write_text(json.dumps(entries))


def identifier(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()[:16]


def path_of(split: str, number: int) -> str:
    return f"gldv2/images/{'train' if split == 'val' else split}/{number}.jpg"


def touch(folder: Path, name: str) -> None:
    path = folder / name[0] / name[1] / name[2] / f"{name}.jpg"
    path.parent.mkdir(parents=True)
    path.touch()


def plain_csv(root: Path) -> Catalog:
    with (root / LANDMARKS / "train.csv").open(newline="") as stream:
        rows = [
            {
                "image": f"{LANDMARKS}/train/{row['id'][0]}/{row['id'][1]}/{row['id'][2]}/{row['id']}.jpg",
                "label": f"gldv2/{row['landmark_id']}",
                "domain": "landmarks",
                "dataset": "gldv2",
            }
            for row in csv.DictReader(stream)
        ]
    return Catalog.from_rows(rows, root=root)


def plain_json(root: Path) -> Catalog:
    rows = []
    for split, role in ROLES.items():
        for entry in json.loads((root / f"uned/info_files/gldv2/{split}.json").read_text()):
            classes = entry["class_id"] if isinstance(entry["class_id"], list) else [entry["class_id"]]
            rows.append(
                {
                    "image": f"uned/images/{entry['path']}",
                    "label": f"uned/gldv2/{split}/{classes[0]}",
                    "labels": classes,
                    "domain": "gldv2",
                    "dataset": "uned",
                    "role": role,
                }
            )
    return Catalog.from_rows(rows, root=root)


WAYS = {
    ("gldv2", "samething"): lambda root: read_dataset("gldv2", data_root=root).catalog,
    ("gldv2", "plain"): plain_csv,
    ("uned", "samething"): lambda root: read_dataset("uned", data_root=root, domains=("gldv2",)).catalog,
    ("uned", "plain"): plain_json,
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(key: str, way: str, root: Path) -> None:
    before, start = peak_bytes(), time.process_time()
    num_rows = len(WAYS[key, way](root))
    print(json.dumps([num_rows, time.process_time() - start, peak_bytes() - before]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--one", nargs=3, metavar=("KEY", "WAY", "FOLDER"), help="measure one way, for itself"
    )
    parser.add_argument("--turns", type=int, default=TURNS, help="measurements of each way")
    arguments = parser.parse_args()
    if arguments.one:
        key, way, folder = arguments.one
        measure(key, way, Path(folder))
        return
    found: dict[tuple[str, str], list[tuple[int, float, int]]] = {pair: [] for pair in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        for _ in range(arguments.turns):
            for pair, runs in found.items():
                done = subprocess.run(
                    [sys.executable, __file__, "--one", *pair, folder],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                runs.append(tuple(json.loads(done.stdout)))
    print(f"{'':<18} {'rows':>10} {'s CPU':>7} {'GiB':>6} {'x faster':>9} {'x less memory':>14}")
    for key in ("gldv2", "uned"):
        plain, ours = found[key, "plain"], found[key, "samething"]
        for way, runs in ((key + " plain", plain), (key + " samething", ours)):
            faster = statistics.median(rival[1] / own[1] for rival, own in zip(plain, runs, strict=True))
            smaller = statistics.median(rival[2] / own[2] for rival, own in zip(plain, runs, strict=True))
            seconds, memory = (statistics.median(run[place] for run in runs) for place in (1, 2))
            numbers = f"{runs[0][0]:>10,} {seconds:>7.1f} {memory / 2**30:>6.2f}"
            print(f"{way:<18} {numbers} {faster:>9.2f} {smaller:>14.2f}")


if __name__ == "__main__":
    main()
