"""How many files, functions and moves a command takes: what a reader has to follow.

    python benchmarks/walks.py                     # a table, one row per walk
    python benchmarks/walks.py --names evaluate    # the functions of one walk, by their first call

A toy line (a tiny vision transformer with random weights, things of four images each) is built first.
Each walk then runs twice in this process, and the second run is traced with ``sys.setprofile`` in every
thread. So imports and what is cached do not count. *Functions* are distinct named functions of the
package, *moves* are changes of file from one call of the package to the next. What runs in other
processes is not seen. Threads interleave, so a difference of moves below a factor of two says little.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image

import samething

PACKAGE = str(Path(samething.__file__).parent)


class Trace:
    """The calls into the package, in order."""

    def __init__(self) -> None:
        self.calls: list[CodeType] = []

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Note a call; what the interpreter asks for."""
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls.append(frame.f_code)

    @property
    def functions(self) -> dict[tuple[str, str], int]:
        """How often each named function was called, in the order of first calls."""
        counts: dict[tuple[str, str], int] = {}
        for code in self.calls:
            if not code.co_name.startswith("<"):
                name = Path(code.co_filename).relative_to(PACKAGE).as_posix(), code.co_qualname
                counts[name] = counts.get(name, 0) + 1
        return counts

    @property
    def row(self) -> tuple[int, int, int, int]:
        """Files, functions, calls and moves."""
        files = [code.co_filename for code in self.calls]
        moves = sum(one != other for one, other in itertools.pairwise(files))
        return len(set(files)), len(self.functions), len(self.calls), moves


@contextlib.contextmanager
def traced() -> Iterator[Trace]:
    """Trace this thread and those that start meanwhile."""
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def write_things(root: Path, *, num_things: int, num_views: int) -> Path:
    """A sub-folder per thing with views of it: smooth noise that is shifted and dimmed."""
    rng = np.random.default_rng(0)
    for thing in range(num_things):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        scene = coarse.resize((128, 128), Image.Resampling.BICUBIC)
        (root / f"thing {thing:02d}").mkdir(parents=True)
        for view in range(num_views):
            left, top = rng.integers(0, 32, 2)
            crop = np.asarray(scene.crop((left, top, left + 96, top + 96)), float) * rng.uniform(0.7, 1.2)
            image = Image.fromarray(crop.clip(0, 255).astype(np.uint8))
            image.save(root / f"thing {thing:02d}" / f"view {view}.jpg")
    return root


def line(folder: Path) -> None:
    """Images, catalog, features, run, model and index of the toy line."""
    from samething.datasets import catalog
    from samething.export import export
    from samething.features import features
    from samething.search import index
    from samething.training import train

    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    safetensors.torch.save_file(network.state_dict(), folder / "w.safetensors")
    images = write_things(folder / "images", num_things=16, num_views=4)
    catalog(images, domain="things", output=folder / "c.parquet")
    features(folder / "c.parquet", output=folder / "f", **backbone(folder))
    train(folder / "f", output=folder / "run", recipe="demo", epochs=2, embedding_dim=16)
    export(folder / "run", output=folder / "model", weights=folder / "w.safetensors")
    index(images, model=folder / "model", output=folder / "index")
    for name in ("one", "two"):
        shutil.copytree(images / "thing 00", folder / name / "thing 00")
        for extra in sorted((folder / name / "thing 00").iterdir())[2:]:
            extra.unlink()


def backbone(folder: Path) -> dict[str, object]:
    """Which backbone computes features, in this process alone."""
    return {
        "backbone": "timm:test_vit", "weights": folder / "w.safetensors", "runtime": "torch",
        "num_workers": 0,
    }  # fmt: skip


def walks(folder: Path) -> dict[str, Callable[[int], object]]:
    """Each walk, given the number of its turn."""
    from fastapi.testclient import TestClient

    from samething.datasets import catalog
    from samething.evaluation import evaluate
    from samething.features import features
    from samething.search import Searcher, find, index
    from samething.training import train
    from samething.web.app import create_app

    query = folder / "images" / "thing 03" / "view 1.jpg"
    catalog(folder / "one", domain="things", output=folder / "two.parquet")
    client = TestClient(create_app(Searcher.open(folder / "index")), base_url="http://localhost")

    def search(turn: int) -> object:
        answer = client.post("/search", files=[("image", ("q.jpg", query.read_bytes()))])
        assert answer.status_code == 200, answer.text
        return answer.json()

    def evaluated(turn: int) -> object:
        return evaluate(
            folder / "run", json=folder / f"numbers-{turn}.json", html=folder / f"report-{turn}.html"
        )

    return {
        "catalog of two images": lambda turn: catalog(
            folder / "one", domain="things", output=folder / f"catalog-{turn}.parquet"
        ),
        "features of two images": lambda turn: features(
            folder / "two.parquet", output=folder / f"features-{turn}", **backbone(folder)
        ),
        "train, one epoch": lambda turn: train(
            folder / "f", output=folder / f"run-{turn}", recipe="demo", epochs=1, embedding_dim=16
        ),
        "find, and print": lambda turn: shown(find(query, index=folder / "index")),
        "search request": search,
        "evaluate --json --html": evaluated,
        "index of two images": lambda turn: index(
            folder / "two", model=folder / "model", output=folder / f"index-{turn}"
        ),
    }


def shown(result: object) -> str:
    """What the program prints of a result."""
    import rich.console

    with io.StringIO() as text:
        rich.console.Console(file=text, width=120).print(result)
        return text.getvalue()


def main() -> None:
    """Trace all walks and print a table, or the functions of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--names", metavar="WALK", help="list the functions of the walk that starts so")
    wanted = parser.parse_args().names
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        line(folder)
        rows = {}
        for name, walk in walks(folder).items():
            if wanted and not name.startswith(wanted):
                continue
            walk(0)
            with traced() as trace:
                walk(1)
            rows[name] = trace.row
            if wanted:
                for (file, function), count in trace.functions.items():
                    print(f"{count:5}  {file}:{function}")
    print(f"{'walk':28}{'files':>8}{'functions':>11}{'calls':>8}{'moves':>8}")
    for name, row in rows.items():
        print(f"{name:28}{row[0]:>8}{row[1]:>11}{row[2]:>8}{row[3]:>8}")


if __name__ == "__main__":
    main()
