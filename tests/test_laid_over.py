"""Copies under crop, perspective and overlays: found on request, shown with the places that agree."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from samething.catalog import Catalog
from samething.curate import CurateConfig, curate
from samething.curate.hashes import Hashes
from samething.curate.pairs import METHODS, embedding_pairs
from samething.errors import ImageError, InputError
from samething.rerank import Kept, Shown
from samething.rerank.laid_over import COPY, copy_check
from samething.search import duplicates, index
from scenes import photographs, write_things


def cropped(image):
    """Half of either side."""
    width, height = image.size
    return image.crop((width // 5, height // 4, width // 5 + width // 2, height // 4 + height // 2))


def in_perspective(image):
    width, height = image.size
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    moved = corners + np.array([(0.1, 0.05), (-0.02, 0.12), (-0.1, -0.03), (0.05, -0.08)]) * (width, height)
    matrix = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    return Image.fromarray(cv2.warpPerspective(np.asarray(image), matrix, image.size, borderValue=(9, 9, 9)))


def covered(image):
    """A fifth of the area under a banner, and darker."""
    made = ImageEnhance.Brightness(image).enhance(0.7)
    ImageDraw.Draw(made).rectangle((0, 0, image.width, image.height // 5), fill="red")
    return made


CHANGES = (cropped, in_perspective, covered)


def checked(images, folder):
    return copy_check(
        lambda number: Shown("", lambda: images[number], np.zeros(0, np.float32)), Kept(folder / "kept")
    )


@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_told_from_another_image_and_from_another_photograph(change, tmp_path):
    """Half of an image, one in perspective and one under a banner were no copies for hashes and pixels."""
    originals = photographs()
    check = checked([*originals, *map(change, originals)], tmp_path)
    count = len(originals)
    for number in range(count):
        found = check(number, count + number)
        assert found is not None and found.closeness >= COPY and found.evidence.num_agreeing >= 8
        assert check(number, count + (number + 1) % count) is None
        # the same either way round
        assert check(count + number, number) is not None


def test_places_that_agree_do_not_make_a_copy_where_the_pixels_differ(tmp_path):
    """A thing that fills half of two scenes is not one image twice: one thing, two photographs."""
    thing, *grounds = (image.resize((300, 300)) for image in photographs())
    scenes = [ground.resize((600, 400)) for ground in grounds[:2]]
    for scene in scenes:
        scene.paste(thing, (150, 50))
    found = checked(scenes, tmp_path)(0, 1)
    assert found is None


def test_what_cannot_be_read_or_has_no_detail_is_no_copy(tmp_path):
    def broken():
        raise ImageError("x.jpg is empty", expected="an image", next_step="leave it out")

    images = [photographs()[0], Image.new("RGB", (60, 60)), Image.new("RGB", (60, 60))]
    check = copy_check(
        lambda number: Shown("", broken if number == 3 else lambda: images[number], np.zeros(0, np.float32)),
        Kept(tmp_path / "kept"),
    )
    assert check(0, 3) is None and check(1, 2) is None and check(0, 1) is None


def test_curation_confirms_candidates_by_places_that_agree():
    """Candidates by embedding whose hashes or pixels do not agree were passed over, whatever they showed."""
    originals = photographs()[:3]
    images = [*originals, *(change(image) for change, image in zip(CHANGES, originals, strict=True))]
    nothing = np.zeros(6, np.uint64)
    far = np.array([0, 0, 0, *[2**63 - 1] * 3], np.uint64)  # no two hashes alike
    hashes = Hashes(
        sha256=np.array(list("abcdef"), object), perceptual=far, mirrored=nothing, inner=far,
        is_hashed=np.ones(6, bool), unreadable={},
    )  # fmt: skip
    vectors = np.ones((6, 2), np.float32)  # all are candidates
    given = (np.arange(6), vectors, hashes, lambda row: images[row])
    assert len(embedding_pairs(*given, CurateConfig(similarity=0.9))[0]) == 0
    pairs, _ = embedding_pairs(*given, CurateConfig(similarity=0.9, verify="geometry"))
    assert sorted(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [(0, 3), (1, 4), (2, 5)]
    assert {METHODS[number] for number in pairs.method} == {"geometry"}
    assert (pairs.closeness >= COPY).all() and (pairs.score >= 8).all()
    assert "places agree, pixels" in pairs.found_by(0)


@pytest.mark.slow
def test_the_report_draws_the_places_that_agree(tmp_path):
    """Candidates by hash whose pixels differ were passed over; the page shows what confirmed them."""
    rows = []
    for number, image in enumerate(photographs()[place] for place in (0, 1, 4)):
        stamped = image.copy()
        box = [side * tenth // 10 for tenth in (6, 9) for side in image.size]
        ImageDraw.Draw(stamped).rectangle(box, fill="red")
        for name, own in (("plain", image), ("stamped", stamped)):
            own.save(tmp_path / f"{number} {name}.png")
            given = {"label": f"thing {number}", "domain": "things", "role": "train"}
            rows.append({"image": f"{number} {name}.png", **given})
    Catalog.from_rows(rows, root=tmp_path).write(tmp_path / "c.parquet")
    options = {"output": tmp_path / "chosen.parquet", "bits": 15}
    assert not curate([tmp_path / "c.parquet"], **options).pairs
    found = curate([tmp_path / "c.parquet"], **options, verify="geometry")
    assert found.pairs == {"duplicate": 3}
    assert {pair["method"] for pair in found.pair_table.to_pylist()} == {"geometry"}
    assert found.report.read_text().count('alt="places that agree"') == 3
    with pytest.raises(InputError, match="embedding"):
        CurateConfig(verify="geometry", duplicates="exact")


def test_duplicates_of_an_index_are_verified_on_request(line, tmp_path):
    """A crop of half the sides was in no group at 0.95, and in one with everything at a lower similarity.

    By default candidates were those from 0.6 on: of the halves of 40 photographs 3 were found, from 0.4 25.
    """
    images = write_things(tmp_path / "images", num_things=3)
    photograph = photographs()[4]  # of none of the things
    photograph.save(images / "whole.png")
    cropped(photograph).save(images / "part.png")
    covered(photograph).save(images / "banner.jpg")
    index(images, model=line / "model", output=tmp_path / "index")
    loose = duplicates(tmp_path / "index", min_score=0.01)
    assert len(loose.groups[0].items) > 6
    found = duplicates(tmp_path / "index", min_score=0.01, verify="geometry", output=tmp_path / "d.json")
    names = {tuple(item["path"].rsplit("/", 1)[-1] for item in group.items) for group in found.groups}
    assert ("banner.jpg", "part.png", "whole.png") in names
    told = json.loads((tmp_path / "d.json").read_text())
    assert told["verify"] == "geometry"
    assert duplicates(tmp_path / "index", verify="geometry").min_score == 0.4
    links = [link for group in told["groups"] for link in group["verified"] if link["agreeing"]]
    assert links and all(len(point) == 4 for link in links for point in link["points"])
    assert (tmp_path / "index" / "second-look.sqlite").exists()
