"""Images that are no files on this disk: URLs, members of tar shards, cells of tables."""

import functools
import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from object_store import s3_server
from samething.catalog import BOX_COLUMNS, Catalog
from samething.errors import ImageError, MissingExtraError
from samething.features import features
from samething.images import Box, Source, checksum, decode, identify, in_threads, located
from samething.search import find, index
from scenes import write_things
from test_backbones import TINY, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def files(tmp_path) -> list[Path]:
    return sorted(write_things(tmp_path / "images é", num_things=3, num_views=2).rglob("*.jpg"))


@pytest.fixture
def server(tmp_path):
    """An HTTP server of a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    (tmp_path / "www").mkdir()
    handler = functools.partial(Quiet, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", tmp_path / "www"
        running.shutdown()
        thread.join()


def in_memory(files: list[Path]) -> list[str]:
    memory = fsspec.filesystem("memory")
    for number, path in enumerate(files):
        memory.pipe(f"/bucket/{number}.jpg", path.read_bytes())
    return [f"memory://bucket/{number}.jpg" for number in range(len(files))]


def in_tar(files: list[Path], target: Path) -> list[str]:
    with tarfile.open(target, "w") as shard:
        for number, path in enumerate(files):
            shard.add(path, f"{number:04d}.jpg")
            label = tarfile.TarInfo(f"{number:04d}.cls")
            label.size = 1
            shard.addfile(label, io.BytesIO(b"7"))
    return [f"tar://{number:04d}.jpg::{target}" for number in range(len(files))]


def in_parquet(files: list[Path], target: Path) -> list[str]:
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in files]
    pq.write_table(pa.Table.from_pylist(rows), target, row_group_size=2)
    return [f"parquet://image/{number}::{target}" for number in range(len(files))]


def in_datasets(files: list[Path], target: Path) -> list[str]:
    import datasets

    table = datasets.Dataset.from_dict({"image": [str(path) for path in files]})
    table = table.cast_column("image", datasets.Image(decode=False))
    whole = table.map(lambda row: {"image": {"bytes": Path(row["image"]["path"]).read_bytes(), "path": None}})
    whole.save_to_disk(target)
    shard = next(target.glob("*.arrow"))
    return [f"arrow://image/{number}::{shard}" for number in range(len(files))]


def located_in(kind: str, files: list[Path], tmp_path: Path) -> list[str]:
    if kind == "memory":
        return in_memory(files)
    if kind == "file":
        return [path.as_uri().replace("%20", " ").replace("%C3%A9", "é") for path in files]
    if kind == "tar":
        return in_tar(files, tmp_path / "shard.tar")
    if kind == "parquet":
        return in_parquet(files, tmp_path / "table.parquet")
    if kind == "datasets":
        return in_datasets(files, tmp_path / "dataset")
    names = in_tar(files, tmp_path / "shard.tar")
    fsspec.filesystem("memory").pipe("/bucket/shard.tar", (tmp_path / "shard.tar").read_bytes())
    return [f"{name.partition('::')[0]}::memory://bucket/shard.tar" for name in names]


KINDS = ["memory", "file", "tar", "tar in memory", "parquet", "datasets"]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_pixels_are_those_of_the_files(kind, files, tmp_path):
    for location, path in zip(located_in(kind, files, tmp_path), files, strict=True):
        source = Source(location)
        assert source.is_remote
        assert source.read() == path.read_bytes()
        assert np.array_equal(decode(source), decode(path))
        assert np.array_equal(decode(Source(location, Box(5, 6, 50, 40))), decode(path).crop((5, 6, 50, 40)))
        assert source.version() == source.version() != ""


@pytest.mark.parametrize("kind", ["memory", "tar", "parquet"])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_features_are_those_of_the_files(kind, num_workers, files, tmp_path):
    save_tiny(tmp_path / "tiny.pth")
    options = {
        "weights": tmp_path / "tiny.pth", "backbone": f"timm:{TINY}", "batch_size": 2, "runtime": "torch",
        "num_workers": num_workers,
    }  # fmt: skip
    box = dict(zip(BOX_COLUMNS, (5, 5, 60, 60), strict=True))
    results = []
    for name, images in (("files", [str(path) for path in files]), (kind, located_in(kind, files, tmp_path))):
        rows = [{"image": image, "label": "x"} for image in images]
        catalog = Catalog.from_rows([*rows, {**rows[0], **box}], root=tmp_path)
        catalog.write(tmp_path / f"{name}.parquet")
        results.append(features(tmp_path / f"{name}.parquet", output=tmp_path / name, **options))
    assert np.array_equal(results[0].rows, results[1].rows)
    assert len(np.unique(results[0].rows, axis=0)) == len(files) + 1
    assert features(tmp_path / f"{kind}.parquet", output=tmp_path / kind, **options).num_computed == 0


@pytest.fixture(params=["s3", "gs"])
def bucket(request, tmp_path, monkeypatch):
    """An empty bucket for this process and those it starts: its URL, and what puts a file there."""
    scheme = request.param
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks by gRPC, which the emulator lacks
    pytest.importorskip({"s3": "s3fs", "gs": "gcsfs"}[scheme], reason="needs pip install 'samething[remote]'")
    if scheme == "s3":
        (tmp_path / "s3" / "bucket").mkdir(parents=True)
        serving = s3_server(tmp_path / "s3")
        access = {"key": "somebody", "secret": "something"}
    else:
        emulator = pytest.importorskip("gcp_storage_emulator.server")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serving = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        access = {"token": "anon"}
    with serving as endpoint:
        access["endpoint_url"] = endpoint if scheme == "s3" else f"http://127.0.0.1:{port}"
        for name, value in access.items():
            monkeypatch.setenv(f"FSSPEC_{scheme.upper()}_{name.upper()}", value)
        monkeypatch.setitem(fsspec.config.conf, scheme, access)  # fsspec reads its variables when imported

        def put(path: Path, name: str) -> None:
            if scheme == "s3":
                shutil.copy(path, tmp_path / "s3" / "bucket" / name)
            else:
                fsspec.filesystem(scheme).put(str(path), f"bucket/{name}")

        yield f"{scheme}://bucket", put
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


def test_objects_of_a_bucket_are_the_files(bucket, files, tmp_path):
    url, put = bucket
    for number, path in enumerate(files):
        put(path, f"{number} é.jpg")
    in_tar(files, tmp_path / "shard.tar")
    put(tmp_path / "shard.tar", "shard.tar")
    places = [f"{url}/{number} é.jpg" for number in range(len(files))]
    members = [f"tar://{number:04d}.jpg::{url}/shard.tar" for number in range(len(files))]
    for place in (places, members):
        for location, path in zip(place, files, strict=True):
            assert Source(location).read() == path.read_bytes()
            assert Source(location).version() == Source(location).version() != ""
    with pytest.raises(ImageError, match="does not exist"):
        Source(f"{url}/none.jpg").read()
    listed = fsspec.filesystem(url.partition(":")[0]).ls("bucket/", detail=False)
    assert [name.partition("/")[2] for name in listed] == [
        *(f"{number} é.jpg" for number in range(len(files))), "shard.tar",
    ]  # fmt: skip
    code = (
        "import sys; from samething.images import Source; sys.stdout.buffer.write(Source(sys.argv[1]).read())"
    )
    read = subprocess.run([sys.executable, "-c", code, places[0]], env=os.environ, capture_output=True)
    assert read.stdout == files[0].read_bytes(), read.stderr[-2000:]

    save_tiny(tmp_path / "tiny.pth")
    results = []
    for name, images in (("files", [*map(str, files)] * 2), ("bucket", [*places, *members])):
        catalog = Catalog.from_rows([{"image": image, "label": "x"} for image in images], root=tmp_path)
        catalog.write(tmp_path / f"{name}.parquet")
        options = {"weights": tmp_path / "tiny.pth", "backbone": f"timm:{TINY}", "runtime": "torch"}
        results.append(
            features(tmp_path / f"{name}.parquet", output=tmp_path / f"{name} rows", num_workers=0, **options)
        )
    assert np.array_equal(results[0].rows, results[1].rows) and len(results[1].rows) == 2 * len(files)


def test_a_query_may_be_all_that_an_index_may_hold(line, files, tmp_path):
    indexed = index(tmp_path / "images é", model=line / "model", output=tmp_path / "index").index
    assert indexed.count() == len(files)
    plain = find(files[3], index=tmp_path / "index", k=3)
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        place = located_in(kind, files, tmp_path / kind)[3]
        found = find(place, index=tmp_path / "index", k=3)
        assert found.query == place and found.matches == plain.matches
        box = (5, 6, 50, 40)
        assert find(place, index=tmp_path / "index", crop=box).matches[0].score == pytest.approx(
            find(files[3], index=tmp_path / "index", crop=box).matches[0].score
        )
    with pytest.raises(ImageError, match="no such member"):
        find(f"tar://none.jpg::{tmp_path / 'tar' / 'shard.tar'}", index=tmp_path / "index")


def test_a_query_in_a_bucket(line, bucket, files, tmp_path):
    url, put = bucket
    index(tmp_path / "images é", model=line / "model", output=tmp_path / "index")
    put(files[2], "a é.jpg")
    in_tar(files, tmp_path / "shard.tar")
    put(tmp_path / "shard.tar", "queries.tar")  # an open shard of the same name is kept
    plain = find(files[2], index=tmp_path / "index", k=3)
    for place in (f"{url}/a é.jpg", f"tar://0002.jpg::{url}/queries.tar"):
        assert find(place, index=tmp_path / "index", k=3).matches == plain.matches
    with pytest.raises(ImageError, match="does not exist"):
        find(f"{url}/none.jpg", index=tmp_path / "index")


def test_fsspec_is_needed_for_what_is_elsewhere_alone(files, tmp_path, server, monkeypatch):
    address, folder = server
    shutil.copy(files[0], folder / "a é.jpg")
    in_memory(files)
    local = [in_tar(files, tmp_path / "shard.tar")[0], files[0].as_uri(), f"{address}/a é.jpg"]
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for location in local:
        assert Source(location).read() == files[0].read_bytes()
        assert Source(location).version() == Source(location).version() != ""
    for location in ("memory://bucket/0.jpg", f"tar://a.jpg::{address}/shard.tar"):
        with pytest.raises(MissingExtraError, match=r"samething\[remote\]"):
            Source(location).read()
        assert Source(location).version() == ""


def test_reasons_are_the_errors_own(files, tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("text")
    reasons = {
        "empty.jpg": "is empty", "text.jpg": "is not an image in a known format",
        "none.jpg": "No such file or directory",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ImageError) as error:
            decode(tmp_path / name)
        assert error.value.reason == reason
        assert error.value.given.startswith(str(tmp_path / name)) and error.value.given.endswith(reason)
        assert pickle.loads(pickle.dumps(error.value)).reason == reason


def test_images_are_read_ahead_in_order_and_a_bad_one_is_a_result(files, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    sources = [Source(str(path)) for path in (files[0], tmp_path / "text.jpg", *files[1:])]
    found = list(in_threads(identify, sources, ahead=2))
    assert isinstance(found[1], ImageError)
    for path, identity in zip(files, [found[0], *found[2:]], strict=True):
        assert identity == (*decode(path).size, hashlib.sha256(path.read_bytes()).hexdigest())
    taken = []
    going = in_threads(checksum, (taken.append(source) or source for source in sources), ahead=2)
    next(going)
    assert len(taken) == 3
    going.close()
    assert len(taken) == 3


def test_what_changed_behind_a_url_is_computed_again_alone(files, tmp_path, server):
    address, folder = server
    save_tiny(tmp_path / "tiny.pth")
    for number, path in enumerate(files):
        shutil.copy(path, folder / f"{number}.jpg")
    rows = [{"image": f"{address}/{number}.jpg", "label": "x"} for number in range(len(files))]
    rows.append({"image": f"{address}/none.jpg", "label": "x"})
    catalog = Catalog.from_rows(rows, root=tmp_path).write(tmp_path / "catalog.parquet")
    options = {
        "weights": tmp_path / "tiny.pth", "backbone": f"timm:{TINY}", "num_workers": 0, "runtime": "torch",
        "output": tmp_path / "features",
    }  # fmt: skip
    result = features(catalog, **options)
    assert len(result.rows) == len(files)
    assert list(map(str, result.unreadable)) == [f"{address}/none.jpg: does not exist"]
    (folder / "2.jpg").write_bytes(files[3].read_bytes() + b" ")
    again = features(catalog, **options)
    assert again.num_computed == 1
    assert np.array_equal(again.rows[2], again.rows[3])
    assert np.array_equal(np.delete(again.rows, 2, 0), np.delete(result.rows, 2, 0))


def test_a_hash_in_the_catalog_is_held_against_what_comes(files, tmp_path):
    images = in_memory(files)
    rows = [
        {"image": image, "label": "x", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for image, path in zip(images, files, strict=True)
    ]
    fsspec.filesystem("memory").pipe("/bucket/1.jpg", files[2].read_bytes())
    catalog = Catalog.from_rows(rows, root=tmp_path).write(tmp_path / "catalog.parquet")
    save_tiny(tmp_path / "tiny.pth")
    result = features(
        catalog, output=tmp_path / "features", weights=tmp_path / "tiny.pth", backbone=f"timm:{TINY}",
        num_workers=0, runtime="torch",
    )  # fmt: skip
    assert [(bad.image, bad.reason.split(";")[0]) for bad in result.unreadable] == [
        (images[1], "changed since the catalog was made")
    ]


def test_relative_shards_move_with_the_catalog(files, tmp_path):
    in_tar(files, tmp_path / "shard.tar")
    catalog = Catalog.from_rows([{"image": "tar://0001.jpg::shard.tar", "label": "x"}], root=tmp_path)
    assert not catalog.problems()
    assert catalog.source(0).read() == catalog.sources[0].read() == files[1].read_bytes()
    (tmp_path / "shard.tar").rename(tmp_path / "other.tar")
    assert "shard.tar does not exist" in catalog.problems()[0].message


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("memory://nowhere/a.jpg", "does not exist"),
        ("tar://nobody.jpg::{tar}", "no such member"),
        ("tar://a.jpg::{tmp}/none.tar", "does not exist"),
        ("tar://a.jpg::{image}", "no uncompressed tar file"),
        ("parquet://image/99::{parquet}", "99"),
        ("parquet://photo/0::{parquet}", "no column photo"),
        ("parquet://image/x::{parquet}", "x"),
        ("gopher://example.org/a.jpg", "gopher"),
        ("http://127.0.0.1:9/a.jpg", "http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_fetched_says_why(location, words, files, tmp_path, monkeypatch):
    monkeypatch.setattr("samething.images.source._WAITS_S", (0.01,))
    in_tar(files, tmp_path / "shard.tar")
    in_parquet(files, tmp_path / "table.parquet")
    places = {
        "tar": tmp_path / "shard.tar", "parquet": tmp_path / "table.parquet", "tmp": tmp_path,
        "image": files[0],
    }  # fmt: skip
    with pytest.raises(ImageError, match=words):
        Source(location.format(**places)).read()


def test_a_cut_shard_gives_what_is_whole(files, tmp_path):
    names = in_tar(files, tmp_path / "shard.tar")
    content = (tmp_path / "shard.tar").read_bytes()
    with tarfile.open(tmp_path / "shard.tar") as shard:
        last = shard.getmember("0005.jpg").offset_data
    (tmp_path / "shard.tar").write_bytes(content[: last + 100])
    assert Source(names[0]).read() == files[0].read_bytes()
    with pytest.raises(ImageError, match="0005"):
        Source(names[5]).read()


def test_a_network_that_fails_for_a_moment_is_asked_again(files, monkeypatch):
    from samething.images import source as sources

    monkeypatch.setattr(sources, "_WAITS_S", (0.01, 0.01))
    attempts = iter([TimeoutError("too slow"), ConnectionError("gone"), files[0].read_bytes()])

    def flaky(location, max_bytes):
        result = next(attempts)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(sources, "_open_and_read", flaky)
    assert Source("https://example.org/a.jpg").read() == files[0].read_bytes()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)  # of other tests
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(MissingExtraError, match=r"samething\[remote\]"):
        Source("s3://bucket/a.jpg").read()


def test_too_many_bytes_are_refused(files):
    in_memory(files)
    with pytest.raises(ImageError, match="bytes"):
        Source("memory://bucket/0.jpg").read(max_bytes=50)
    with pytest.raises(ImageError, match="bytes"):
        Source(str(files[0])).read(max_bytes=50)


def test_locations(tmp_path):
    assert located(tmp_path, "a b.jpg") == str(tmp_path / "a b.jpg")
    assert located(tmp_path, "s3://b/a.jpg") == "s3://b/a.jpg"
    assert located(tmp_path, "tar://a.jpg::s3://b/s.tar") == "tar://a.jpg::s3://b/s.tar"
