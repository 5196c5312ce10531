"""Damage: one flipped bit in any artefact is refused when it is opened, and named by ``samething verify``."""

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from samething import checksums
from samething.catalog import Catalog
from samething.catalog.tables import SCHEMA
from samething.checksums import checksums_of, require_whole
from samething.cli import main
from samething.embedder import Embedder
from samething.errors import ArtefactError
from samething.export import export
from samething.features import FeatureSet
from samething.files import Manifest, read_json, read_manifest, write_json, write_manifest
from samething.search import verify
from samething.study.study_folder import StudyFolder
from samething.training import train
from samething.training.run import Run
from scenes import feature_folder
from test_training import QUICK, interrupted

OPENED = {
    "things.parquet": Catalog.read,
    "features": FeatureSet.open,
    "run": Run.open,
    "model": Embedder.load,
}
READ = {
    "things.parquet": [""],
    "features": ["*/features.npy", "*/catalog.parquet", "*/unreadable.csv", "manifest.json"],
    "run": ["head.safetensors", "metrics.jsonl", "manifest.json"],
    "model": ["model.onnx", "config.json", "manifest.json"],
}
"""The files of each artefact that are read when it is opened."""


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit."""
    with path.open("rb+") as stream:
        place = rng.randrange(path.stat().st_size)
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << rng.randrange(8)]))


@pytest.fixture(scope="module")
def artefacts(line, tmp_path_factory) -> Path:
    """Copies of the line's artefacts; a test puts back what it damages."""
    folder = tmp_path_factory.mktemp("artefacts")
    for name in OPENED:
        (shutil.copytree if (line / name).is_dir() else shutil.copy)(line / name, folder / name)
    return folder


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in READ.items() for file in files])
def test_one_flipped_bit_is_refused(artefacts, name, file):
    """Before, flips in head, features, their catalog and the metrics were taken for what was written.

    Of a manifest only what decides the content was covered, not the numbers of what came out.
    """
    (path,) = (artefacts / name).glob(file) if file else (artefacts / name,)
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(20):
        flip(path, rng)
        with pytest.raises(ArtefactError) as error:
            OPENED[name](artefacts / name)
        assert error.value.next_step
        path.write_bytes(whole)
    OPENED[name](artefacts / name)


@pytest.mark.parametrize("name", OPENED)
def test_verify_names_every_damaged_file(artefacts, tmp_path, name):
    """Before, there was no command to check a catalog, features, a run or a model that had been copied."""
    assert verify(artefacts / name).exit_status == 0
    copied = tmp_path / name
    (shutil.copytree if (artefacts / name).is_dir() else shutil.copy)(artefacts / name, copied)
    files = [path for path in copied.rglob("*") if path.is_file()]
    # locks and what was measured on this machine are nobody's content
    files = [path for path in files if "/." not in f"/{path.relative_to(copied).as_posix()}"]
    rng = random.Random(1)
    for path in files or [copied]:
        whole = path.read_bytes()
        if not whole:
            continue
        flip(path, rng)
        try:
            found = verify(copied)
        except ArtefactError as error:  # the file that names the others
            assert path == copied or path.name == "manifest.json", error
        else:
            assert found.exit_status == 1 and str(path) in "\n".join(found.problems)
        path.write_bytes(whole)
    if copied.is_dir():
        max(files, key=lambda path: path.stat().st_size).unlink()
        assert "does not exist" in verify(copied).problems[0]


def test_verify_is_a_command(line, tmp_path, capsys):
    shutil.copy(line / "things.parquet", tmp_path / "c.parquet")
    flip(tmp_path / "c.parquet", random.Random(0))
    shutil.copytree(line / "run", tmp_path / "run")
    flip(tmp_path / "run" / "checkpoints" / "last.pt", random.Random(0))
    whole = [(line / name, 0, "0 damages") for name in (*OPENED, "index")]
    for path, status, text in (
        *whole,
        (tmp_path / "c.parquet", 1, "c.parquet was changed"),
        (tmp_path / "run", 1, "last.pt was changed"),
        (tmp_path / "nothing", 1, "does not exist"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["verify", str(path)])
        assert exit_.value.code == status
        assert text in " ".join("".join(capsys.readouterr()).split())


def test_every_byte_of_a_catalog_counts(tmp_path):
    """Before, 16 of 22 flips in a catalog were accepted: other labels, other paths, another root."""
    rows = [{"image": f"{n}.jpg", "label": f"thing {n // 2}", "price": n} for n in range(30)]
    path = Catalog.from_rows(rows, root=tmp_path).write(tmp_path / "c.parquet")
    whole, truth = path.read_bytes(), Catalog.read(path)
    stated = pq.read_metadata(path).metadata[b"samething.sha256"]
    assert len(stated) == 64 and set(stated) - {ord("0")}
    key = range(whole.rindex(b"samething.sha256"), whole.rindex(b"samething.sha256") + 16)
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            read = Catalog.read(path)
        except ArtefactError:
            continue
        assert place in key and read.table.equals(truth.table), place
    path.write_bytes(whole)
    assert Catalog.read(path).table.equals(truth.table)


def test_tables_without_a_checksum_are_read_as_before_and_verify_says_so(tmp_path):
    table = Catalog.from_rows([{"image": "a.jpg", "label": "a"}], root=tmp_path).table.select(SCHEMA.names)
    pq.write_table(table, tmp_path / "foreign.parquet")
    assert len(Catalog.read(tmp_path / "foreign.parquet")) == 1
    with pytest.raises(ArtefactError, match="no checksum"):
        verify(tmp_path / "foreign.parquet")


def test_artefacts_of_earlier_versions_are_read(tmp_path):
    """Features noted one checksum, which was never compared; runs and studies noted none."""
    made = feature_folder(tmp_path / "features")
    train(made.folder, output=tmp_path / "run", **QUICK)
    for folder, sha256 in (
        (made.folder, checksums.file_sha256(next(made.folder.rglob("features.npy")))),
        (tmp_path / "run", None),
    ):
        stored = read_json(folder / "manifest.json")
        for name in ("sha256", "bytes"):
            stored["content"].pop(name, None)
        stored["content"] |= {"sha256": sha256} if sha256 else {}
        stored.pop("content_fingerprint", None)
        write_json(folder / "manifest.json", stored)
    FeatureSet.open(made.folder)
    Run.open(tmp_path / "run")
    with pytest.raises(ArtefactError, match="earlier version"):
        verify(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1\n')  # a traceback before
    with pytest.raises(ArtefactError, match="metrics"):
        Run.open(tmp_path / "run")
    flip(next(made.folder.rglob("features.npy")), random.Random(0))
    with pytest.raises(ArtefactError, match=r"features\.npy was changed"):
        FeatureSet.open(made.folder)


def test_a_damaged_checkpoint_is_not_gone_on_with(tmp_path):
    """Before, 60 of 60 flips were trained on with; torch does not look at the checksums of its own format."""
    features = feature_folder(tmp_path / "features")
    interrupted(features, tmp_path / "run", QUICK, after=1)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    whole, rng = path.read_bytes(), random.Random(0)
    for _ in range(20):
        flip(path, rng)
        with pytest.raises(ArtefactError, match=r"last\.pt was changed or damaged"):
            train(features.folder, output=tmp_path / "run", **QUICK)
        path.write_bytes(whole)
    train(features.folder, output=tmp_path / "run", **QUICK)


def test_an_export_of_a_damaged_head_is_refused(artefacts, tmp_path):
    """Before, wrong weights went into the model, whose own checksums then vouched for them."""
    run = shutil.copytree(artefacts / "run", tmp_path / "run")
    flip(run / "head.safetensors", random.Random(3))
    with pytest.raises(ArtefactError, match=r"head\.safetensors was changed"):
        export(run, output=tmp_path / "model")


def test_a_finished_study_with_a_damaged_log_is_refused(tmp_path):
    with StudyFolder.claimed(tmp_path, {"of": "x"}) as study:
        study.scores({"seed": 0}, lambda work: np.array([0.5]))
        study.finish({})
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text().replace("0.5", "0.7"))
    with (
        pytest.raises(ArtefactError, match=r"log\.jsonl was changed"),
        StudyFolder.claimed(tmp_path, {"of": "x"}),
    ):
        pass


@pytest.fixture
def marked(tmp_path, monkeypatch) -> list[Path]:
    """An artefact whose files are all large enough for a mark; gives the files that were read through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_MARKED_FROM_BYTES", 1)
    (tmp_path / "artefact").mkdir()
    (tmp_path / "artefact" / "rows").write_bytes(b"0123456789")
    content = checksums_of(tmp_path / "artefact")
    write_manifest(
        tmp_path / "artefact", Manifest(kind="features", format_version=1, made_from={}, content=content)
    )
    read: list[Path] = []
    real = checksums.file_sha256
    monkeypatch.setattr(checksums, "file_sha256", lambda path: (read.append(path), real(path))[1])
    return read


def test_a_large_file_is_read_through_once_and_again_when_it_changed(marked, tmp_path):
    folder = tmp_path / "artefact"
    manifest = read_manifest(folder)
    for _ in range(3):
        require_whole(folder, manifest)
    assert len(marked) == 1
    before = (folder / "rows").stat()
    (folder / "rows").write_bytes(b"0123456780")
    os.utime(folder / "rows", ns=(before.st_atime_ns, before.st_mtime_ns))  # as some copying programs do
    with pytest.raises(ArtefactError, match="rows was changed"):
        require_whole(folder, manifest)
    assert len(marked) == 2


def test_verify_reads_whatever_the_marks_say_and_a_cache_that_cannot_be_written_is_no_error(marked, tmp_path):
    folder = tmp_path / "artefact"
    manifest = read_manifest(folder)
    require_whole(folder, manifest)
    (mark,) = (tmp_path / "cache").rglob("checked/*")
    assert verify(folder).problems == () and len(marked) == 2
    for content in (b"", mark.read_bytes()[:-5]):  # cut short by a loss of power
        mark.write_bytes(content)
        require_whole(folder, manifest)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("a file where the folder should be")
    require_whole(folder, manifest)
