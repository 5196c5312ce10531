"""The whole line on a few images, from a folder to an answer, and what can go wrong on the way."""

import contextlib
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from line import blocks, commands_of, run_python, samething
from samething.catalog import Catalog
from samething.datasets import catalog
from samething.errors import ArtefactError, FingerprintError, InputError, SamethingError
from samething.evaluation import evaluate
from samething.export import export
from samething.features import FeatureSet, features
from samething.files import file_sha256, read_manifest
from samething.search import Searcher, find, index
from samething.training import train
from samething.training.run import Run
from scenes import write_things

# ---- the line as it should be


def test_the_tutorials_commands_end_with_the_right_answer(line):
    answer = (line / "6.out").read_text(encoding="utf-8")
    assert "some-image.jpg" in answer
    first = next(row for row in answer.splitlines() if row.strip("│ ").startswith("1 "))
    assert "thing 03 é" in first and float(first.strip("│ ").split()[1]) > 0.98  # rows are codes
    table = (line / "3.out").read_text(encoding="utf-8")
    assert all(
        name in table for name in ("backbone", "average-pool-512 int4", "PCA-512 int4", "run", "mMP@5")
    )


def test_each_artefact_says_what_it_was_made_from(line):
    images = Catalog.read(line / "things.parquet")
    manifests = {
        kind: read_manifest(line / kind, kind=kind, format_version=version)
        for kind, version in (("features", 1), ("run", 1), ("model", 2), ("index", 3))
    }
    assert manifests["features"].made_from["catalog"] == images.fingerprint
    assert manifests["features"].fingerprint in json.dumps(dict(manifests["run"].made_from))
    assert manifests["model"].made_from["run"] == manifests["run"].fingerprint
    assert manifests["model"].made_from["head"] == file_sha256(line / "run" / "head.safetensors")
    assert manifests["model"].fingerprint in json.dumps(dict(manifests["index"].made_from))
    assert FeatureSet.open(line / "features").rows.shape == (48, 1280)
    assert Searcher.open(line / "index").index.count() == 48


def test_the_same_again_reuses_everything_and_says_so(line_copy):
    before = {path: path.stat().st_mtime_ns for path in line_copy.rglob("*") if path.is_file()}
    whole = features(
        line_copy / "things.parquet", backbone="efficientnet_lite0", output=line_copy / "features"
    )
    run = train(line_copy / "features", output=line_copy / "run")
    model = export(line_copy / "run", output=line_copy / "model")
    assert run.was_finished
    assert model.largest_difference is None and "was there already" in model.__rich__()
    searcher = index(line_copy / "my-images", model=line_copy / "model", output=line_copy / "index")
    assert len(whole.catalog) == 48
    assert searcher.exit_status == 0
    changed = {
        path.relative_to(line_copy).as_posix()
        for path, when in before.items()
        if path.exists() and path.stat().st_mtime_ns != when
    }
    assert not {name for name in changed if name.startswith(("features/data", "run/", "model/m"))}


def test_a_second_index_of_the_same_folder_keeps_every_image(line_copy):
    commands = {command[0]: command for command in commands_of()}
    # the images' paths are their names in the index, so the copy makes its own
    shutil.rmtree(line_copy / "index")
    first = samething(*commands["index"], cwd=line_copy)
    again = samething(*commands["index"], cwd=line_copy)
    assert "48 new, 0 were there already" in first.stdout
    assert "0 new, 48 were there already" in again.stdout
    assert (first.returncode, again.returncode) == (0, 0)


@pytest.mark.slow
def test_ten_lines_of_python_as_written(line_copy):
    for made in ("run", "model", "index"):  # the ten lines train with other options
        shutil.rmtree(line_copy / made)
    (code,) = blocks("python")
    assert len([row for row in code.splitlines() if row and not row.startswith(("from", "import"))]) <= 10
    done = run_python("-c", code, cwd=line_copy)
    assert done.returncode == 0, done.stderr
    assert "'mmp@5'" in done.stdout and "thing 03 é" in done.stdout
    numbers = json.loads((line_copy / "numbers.json").read_text(encoding="utf-8"))
    assert set(numbers) == {"backbone", "average-pool-512 int4", "PCA-512 int4", "run"}
    assert numbers["run"]["merged"]["mean"]["r@1"] > 0.8


def test_the_numbers_of_a_run_are_those_of_its_embeddings(line, tmp_path):
    """The neutral interface, fed with the run's own embeddings, says what the run's evaluation says."""
    run = Run.open(line / "run")
    whole = run.features()
    np.save(tmp_path / "E.npy", run.head.embed(whole.rows))
    whole.catalog.write(tmp_path / "c.parquet")
    neutral = evaluate(embeddings=tmp_path / "E.npy", catalog=tmp_path / "c.parquet").to_json()
    own = evaluate(line / "run", baselines=False).to_json()["run"]
    for protocol in ("merged", "per_domain"):
        for domain, row in own[protocol].items():
            assert neutral[protocol][domain] == pytest.approx(row), domain


# ---- bad input


@pytest.mark.slow
def test_an_unreadable_image_ends_with_status_3_everywhere(line_copy):
    (line_copy / "my-images" / "thing 00 é" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing more")
    good = (line_copy / "my-images" / "thing 00 é" / "view 0.jpg").read_bytes()
    (line_copy / "my-images" / "thing 00 é" / "cut.jpg").write_bytes(good[: len(good) // 2])
    done = {command[0]: samething(*command, cwd=line_copy) for command in commands_of()[:2]}
    shutil.rmtree(line_copy / "index")
    done["index"] = samething(*commands_of()[5], cwd=line_copy)
    for command, result in done.items():
        assert result.returncode == 3, (command, result.stdout, result.stderr)
        assert ("broken.jpg" if command != "features" else "cut.jpg") in result.stdout, command
    listed = FeatureSet.open(line_copy / "features")
    assert len(listed.catalog) == 48
    assert "48 new" in done["index"].stdout


def test_a_folder_without_images(tmp_path, line):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no image")
    with pytest.raises(InputError, match="no images"):
        catalog(tmp_path / "notes", domain="things", output=tmp_path / "c.parquet")
    with pytest.raises(InputError, match="no images"):
        index(tmp_path / "notes", model=line / "model", output=tmp_path / "index")
    assert not (tmp_path / "c.parquet").exists() and not (tmp_path / "index").exists()
    with pytest.raises(SamethingError, match="does not exist"):
        index(tmp_path / "nowhere", model=line / "model", output=tmp_path / "index")


def narrowed(line: Path, tmp_path: Path, keep) -> Path:
    """The line's features with other roles, made from cached rows in no time."""
    folder = shutil.copytree(line / "features", tmp_path / "features")
    images = Catalog.read(line / "things.parquet")
    roles = [keep(row, label) for row, label in enumerate(images.strings("label"))]
    images.with_column("role", roles).write(tmp_path / "c.parquet")
    features(tmp_path / "c.parquet", output=folder, root=line / "my-images", runtime="torch")
    return folder


def test_fewer_than_two_classes(line, tmp_path):
    folder = narrowed(line, tmp_path, lambda _, label: "train" if label.startswith("thing 00") else "val")
    with pytest.raises(InputError) as error:
        train(folder, output=tmp_path / "run")
    assert "1" in error.value.given and "two" in error.value.expected
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_labels_with_one_image_are_left_out_and_it_is_said(line, tmp_path):
    def keep(row, label):
        number = int(label.split()[1])
        return "train" if number < 6 or row % 4 == 0 else "val"

    run = train(narrowed(line, tmp_path, keep), output=tmp_path / "run", epochs=1.0)
    assert run.manifest.content["num_classes"] == 6 and run.manifest.content["num_images"] == 24
    assert "6" in str(run.__rich__()) and "one image" in str(run.__rich__())


def test_another_models_index_is_refused_with_both_names(line_copy):
    other = line_copy / "other model"
    train(line_copy / "features", output=line_copy / "other run", epochs=1.0, seed=5)
    # the graph is not looked at before the fingerprints, so the whole export need not run twice
    shutil.copytree(line_copy / "model", other)
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, "name": "other model"}), encoding="utf-8")
    rewrite_manifest(other, run=Run.open(line_copy / "other run").manifest.fingerprint)
    for action in (
        lambda: find(line_copy / "some-image.jpg", index=line_copy / "index", model=other),
        lambda: index(line_copy / "my-images", model=other, output=line_copy / "index"),
    ):
        with pytest.raises(FingerprintError) as error:
            action()
        text = str(error.value)
        assert "other model" in text and "'model'" in text


def rewrite_manifest(folder: Path, **made_from: object) -> None:
    """Another identity for a model folder, with checksums that fit."""
    from samething.files import Manifest, write_manifest

    manifest = read_manifest(folder, kind="model", format_version=2)
    content = {"sha256": {name: file_sha256(folder / name) for name in manifest.content["sha256"]}}
    made = {**manifest.made_from, **made_from}
    write_manifest(folder, Manifest(kind="model", format_version=2, made_from=made, content=content))


def test_moved_images_and_a_moved_model(line_copy):
    (line_copy / "my-images").rename(line_copy / "elsewhere")
    with pytest.raises(ArtefactError, match="my-images"):
        features(line_copy / "things.parquet", output=line_copy / "new features")
    with pytest.raises(ArtefactError, match="my-images"):
        index(line_copy / "things.parquet", model=line_copy / "model", output=line_copy / "new index")
    assert not (line_copy / "new features" / "manifest.json").exists()
    (line_copy / "model").rename(line_copy / "moved model")
    with pytest.raises(ArtefactError, match="--model"):
        find(line_copy / "some-image.jpg", index=line_copy / "index")
    found = find(
        line_copy / "some-image.jpg", index=line_copy / "index", model=line_copy / "moved model", k=1
    )
    assert found.matches[0].label == "thing 03 é"
    (line_copy / "features").rename(line_copy / "moved features")
    with pytest.raises(ArtefactError, match="features"):
        export(line_copy / "run", output=line_copy / "new model")


def test_an_index_and_its_model_may_be_moved_together(line_copy):
    whole = line_copy.rename(line_copy.parent / "elsewhere")
    assert find(whole / "some-image.jpg", index=whole / "index", k=1).matches[0].label == "thing 03 é"


def test_runs_on_different_catalogs_are_not_compared(line, tmp_path):
    folder = narrowed(line, tmp_path, lambda row, _: "train" if row < 24 else "query+index")
    other = train(folder, output=tmp_path / "other", epochs=1.0)
    with pytest.raises(InputError, match="different catalogs"):
        evaluate(line / "run", other.folder)
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate()


def test_a_catalog_without_test_images_can_be_exported_but_not_evaluated(line, tmp_path):
    folder = narrowed(line, tmp_path, lambda row, _: "train" if row < 24 else "val")
    run = train(folder, output=tmp_path / "run", epochs=1.0)
    with pytest.raises(InputError, match="0 query images"):
        evaluate(run.folder)


# ---- the disk


@contextlib.contextmanager
def full_disk(largest_file: int):
    """No file of this process may grow beyond a number of bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_while_describing(tmp_path):
    write_things(tmp_path / "p", num_things=3)
    catalog(tmp_path / "p", domain="things", output=tmp_path / "c.parquet")
    job = {"output": tmp_path / "f", "batch_size": 4, "runtime": "torch"}
    with full_disk(20_000), pytest.raises(InputError, match="no space left"):
        features(tmp_path / "c.parquet", **job)  # a block has 10 kB, the whole 31 kB
    assert not (tmp_path / "f" / "manifest.json").exists()
    with pytest.raises(ArtefactError, match="not a finished features"):
        FeatureSet.open(tmp_path / "f")
    resumed = features(tmp_path / "c.parquet", **job)
    undisturbed = features(tmp_path / "c.parquet", **{**job, "output": tmp_path / "g"})
    assert np.array_equal(resumed.rows, undisturbed.rows)


@pytest.mark.slow
def test_a_full_disk_while_training(line, tmp_path):
    with full_disk(100_000), pytest.raises(InputError, match="no space left"):
        train(line / "features", output=tmp_path / "run", epochs=2.0)
    with pytest.raises(ArtefactError, match="not a finished run"):
        Run.open(tmp_path / "run")
    resumed = train(line / "features", output=tmp_path / "run", epochs=2.0)
    undisturbed = train(line / "features", output=tmp_path / "again", epochs=2.0)
    assert resumed.records == undisturbed.records


@pytest.mark.parametrize("name", [pytest.param("model.safetensors", marks=pytest.mark.slow), "model.onnx"])
def test_a_full_disk_while_exporting(line, tmp_path, name):
    largest_file = (
        line / "model" / name
    ).stat().st_size - 1000  # the graph is a little larger than the weights
    with full_disk(largest_file), pytest.raises(InputError, match="no space left"):
        export(line / "run", output=tmp_path / "model")
    assert not (tmp_path / "model" / "manifest.json").exists()
    assert not list(tmp_path.rglob("*.samething.tmp"))
    if name == "model.safetensors":
        resumed = export(line / "run", output=tmp_path / "model")
        assert resumed.largest_difference is not None
        assert {path.name for path in resumed.folder.iterdir()} - {".lock"} == {
            path.name for path in (line / "model").iterdir()
        } - {".lock"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_target(line, tmp_path):
    tmp_path.chmod(0o555)
    for action in (
        lambda: catalog(line / "my-images", domain="d", output=tmp_path / "c.parquet"),
        lambda: features(line / "things.parquet", output=tmp_path / "f"),
        lambda: train(line / "features", output=tmp_path / "r"),
        lambda: export(line / "run", output=tmp_path / "m"),
        lambda: index(line / "my-images", model=line / "model", output=tmp_path / "i"),
    ):
        with pytest.raises(InputError, match="cannot write"):
            action()


def test_a_target_whose_parent_is_a_file(line, tmp_path):
    """Refused by the system for every user, unlike permissions."""
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "below"
    for action in (
        lambda: catalog(line / "my-images", domain="d", output=target),
        lambda: features(line / "things.parquet", output=target),
        lambda: train(line / "features", output=target),
        lambda: export(line / "run", output=target),
        lambda: index(line / "my-images", model=line / "model", output=target),
        lambda: evaluate(line / "run", json=target, baselines=False),
    ):
        with pytest.raises(InputError, match="cannot write"):
            action()
