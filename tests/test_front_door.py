"""Any folder, one command: a backbone's name as the model, the choice where none is named, no hub."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from fake_hub import fake_hub
from line import ENVIRONMENT
from samething.backbones.backbone_table import BACKBONES, RECOMMENDED
from samething.embedder import Embedder
from samething.errors import ArtefactError, InputError
from samething.images import decode, prepare
from samething.search import find, index, rebuild, sync
from samething.search.model_choice import choose_model
from scenes import write_things
from small_backbone import NAME, colours


@pytest.fixture
def images(tmp_path):
    return write_things(tmp_path / "photos", num_things=3)


def vectors_of(paths) -> np.ndarray:
    """What the backbone says, in torch."""
    backbone = colours()
    pixels = np.stack([prepare(decode(path), backbone.preprocessing) for path in paths])
    with torch.inference_mode():
        return backbone(torch.from_numpy(pixels)).numpy()


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_folder_is_searched_with_a_backbones_name_alone(images, tmp_path, monkeypatch):
    """Without a trained head there was no model folder, and nobody could search."""
    made = index(images, model=NAME, output=tmp_path / "index")
    assert (made.num_added, made.embedder.dim) == (12, 96)
    paths = sorted(images.rglob("*.jpg"))
    np.testing.assert_allclose(made.embedder.embed(paths), unit(vectors_of(paths)), atol=1e-4)
    assert Embedder.load(made.embedder.folder).config["training"] is None
    assert "nothing was trained" in (made.embedder.folder / "README.md").read_text("utf-8")
    assert find(paths[0], index=tmp_path / "index", k=1).matches[0].path == str(paths[0])
    named = find(paths[0], index=tmp_path / "index", model=NAME, k=1)  # as an engine elsewhere needs it
    assert named.matches[0].path == str(paths[0])
    # from now on nothing needs the backbone: the folder beside the index is the model
    monkeypatch.setattr("samething.backbones.loading.load_backbone", None)
    shutil.copy(paths[0], images / "more.jpg")
    assert sync(tmp_path / "index").changes.num_moved == 1
    more = write_things(tmp_path / "more photos", num_things=5)
    grown = index(more, output=tmp_path / "index")
    assert grown.embedder.fingerprint == made.embedder.fingerprint and grown.index.count() > 12
    again = index(images, model=NAME, output=tmp_path / "index")
    assert (again.num_added, again.embedder.folder) == (0, made.embedder.folder)


def test_principal_components_of_the_folder_itself(images, tmp_path):
    made = index(images, model=NAME, dim=5, output=tmp_path / "index")
    assert made.embedder.dim == 5
    paths = sorted(images.rglob("*.jpg"))
    # a second way: the singular vectors of centred features of unit length; they are stored in float16
    rows = unit(vectors_of(paths).astype(np.float64))
    centred = rows - rows.mean(axis=0)
    expected = unit(centred @ np.linalg.svd(centred, full_matrices=False)[2][:5].T)
    found = made.embedder.embed(paths)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=2e-3)
    rebuilt = rebuild(tmp_path / "index", model=NAME)  # by name as well, its folder beside the other
    assert rebuilt.embedder.dim == 96 and rebuilt.index.count() == 12
    assert find(paths[3], index=tmp_path / "index", k=1).matches[0].path == str(paths[3])
    with pytest.raises(InputError, match="--dim 5 with the model"):
        index(images, model=made.embedder.folder, dim=5, output=tmp_path / "other")
    with pytest.raises(InputError, match="--dim 20 with 12 images"):
        index(images, model=NAME, dim=20, output=tmp_path / "other")
    with pytest.raises(InputError, match="did you mean dinov2_small"):
        index(images, model="dinov2_smal", output=tmp_path / "other")


FIRST, SECOND = RECOMMENDED[0], RECOMMENDED[1]


@pytest.mark.parametrize(
    ("configured", "on_disk", "has_torch", "hub_answers", "has_packaged", "expected"),
    [
        ("mine", {FIRST.name}, True, True, True, "mine"),
        (None, {SECOND.name, FIRST.name}, True, True, True, FIRST.name),
        (None, {SECOND.name}, True, True, True, SECOND.name),
        (None, (), True, True, True, FIRST.name),
        (None, {FIRST.name}, False, True, False, FIRST.onnx),
        (None, (), False, True, True, FIRST.onnx),
        (None, (), True, False, True, "efficientnet_lite0"),
        (None, (), True, False, False, None),
        (None, {FIRST.name}, False, False, True, None),
    ],
)
def test_the_choice_where_no_model_is_named(
    configured, on_disk, has_torch, hub_answers, has_packaged, expected
):
    known = {"has_torch": has_torch, "hub_answers": hub_answers, "has_packaged": has_packaged}
    if expected is None:
        with pytest.raises(InputError, match=r"samething\[demo\].*--yes.*--model FOLDER"):
            choose_model(configured=configured, on_disk=on_disk, **known)
        return
    chosen = choose_model(configured=configured, on_disk=on_disk, **known)
    assert chosen.name == expected and chosen.why
    assert chosen.is_fetched == (
        (expected in (FIRST.name, FIRST.onnx) and not on_disk) or expected == FIRST.onnx
    )


def test_the_recommended_ones_are_free_and_of_the_table():
    assert all(BACKBONES[each.name].licence == "Apache-2.0" and each.reason for each in RECOMMENDED)
    assert all(each.images_per_s > 0 and each.memory_mb > 0 for each in RECOMMENDED)


CHOICE = """
import sys
from samething.search import model_choice
print(model_choice._chosen(yes="--yes" in sys.argv))
"""


def chosen_with(tmp_path, *arguments, **environment) -> subprocess.CompletedProcess:
    """The choice of a process of its own, with nobody at its terminal and an empty cache."""
    everything = {**ENVIRONMENT, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*", **environment}
    return subprocess.run(
        [sys.executable, "-c", CHOICE, *arguments], cwd=tmp_path, env=everything, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.mark.slow
def test_nothing_large_is_fetched_where_nobody_can_be_asked(tmp_path):
    with fake_hub() as hub:
        done = chosen_with(tmp_path, HF_ENDPOINT=hub.address)
        assert done.stdout.split() == ["efficientnet_lite0"]
        said = " ".join(done.stderr.split())
        assert "about 372 MB" in said and "licence Apache-2.0" in said and "--yes fetches it" in said
        assert chosen_with(tmp_path, "--yes", HF_ENDPOINT=hub.address).stdout.split() == [FIRST.name]
        named = chosen_with(tmp_path, HF_ENDPOINT=hub.address, SAMETHING_MODEL="dinov2_small_518")
        assert named.stdout.split() == ["dinov2_small_518"]
        (tmp_path / "samething.toml").write_text('model = "siglip2_base_224"\n', encoding="utf-8")
        assert chosen_with(tmp_path, HF_ENDPOINT=hub.address).stdout.split() == ["siglip2_base_224"]
    (tmp_path / "samething.toml").unlink()
    assert chosen_with(tmp_path, HF_ENDPOINT=hub.address).stdout.split() == ["efficientnet_lite0"]  # gone


@pytest.mark.parametrize(("typed", "expected"), [(b"n\n", "efficientnet_lite0"), (b"\n", FIRST.name)])
def test_a_person_is_asked_before_anything_large_is_fetched(tmp_path, typed, expected):
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    person, terminal = pty.openpty()
    with (
        fake_hub() as hub,
        os.fdopen(person, "wb", buffering=0) as keyboard,
        os.fdopen(terminal, "rb") as asked,
    ):
        keyboard.write(typed)
        done = subprocess.run(
            [sys.executable, "-c", CHOICE], cwd=tmp_path, stdin=asked, capture_output=True, text=True,
            timeout=120, check=True,
            env={**ENVIRONMENT, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.address, "NO_PROXY": "*"},
        )  # fmt: skip
    assert done.stdout.split() == [expected]
    assert "licence Apache-2.0. Fetch it? [Y/n]" in " ".join(done.stderr.split())


@contextlib.contextmanager
def silent_host():
    """A host that hangs up on everyone; yields its address and the list of calls."""
    calls: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listening.accept()[0].close()
                    calls.append(1)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", calls
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


HUB_USERS = """
import sys
from samething.backbones import load_backbone
from samething.embedder import Embedder
from samething.errors import ArtefactError
for use in (
    lambda: load_backbone("siglip2_base_224"),
    lambda: load_backbone("hf:someone/else"),
    lambda: load_backbone("clip_dfn_base_224"),
    lambda: Embedder.load("someone/finder"),
):
    try:
        use()
    except ArtefactError as error:
        print("refused")
"""


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    """Every client tried five times over 46 s, and so did every access after it."""
    with silent_host() as (address, calls):
        done = subprocess.run(
            [sys.executable, "-c", HUB_USERS], capture_output=True, text=True, timeout=300, check=False,
            env={**ENVIRONMENT, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "NO_PROXY": "*"},
        )  # fmt: skip
    assert done.stdout.split() == ["refused"] * 4, done.stderr
    assert len(calls) == 1


# ---- what scores mean without labels


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """120 images of 30 things."""
    return write_things(tmp_path_factory.mktemp("many") / "photos", num_things=30)


def test_scores_mean_something_without_labels(many, tmp_path):
    """A model without a calibration gave scores alone, and nobody knew what 0.8 means."""
    made = index(many, model=NAME, output=tmp_path / "index")
    calibration, by = made.calibration
    assert by == "views" and calibration.slope > 0 and calibration.index_size == 120
    paths = sorted(many.rglob("*.jpg"))
    answer = made.find(paths[0], k=20).to_json()
    assert answer["calibrated_by"] == "views" and "without labels" in answer["advice"]
    assert answer["band"] in ("the same", "perhaps")  # the image itself
    chances = [match["probability"] for match in answer["matches"]]
    assert chances == sorted(chances, reverse=True) and chances[-1] < chances[0]
    # noise is no thing of the index
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    assert made.find(noise).matches[0].probability < 0.5 * chances[0]
    assert made.index.notes("calibration")[made.embedder.fingerprint]["tried_at"] == 120
    before = made.index.notes("calibration")
    assert sync(tmp_path / "index").index.notes("calibration") == before  # not made anew for nothing


@pytest.mark.slow
def test_it_is_off_where_it_cannot_be_told(images, tmp_path):
    few = index(images, model=NAME, output=tmp_path / "few")
    assert few.calibration == (None, None)
    assert few.find(sorted(images.rglob("*.jpg"))[0]).matches[0].probability is None
    # images that nothing tells apart: no view finds its own
    plain = tmp_path / "plain"
    plain.mkdir()
    for number in range(110):
        colour = (number, number, number)
        Image.new("RGB", (64, 64), colour).save(plain / f"{number}.png")
    same = index(plain, model=NAME, output=tmp_path / "plain index")
    assert same.calibration == (None, None)


def test_a_search_before_there_is_an_index_says_how_to_make_one(tmp_path, images):
    """It said "expected: a index folder", and to look for the command in a list of thirty."""
    with pytest.raises(ArtefactError) as caught:
        find(next(images.rglob("*.jpg")), index=tmp_path / "index")
    assert "a finished index folder" in str(caught.value) and "samething index FOLDER" in str(caught.value)
