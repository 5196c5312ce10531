"""Copies of an index while others use it, and their way back."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from line import samething
from samething.errors import ArtefactError, InputError
from samething.index import SqliteIndex, back_up, create_index, open_index, restore

IDENTITY = {"dim": 4, "model_fingerprint": "f", "model_name": "m"}
# Adds batches of three rows until it is told to stop; names each when add has returned.
WRITER = """
import os, sys
import numpy as np
from samething.index import open_index
index = open_index(sys.argv[1])
batch = 0
while not os.path.exists(sys.argv[2]):
    index.add(np.eye(4, dtype=np.float32)[:3], [{"id": f"{batch}-{row}"} for row in range(3)])
    index.set_notes("collections", {"last": batch})
    print(batch, flush=True)
    batch += 1
"""


@pytest.fixture
def made(tmp_path):
    """An index with four rows and an uploaded image."""
    index = create_index(tmp_path / "ix", **IDENTITY)
    index.add(np.eye(4, dtype=np.float32), [{"id": name} for name in "abcd"])
    (tmp_path / "ix" / "uploads").mkdir()
    (tmp_path / "ix" / "uploads" / "u.jpg").write_bytes(b"an image")
    index.set_notes("uploads", {"uploads/u.jpg": {"label": "x", "domain": "d"}, "../else.jpg": {}})
    return index


def ids(index) -> list[str]:
    return sorted(name for batch in index.items([]) for name in batch["id"].to_pylist())


def test_a_backup_while_another_process_writes_is_one_state(made, tmp_path):
    stop = tmp_path / "stop"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, made.location, stop],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as writer:  # fmt: skip
        assert writer.stdout.readline() == "0\n", writer.stderr.read()
        copies = []
        for number in range(6):
            acknowledged = made.notes("collections")["last"]
            num_rows = back_up(made, tmp_path / f"copy {number}")
            if number == 2:
                made.compact()
            copies.append((acknowledged, num_rows, tmp_path / f"copy {number}"))
        stop.touch()
        assert writer.communicate()[1] == "" and writer.returncode == 0
    for acknowledged, num_rows, folder in copies:
        with open_index(folder) as copy:
            names = ids(copy)
            assert copy.verify().problems == () and len(names) == num_rows
            last = copy.notes("collections")["last"]
            batches = {int(name.split("-")[0]) for name in names if "-" in name}
            assert batches == set(range(len(batches))) and len(names) == 4 + 3 * len(batches)
            assert acknowledged <= last <= max(batches) <= last + 1  # rows come before the note
        assert (folder / "uploads" / "u.jpg").read_bytes() == b"an image"
    assert not list(tmp_path.glob(".*"))


def test_a_restored_index_is_followed_and_loses_only_what_came_later(made, tmp_path):
    back_up(made, tmp_path / "copy")
    reader = open_index(tmp_path / "ix")
    assert reader.count() == 4
    made.delete(["a"])
    made.add(np.eye(4, dtype=np.float32)[:1], [{"id": "late"}])
    (tmp_path / "ix" / "uploads" / "u.jpg").unlink()
    made.set_notes("uploads", {"uploads/u.jpg": None})
    done = samething("index", "restore", tmp_path / "copy", tmp_path / "ix")
    assert done.returncode == 0 and "4 rows" in done.stdout, done.stderr
    for index in (made, reader, open_index(tmp_path / "ix")):
        assert ids(index) == ["a", "b", "c", "d"] and index.verify().problems == ()
        assert set(index.notes("uploads")) == {"uploads/u.jpg", "../else.jpg"}
    assert (tmp_path / "ix" / "uploads" / "u.jpg").read_bytes() == b"an image"
    made.compact()
    reader.add(np.eye(4, dtype=np.float32)[:1], [{"id": "again"}])
    assert len(ids(made)) == 5 and len(list((tmp_path / "ix").glob("rows-*.sqlite"))) == 1
    shutil.rmtree(tmp_path / "ix")
    assert samething("index", "restore", tmp_path / "copy", tmp_path / "ix").returncode == 0
    assert ids(open_index(tmp_path / "ix")) == ["a", "b", "c", "d"]


def test_damage_is_not_copied(made, tmp_path):
    back_up(made, tmp_path / "copy")
    for folder in (tmp_path / "ix", tmp_path / "copy"):
        content = bytearray((folder / "vectors-1.f32").read_bytes())
        content[5] ^= 1
        (folder / "vectors-1.f32").write_bytes(content)
    with pytest.raises(ArtefactError, match="vectors-1"):
        back_up(SqliteIndex.open(tmp_path / "ix"), tmp_path / "other")
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(ArtefactError, match="vectors-1"):
        restore(SqliteIndex.open(tmp_path / "copy"), SqliteIndex.open(tmp_path / "ix"))
    assert len(list((tmp_path / "ix").glob("rows-*.sqlite"))) == 1


def test_a_backup_takes_no_place_of_something_else(made, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(InputError, match=r"letter\.txt"):
        back_up(made, tmp_path / "mine")
    done = samething("index", "backup", tmp_path / "ix", tmp_path / "copy")
    assert done.returncode == 0 and "4 rows" in done.stdout and "verified" in done.stdout, done.stderr
    assert samething("index", "backup", tmp_path / "ix", tmp_path / "copy").returncode == 1
    assert Path(tmp_path / "copy" / "uploads" / "u.jpg").exists()
