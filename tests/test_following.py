"""An index that follows folders and tables which come, go and change, and that several processes share."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from line import ENVIRONMENT, PROGRAM, samething
from samething.catalog import Catalog
from samething.embedder import FORMAT_VERSION, KIND
from samething.errors import InputError
from samething.files import read_manifest, write_manifest
from samething.index import AbstractIndex, open_index
from samething.search import Searcher, index, rebuild, sync
from samething.web import Limits, create_app
from scenes import write_things
from web_server import running

TOKEN = "a secret of some length"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def places(line, tmp_path):
    """Folders ``a`` (12 images) and ``b`` (4 more), both followed by the index ``ix``."""
    write_things(tmp_path / "a", num_things=3)
    drawn(tmp_path / "b", 4)
    index(tmp_path / "a", tmp_path / "b", model=line / "model", output=tmp_path / "ix")
    return tmp_path


@pytest.fixture
def other_model(line, tmp_path):
    """The same model under another fingerprint, as one that was trained again has."""
    folder = shutil.copytree(line / "model", tmp_path / "model 2")
    manifest = read_manifest(folder, kind=KIND, format_version=FORMAT_VERSION)
    write_manifest(folder, dataclasses.replace(manifest, made_from={**manifest.made_from, "again": 1}))
    return folder


def drawn(folder: Path, number: int, first: int = 0) -> list[Path]:
    """So many images that are all different, in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{shade}.png" for shade in range(first, first + number)]
    for shade, path in enumerate(paths, start=first):
        image = Image.new("RGB", (48, 48), (shade % 256, shade * 7 % 256, shade * 31 % 256))
        image.putpixel((shade % 48, shade // 48), (255, 255, 255))
        image.save(path)
    return paths


def paths_in(opened: AbstractIndex) -> set[str]:
    """Every file that the rows of an index name."""
    return {path for batch in opened.items(["paths"]) for row in batch.to_pylist() for path in row["paths"]}


def files_below(*folders: Path) -> set[str]:
    """Every image below some folders."""
    return {str(path) for folder in folders for path in folder.rglob("*.*g") if path.is_file()}


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The program in a process of its own, ended at last."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, *map(str, arguments)],
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(true: Callable[[], bool]) -> None:
    """Wait for something that happens in another process; how long it takes decides nothing."""
    deadline = time.monotonic() + 90
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- folders


@pytest.mark.slow
def test_a_watching_sync_keeps_what_others_index_and_outlives_compaction_and_rebuild(
    line, places, other_model
):
    """It deleted the rows of folders that another command had added, did not watch these folders, and ended
    when the index was rebuilt."""
    place = places / "ix"
    with started("index", "sync", place, "--watch") as process:
        while "watching" not in process.stderr.readline():
            assert process.poll() is None
        threading.Thread(target=process.stderr.read).start()
        drawn(places / "c", 3, first=50)
        done = samething("index", places / "c", "--model", line / "model", "-o", place)
        assert done.returncode == 0, done.stderr
        drawn(places / "a", 1, first=60)
        until(lambda: paths_in(open_index(place)) == files_below(*(places / name for name in "abc")))
        drawn(places / "c", 1, first=70)  # a folder that is followed only since
        until(lambda: paths_in(open_index(place)) == files_below(*(places / name for name in "abc")))
        assert samething("index", "compact", place).returncode == 0
        drawn(places / "a", 1, first=80)
        until(lambda: paths_in(open_index(place)) == files_below(*(places / name for name in "abc")))
        assert samething("index", "rebuild", place, "--model", other_model).returncode == 0
        (places / "a" / "80.png").unlink()
        drawn(places / "b", 1, first=90)
        until(lambda: paths_in(open_index(place)) == files_below(*(places / name for name in "abc")))
        assert process.poll() is None
    assert Searcher.open(place).embedder.folder.name == "model 2"
    assert open_index(place).verify().problems == ()


def test_what_another_process_adds_while_a_sync_is_under_way_stays(line, places):
    """The sync found an image gone and dropped its row, though another command had indexed a copy meanwhile;
    and a row that both changed kept the files of one of them."""
    place = places / "ix"
    gone, moved = places / "b" / "0.png", places / "b" / "1.png"
    shutil.copytree(places / "b", places / "copies")
    gone.unlink()
    moved.rename(places / "a" / "moved.png")
    drawn(places / "a", 1, first=60)  # something to embed, so that there is a moment in between
    others: list[int] = []

    def meanwhile(done: int, total: int) -> None:
        del total
        if not done:
            ended = samething("index", places / "copies", "--model", line / "model", "-o", place)
            others.append(ended.returncode)

    done = Searcher.open(place).sync(on_progress=meanwhile)
    assert others == [0] and (done.num_added, done.changes.num_moved) == (1, 1)
    assert paths_in(done.index) == files_below(places / "a", places / "b", places / "copies")
    assert sync(place).changes.num_read == 0


def test_a_folder_that_is_gone_or_emptied_holds_up_no_other(places):
    """Every later sync was refused, for all folders, and the folder could not be forgotten."""
    place = places / "ix"
    before = files_below(places / "b")
    (places / "b").rename(places / "away")
    drawn(places / "a", 1, first=60)
    done = sync(place)
    assert (done.num_added, done.exit_status) == (1, 3)
    assert done.changes.held == (f"{places / 'b'} does not exist",)
    (places / "b").mkdir()
    drawn(places / "a", 1, first=61)
    done = samething("index", "sync", place)
    assert done.returncode == 3
    assert f"all 4 images that were in {places / 'b'} are gone" in done.stdout
    assert "--drop" in done.stdout and "--forget" in done.stdout
    assert paths_in(open_index(place)) == files_below(places / "a") | before
    assert samething("index", "sync", place, "--forget", places / "b").returncode == 0
    assert paths_in(open_index(place)) == files_below(places / "a")
    assert sync(place).exit_status == 0
    with pytest.raises(InputError, match="does not follow"):
        sync(place, forget=[places / "b"])
    with pytest.raises(InputError, match="does not exist"):
        sync(place, places / "no such folder")
    assert sync(place).exit_status == 0  # it is not followed


def test_a_forgotten_folder_keeps_the_images_that_another_one_has(places, line):
    place = places / "ix"
    index(places, model=line / "model", output=place)  # the folder above both
    assert sync(place, forget=[places / "b"]).index.count() == 16
    assert paths_in(open_index(place)) == files_below(places / "a", places / "b")
    assert sync(place, places / "a").changes.num_dropped == 0


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_sub_folder_that_is_gone_at_once_is_kept_and_said(places, is_empty):
    """A disk below the folder that was not mounted: its images were dropped without a word."""
    place, part = places / "ix", next((places / "a").iterdir())
    before = files_below(places / "a", places / "b")
    part.rename(places / "away")
    if is_empty:
        part.mkdir()
    (places / "b" / "0.png").unlink()  # one alone goes
    done = sync(place)
    assert (done.changes.num_dropped, done.exit_status) == (1, 3)
    assert done.changes.held == (f"all 4 images that were in {part} are gone",)
    assert paths_in(done.index) == before - {str(places / "b" / "0.png")}
    shutil.rmtree(part, ignore_errors=True)
    (places / "away").rename(part)
    assert (sync(place).changes.num_kept, sync(place).exit_status) == (15, 0)
    part.rename(places / "a" / "renamed")  # that is no loss
    assert (sync(place).changes.num_moved, sync(place).exit_status) == (4, 0)
    shutil.rmtree(places / "a" / "renamed")
    assert sync(place).changes.num_dropped == 0
    assert sync(place, drop=True).changes.num_dropped == 4
    assert sync(place).exit_status == 0


def test_a_large_share_that_is_gone_at_once_is_kept_and_said(line, tmp_path):
    """Eleven of forty images, spread over all folders: they were dropped without a word."""
    for folder in range(4):
        drawn(tmp_path / "a" / str(folder), 10, first=10 * folder)
    index(tmp_path / "a", model=line / "model", output=tmp_path / "ix")
    files = sorted((tmp_path / "a").rglob("*.png"))
    for path in files[::4]:
        path.unlink()
    assert sync(tmp_path / "ix").changes.num_dropped == 10  # not many yet
    rest = files_below(tmp_path / "a")
    for path in sorted(rest)[::2]:
        Path(path).unlink()
    done = sync(tmp_path / "ix")
    assert done.changes.held == (f"15 of the 30 images of {tmp_path / 'a'} are gone",)
    assert paths_in(done.index) == rest
    assert sync(tmp_path / "ix", drop=True).index.count() == 15


def test_what_is_excluded_from_now_on_goes_at_once(line, tmp_path):
    """Sixteen of 24 images, of a folder that the next sync was to pass over: they were held as if lost."""
    for folder in ("new", "old"):
        drawn(tmp_path / "a" / folder, 8 if folder == "new" else 16, first=20 * (folder == "old"))
    index(tmp_path / "a", model=line / "model", output=tmp_path / "ix")
    done = sync(tmp_path / "ix", tmp_path / "a", exclude=["old"])
    assert (done.changes.num_dropped, done.changes.held, done.exit_status) == (16, (), 0)
    assert paths_in(done.index) == files_below(tmp_path / "a" / "new")


@pytest.mark.slow
def test_commands_that_write_an_index_anew_beside_each_other_lose_nothing(line, places, other_model):
    """A rebuild that was started beside a compaction left an index without a row in one of three tries."""
    place = places / "ix"
    commands = [
        ("index", "rebuild", place, "--model", other_model),
        ("index", "compact", place),
        ("index", "compact", place),
    ]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda command: samething(*command), commands))
    assert [each.returncode for each in done] == [0, 0, 0], [each.stderr for each in done]
    with open_index(place) as opened:
        assert opened.count() == 16 and opened.verify().problems == ()
        assert paths_in(opened) == files_below(places / "a", places / "b")


def test_folders_and_index_may_move_together(line, places):
    new = places / "new"
    new.mkdir()
    for name in ("a", "b", "ix"):
        (places / name).rename(new / name)
    done = sync(new / "ix", model=line / "model")
    assert (done.num_added, done.changes.num_dropped, done.exit_status) == (0, 0, 0)
    assert paths_in(done.index) == files_below(new / "a", new / "b")


# ---- tables


def rows_of(place: Path, *columns: str) -> list[tuple[object, ...]]:
    rows = [row for batch in open_index(place).items(["path", *columns]) for row in batch.to_pylist()]
    return [tuple(row[name] for name in columns) for row in sorted(rows, key=lambda row: row["path"])]


def test_changed_metadata_are_taken_up_without_embedding(line, tmp_path):
    """Only a changed label was noticed; and a rebuild lost what the table says of the images."""
    drawn(tmp_path / "p", 2)
    table, place = tmp_path / "t.csv", tmp_path / "ix"
    table.write_text("img_path,label,maker\np/0.png,a,X\np/1.png,b,Y\n")
    index(table, model=line / "model", output=place)
    table.write_text("img_path,label,maker\np/0.png,A2,Z\np/1.png,b,Q\n")
    assert sync(place).num_added == 0
    assert rows_of(place, "label", "maker") == [("A2", "Z"), ("b", "Q")]
    table.write_text("img_path,label,maker\np/0.png,A2,\np/1.png,b,Q\n")
    sync(place)
    assert rows_of(place, "maker")[1] == ("Q",) and not rows_of(place, "maker")[0][0]
    assert sync(place).changes.num_kept == 2 and not sync(place).changes.has_news


def test_new_columns_of_a_table_arrive(line, tmp_path):
    """Its rows were refused, or came without them; a rebuild lost what the table says of the images."""
    first, second = drawn(tmp_path / "p", 2)
    table, more, place = tmp_path / "t.parquet", tmp_path / "m.parquet", tmp_path / "ix"
    rows = [{"image": str(first), "label": "a"}, {"image": str(second), "label": "b"}]
    Catalog.from_rows(rows, root=tmp_path).write(table)
    reader = index(table, model=line / "model", output=place).index
    Catalog.from_rows(
        [{**rows[0], "price": 2.5, "maker": None}, {**rows[1], "price": None, "maker": "Q"}],
        root=tmp_path,
    ).write(table)
    assert sync(place).num_added == 0
    assert rows_of(place, "label", "maker", "price") == [("a", None, 2.5), ("b", "Q", None)]
    names = [name for batch in reader.items([]) for name in batch["id"].to_pylist()]
    reader.add(
        reader.vectors(names[:1]), [{"id": "x", "price": 3.0}]
    )  # a handle from before the columns came
    reader.delete(["x"])
    Catalog.from_rows([{**rows[1], "year": 1999}], root=tmp_path).write(
        more
    )  # another table of the same image
    index(more, model=line / "model", output=place)
    expected = [("a", None, 2.5, None), ("b", "Q", None, 1999)]
    assert rows_of(place, "label", "maker", "price", "year") == expected
    assert not open_index(place).verify().problems and not sync(place).changes.has_news
    rebuild(place, model=line / "model")
    assert rows_of(place, "label", "maker", "price", "year") == expected
    assert sync(place, forget=[more]).num_added == 0
    assert rows_of(place, "maker", "year") == [(None, None), ("Q", None)]


# ---- servers


def served(process: subprocess.Popen[str]) -> str:
    """The address that a server says it has."""
    while "serving on " not in (line := process.stderr.readline()):
        assert process.poll() is None, line
    threading.Thread(target=process.stderr.read).start()
    return line.split("serving on ")[1].split()[0]


def test_two_servers_lose_no_upload(places):
    """Each read the table of uploads and wrote it back: 27 of 120 acknowledged rows were missing, and the
    next sync dropped the images. Killed at the end, so that nothing is written late."""
    place = places / "ix"
    images = [path.read_bytes() for path in drawn(places / "new", 24, first=100)]
    serve = ["serve", place, "--port", 0, "--token", TOKEN]
    with started(*serve) as one, started(*serve) as other, ThreadPoolExecutor(8) as clients:
        addresses = [served(one), served(other)]

        def add(number: int) -> httpx.Response:
            return httpx.post(
                f"{addresses[number % 2]}add", headers=BEARER, timeout=60,
                files={"image": images[number // 2]}, data={"label": f"l{number // 2}"},
            )  # fmt: skip

        answers = list(clients.map(add, range(48)))  # each image to both at once
        assert {answer.status_code for answer in answers} == {201}
        one.kill(), other.kill()
    opened = open_index(place)
    assert {answer.json()["id"] for answer in answers} <= {
        name for batch in opened.items([]) for name in batch["id"].to_pylist()
    }
    assert len(opened.notes("uploads")) == 24
    assert sync(place).changes.num_dropped == 0 and opened.count() == 16 + 24
    assert {label for (label,) in rows_of(place, "label")} >= {f"l{number}" for number in range(24)}
    assert opened.verify().problems == ()


def test_a_server_follows_compaction_and_rebuild(line, places, other_model):
    """It answered 503 for good, and that all is well when it was asked for its health."""
    place = places / "ix"
    image = (places / "b" / "0.png").read_bytes()
    with running(create_app(Searcher.open(place), token=TOKEN)) as address:

        def ask() -> tuple[int, str, int]:
            found = httpx.post(f"{address}/search", files={"image": image}, timeout=60)
            assert found.status_code == 200, found.text
            health = httpx.get(f"{address}/health")
            return health.status_code, health.json()["status"], len(found.json()["matches"])

        assert ask() == (200, "ok", 16)
        assert samething("index", "compact", place).returncode == 0
        assert ask() == (200, "ok", 16)
        answers, is_done = [], threading.Event()
        with ThreadPoolExecutor(2) as clients:

            def keep_asking() -> None:
                while not is_done.is_set():
                    answers.append(ask())

            asking = [clients.submit(keep_asking) for _ in range(2)]
            assert samething("index", "rebuild", place, "--model", other_model).returncode == 0
            is_done.set()
            [each.result() for each in asking]
        assert set(answers) == {(200, "ok", 16)} and ask() == (200, "ok", 16)
        added = httpx.post(
            f"{address}/add", headers=BEARER, files={"image": drawn(places, 1, 99)[0].read_bytes()}
        )
        assert added.status_code == 201, added.text
        assert ask() == (200, "ok", 17)
        [database] = place.glob("rows-*.sqlite")
        database.rename(place / "away"), database.with_name(f"{database.name}-wal").unlink(missing_ok=True)
        (place / "manifest.json").write_text("{}")
        assert httpx.post(f"{address}/search", files={"image": image}).status_code == 503
        health = httpx.get(f"{address}/health")
        assert (health.status_code, health.json()["status"]) == (503, "the index cannot be used")
        assert str(place) not in health.text


def test_an_upload_while_the_model_is_busy_comes_back_later(places, monkeypatch):
    """It was a 500, as if the server had failed."""
    searcher, go_on = Searcher.open(places / "ix"), threading.Event()
    plain = type(searcher.embedder).embed_pixels
    monkeypatch.setattr(
        type(searcher.embedder), "embed_pixels", lambda self, pixels: go_on.wait(60) and plain(self, pixels)
    )
    app = create_app(searcher, token=TOKEN)
    app.app.state.service.limits = Limits(timeout_s=0.2)  # for the model; decoding has its time
    image = drawn(places, 1, first=99)[0].read_bytes()
    with TestClient(app, base_url="http://localhost", headers=BEARER) as client:
        busy = client.post("/add", files={"image": image})
        go_on.set()
        assert busy.status_code == 429 and busy.headers["retry-after"] == "1"
        assert open_index(places / "ix").notes("uploads") == {}
