"""Atomic writes, manifests and locks, with real processes killed and real disks filled."""

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samething.errors import ArtefactError, FingerprintError, InputError
from samething.files import (
    MANIFEST_NAME,
    Manifest,
    atomic_path,
    differences,
    disk_errors,
    file_sha256,
    fingerprint,
    is_finished,
    only_one_writer,
    read_json,
    read_manifest,
    require_same,
    write_json,
    write_manifest,
    write_text,
)

SOURCES = Path(__file__).parents[1] / "src"

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=5), children, max_size=4)
    ),
    max_leaves=12,
)
json_objects = st.dictionaries(st.text(max_size=5), json_values, max_size=5)


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- atomic writes


@pytest.mark.parametrize("name", ["plain.txt", "with space.txt", "Größe-図書館.txt", "x" * 251 + ".txt"])
def test_text_arrives_whole_under_any_name_and_in_new_folders(tmp_path, name):
    target = tmp_path / "new folder" / "ünder" / name
    write_text(target, "snow: ☃\n")
    assert target.read_text(encoding="utf-8") == "snow: ☃\n"
    assert names(target.parent) == [name]


def test_an_exception_leaves_the_old_content_and_nothing_else(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError, match="stop"), atomic_path(target) as partial:
        partial.write_text("half of the new")
        raise RuntimeError("stop")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_reader_sees_old_or_new_content_but_no_mixture(tmp_path):
    target = tmp_path / "a.txt"
    contents = {"a" * 100_000, "b" * 100_000}
    write_text(target, "a" * 100_000)
    seen, done = set(), threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(target.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for content in sorted(contents):
            write_text(target, content)
    done.set()
    reader.join()
    assert seen <= contents


def test_kill_minus_nine_in_the_middle_leaves_the_old_content(tmp_path):
    target = tmp_path / "a.txt"
    write_text(target, "old")
    writer = run_python(
        "import sys, time; from pathlib import Path; from samething.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n",
        target,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "written\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    writer.stdout.close()
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2, "the temporary file of the killed writer"
    with only_one_writer(tmp_path):
        assert "a.txt" in names(tmp_path)
        assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_new_files_have_the_permissions_of_ordinary_ones(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    write_text(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_a_folder_or_a_device_is_no_target(tmp_path):
    with pytest.raises(InputError, match="is not a file"):
        write_text(tmp_path, "x")
    with pytest.raises(InputError, match="/dev/null is not a file"):
        write_text(Path("/dev/null"), "x")
    assert Path("/dev/null").is_char_device()


def test_a_file_among_the_parents_is_named_in_the_error(tmp_path):
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "file" / "a.txt", tmp_path / "file" / "b" / "a.txt"):
        with pytest.raises(InputError, match="parents are folders"):
            write_text(target, "x")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_name_too_long_for_the_file_system_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / ("x" * 300), "x")
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB; where mounting is not permitted, a limit on the size of files stands in."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if mounted:
        yield folder
        subprocess.run(["umount", str(folder)], check=True)
    else:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old_handler)


def test_a_full_disk_is_an_error_and_what_was_there_stays(small_disk):
    target = small_disk / "a.txt"
    write_text(target, "old")
    with pytest.raises(InputError, match="no space left") as caught:
        write_text(target, "x" * 1_000_000)
    assert "it resumes" in caught.value.next_step
    assert target.read_text() == "old"
    assert names(small_disk) == ["a.txt"]
    write_text(target, "new")
    assert target.read_text() == "new"


def test_a_read_only_disk_is_an_error(tmp_path):
    folder = tmp_path / "read only"
    folder.mkdir()
    write_text(folder / "a.txt", "old")
    if os.geteuid() != 0:
        folder.chmod(0o555)
        undo = ["chmod", "755", str(folder)]
    else:  # permission bits do not bind root; a read-only mount does
        mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("root without the right to mount; the translation is tested below")
        undo = ["umount", str(folder)]
    try:
        for action in (
            lambda: write_text(folder / "a.txt", "x"),
            lambda: only_one_writer(folder).__enter__(),
        ):
            with pytest.raises(InputError, match="cannot write") as caught:
                action()
            assert "-o" in caught.value.next_step
    finally:
        subprocess.run(undo, check=True)
    assert (folder / "a.txt").read_text() == "old"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EFBIG, "no space left"),
        (errno.EROFS, "cannot write"),
        (errno.EACCES, "cannot write"),
        (errno.EPERM, "cannot write"),
    ],
)
def test_errors_of_the_disk_are_translated(tmp_path, number, message):
    target = tmp_path / "a.txt"
    for filename in (None, str(target), str(tmp_path), bytes(target)):
        with pytest.raises(InputError, match=message) as caught, disk_errors(target):
            raise OSError(number, os.strerror(number), filename)
        assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(OSError, match="Stale"), disk_errors(tmp_path / "a"):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    with pytest.raises(InputError, match="the disk failed"), disk_errors(tmp_path / "a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(PermissionError), disk_errors(tmp_path / "out" / "a"):
        raise PermissionError(errno.EACCES, "denied", str(tmp_path / "source" / "image.jpg"))


# ---- JSON and fingerprints


@given(json_values)
@settings(max_examples=30)
def test_json_is_read_back_as_written(tmp_path_factory, value):
    target = tmp_path_factory.getbasetemp() / "value.json"
    if "\\ud" in json.dumps(value):  # lone surrogates are no text
        return
    write_json(target, value)
    assert read_json(target) == value


def test_json_that_is_missing_damaged_or_a_folder_is_an_artefact_error(tmp_path):
    with pytest.raises(ArtefactError, match="No such file"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(ArtefactError, match="Is a directory"):
        read_json(tmp_path)
    for content in (b"", b'{"a": ', b"\xff\xfe\x00"):
        (tmp_path / "damaged.json").write_bytes(content)
        with pytest.raises(ArtefactError, match="is not valid JSON"):
            read_json(tmp_path / "damaged.json")


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert names(tmp_path) == []


@given(json_objects, st.randoms(use_true_random=False))
def test_the_fingerprint_does_not_depend_on_key_order(value, random):
    def shuffled(item):
        if isinstance(item, dict):
            keys = list(item)
            random.shuffle(keys)
            return {key: shuffled(item[key]) for key in keys}
        return [shuffled(entry) for entry in item] if isinstance(item, list) else item

    assert fingerprint(shuffled(value)) == fingerprint(value)
    assert fingerprint(json.loads(json.dumps(value))) == fingerprint(value)
    assert len(fingerprint(value)) == 16


@given(json_values, json_values)
def test_the_fingerprint_tells_different_values_apart(left, right):
    same = json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
    assert (fingerprint(left) == fingerprint(right)) == same


def test_fingerprints_stay_what_they_are_between_versions():
    # printf '%s' '{"a":"\\u00e9","b":[1,2.5,null]}' | sha256sum
    assert fingerprint({"b": [1, 2.5, None], "a": "é"}) == "84afbf1d4853005f"


def test_file_sha256_is_the_known_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert file_sha256(tmp_path / "abc") == expected


# ---- manifests


def manifest(**changes) -> Manifest:
    parts = {"kind": "features", "format_version": 2, "made_from": {"mean": (0.5, 0.5), "name": "b"}}
    return Manifest(**{**parts, **changes})


@given(json_objects, json_objects)
@settings(max_examples=30)
def test_a_manifest_is_read_back_with_its_fingerprint(tmp_path_factory, made_from, content):
    folder = tmp_path_factory.getbasetemp() / "a manifest"
    if "\\ud" in json.dumps([made_from, content]):
        return
    written = manifest(made_from=made_from, content=content)
    write_manifest(folder, written)
    assert is_finished(folder)
    read = read_manifest(folder, kind="features", format_version=2)
    assert read == written
    assert read.fingerprint == written.fingerprint


def test_the_fingerprint_covers_kind_version_and_origin_but_not_the_content():
    base = manifest().fingerprint
    assert manifest(content={"rows": 3}).fingerprint == base
    others = [manifest(kind="run"), manifest(format_version=3), manifest(made_from={"name": "c"})]
    # an entry named like a field must not stand in for it
    others.append(manifest(made_from={**manifest().made_from, "kind": "features"}))
    assert base not in {other.fingerprint for other in others}


def test_a_folder_without_manifest_is_unfinished(tmp_path):
    (tmp_path / "features.npy").write_bytes(b"x")
    assert not is_finished(tmp_path)
    with pytest.raises(ArtefactError, match="not a finished features folder") as caught:
        read_manifest(tmp_path, kind="features", format_version=2)
    assert "resumes" in caught.value.next_step


def test_a_missing_folder_is_said_to_be_missing(tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        read_manifest(tmp_path / "nowhere", kind="features", format_version=2)


def test_another_kind_and_a_newer_format_are_refused(tmp_path):
    write_manifest(tmp_path, manifest())
    with pytest.raises(ArtefactError, match="is a features folder") as caught:
        read_manifest(tmp_path, kind="model", format_version=2)
    assert caught.value.expected == "a model folder"
    with pytest.raises(ArtefactError, match="format version 2") as caught:
        read_manifest(tmp_path, kind="features", format_version=1)
    assert "upgrade" in caught.value.next_step
    assert read_manifest(tmp_path, kind="features", format_version=3).format_version == 2


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "{}", '{"kind": "features", "format_version": "2", "made_from": {}, "content": {}}'],
)
def test_a_manifest_that_is_not_one_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ArtefactError, match="lacks"):
        read_manifest(tmp_path, kind="features", format_version=2)


def test_a_manifest_changed_by_hand_is_noticed(tmp_path):
    write_manifest(tmp_path, manifest())
    stored = read_json(tmp_path / MANIFEST_NAME)
    stored["made_from"]["name"] = "another backbone"
    write_json(tmp_path / MANIFEST_NAME, stored)
    with pytest.raises(ArtefactError, match="was changed"):
        read_manifest(tmp_path, kind="features", format_version=2)


@given(json_objects)
def test_a_description_does_not_differ_from_itself_read_back(made_from):
    as_tuples = {key: tuple(item) if isinstance(item, list) else item for key, item in made_from.items()}
    assert differences(as_tuples, json.loads(json.dumps(made_from))) == []


@given(json_objects, json_objects)
def test_descriptions_differ_where_an_entry_does(left, right):
    expected = {key for key in {*left, *right} if fingerprint(left.get(key)) != fingerprint(right.get(key))}
    found = [name for name, _, _ in differences(left, right)]
    assert all(any(name == key or name.startswith(f"{key}.") for key in expected) for name in found)
    # a nested object can differ only in entries that are null on one side; everything else must be named
    flat = {
        key
        for key in expected
        if not isinstance(left.get(key), dict) and not isinstance(right.get(key), dict)
    }
    assert flat <= set(found)


def test_require_same_names_the_entry_and_both_values():
    ours = {"backbone": "a", "size": {"v1.0": 224}, "mean": (0.5, 0.5)}
    require_same(ours, {"backbone": "a", "size": {"v1.0": 224}, "mean": [0.5, 0.5]}, what="x", next_step="y")
    with pytest.raises(FingerprintError) as caught:
        require_same(ours, {**ours, "size": {"v1.0": 384}}, what="F was made otherwise", next_step="y")
    assert caught.value.given == "F was made otherwise: size.v1.0 is 384"
    assert caught.value.expected == "size.v1.0 224"


# ---- one writer

HOLD = (
    "import sys, time; from pathlib import Path; from samething.files import only_one_writer\n"
    "with only_one_writer(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "a folder"
    first = run_python(HOLD, folder)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ArtefactError, match="another process is writing"), only_one_writer(folder):
        pass
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    with only_one_writer(folder):
        second = run_python(HOLD, folder)
        assert second.stdout is not None
        assert second.stdout.readline() == ""
        assert second.wait() == 1
        second.stdout.close()


def test_the_lock_is_free_again_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), only_one_writer(tmp_path):
        raise RuntimeError("stop")
    with only_one_writer(tmp_path):
        pass


def test_two_holders_in_one_process_are_two(tmp_path):
    with only_one_writer(tmp_path), pytest.raises(ArtefactError), only_one_writer(tmp_path):
        pass


def test_only_temporary_files_of_ours_are_cleared_away(tmp_path):
    (tmp_path / "blocks").mkdir()
    kept = [tmp_path / ".other.tmp", tmp_path / "a.samething.tmp", tmp_path / "blocks" / "b.npy"]
    gone = [tmp_path / ".a.0123.samething.tmp", tmp_path / "blocks" / ".b.npy.45.samething.tmp"]
    for path in kept + gone:
        path.write_text("x")
    with only_one_writer(tmp_path):
        assert all(path.exists() for path in kept)
        assert not any(path.exists() for path in gone)
