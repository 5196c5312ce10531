"""A catalog row may show a part of its image: from the table to the pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from samething.catalog import BOX_COLUMNS, Catalog
from samething.errors import ImageError, InputError
from samething.images import Box, Preprocessing, Source, clipped, decode, prepare, read_pixels
from scenes import photographs


def boxed(root, *boxes, **columns):
    rows = [
        {"image": "a.jpg", "label": f"l{row}", **dict(zip(BOX_COLUMNS, box or [None] * 4, strict=True))}
        for row, box in enumerate(boxes)
    ]
    return Catalog.from_rows([{**row, **columns} for row in rows], root=root)


@pytest.fixture
def turned(tmp_path):
    """A photograph that its EXIF data turn by 90°, and its upright pixels as Pillow gives them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photographs()[0].save(tmp_path / "a.jpg", quality=95, exif=exif)
    return tmp_path, decode(tmp_path / "a.jpg")


@pytest.mark.heavy
@pytest.mark.parametrize("decoding", ["exact", "fast", "scaled"])
def test_the_box_is_cut_from_the_upright_image(turned, decoding):
    root, upright = turned
    preprocessing = Preprocessing(size=64, decoding=decoding)
    catalog = boxed(root, (30, 40, 230, 190), None)
    whole = upright.crop((30, 40, 230, 190)), upright
    for source, expected in zip(catalog.sources, whole, strict=True):
        assert np.array_equal(decode(source), expected)
        ours = read_pixels(source, preprocessing).astype(int)
        difference = np.abs(ours - prepare(expected, preprocessing).astype(int)).max()
        assert difference <= {"exact": 0, "fast": 2, "scaled": 60}[decoding]


@pytest.mark.heavy
def test_a_box_beyond_the_edge_is_cut_and_one_outside_refused(turned):
    root, upright = turned
    source = Source(str(root / "a.jpg"), Box(-20, 10, upright.width + 9, 50))
    assert decode(source).size == (upright.width, 40)
    for way in (decode, lambda source: read_pixels(source, Preprocessing(size=8, decoding="fast"))):
        with pytest.raises(ImageError, match=r"a.jpg.*none of them is in the box"):
            way(Source(str(root / "a.jpg"), Box(upright.width, 0, upright.width + 5, 5)))


@given(st.integers(-9, 30), st.integers(-9, 30), st.integers(1, 30), st.integers(1, 30))
def test_clipping_keeps_exactly_the_pixels_inside(left, top, width, height):
    box, inside = Box(left, top, left + width, top + height), np.zeros((14, 17), bool)
    for y in range(14):
        for x in range(17):
            inside[y, x] = box.left <= x < box.right and box.top <= y < box.bottom
    if not inside.any():
        with pytest.raises(ImageError):
            clipped(box, 17, 14)
    else:
        kept = clipped(box, 17, 14)
        assert inside[kept.top : kept.bottom, kept.left : kept.right].all()
        assert inside.sum() == (kept.right - kept.left) * (kept.bottom - kept.top)


def test_boxes_survive_the_file_and_are_part_of_the_identity(tmp_path):
    catalog = boxed(tmp_path, (0, 1, 2, 3), None, (0, 1, 2, 4), sha256="ab" * 32)
    again = Catalog.read(catalog.write(tmp_path / "c.parquet"))
    assert again.boxes == catalog.boxes == [Box(0, 1, 2, 3), None, Box(0, 1, 2, 4)]
    assert again.fingerprint == catalog.fingerprint
    assert len(set(catalog.keys())) == 3
    assert catalog.keys()[1] == "ab" * 32
    assert catalog.fingerprint != boxed(tmp_path, (0, 1, 2, 3), None, None, sha256="ab" * 32).fingerprint
    table = catalog.table.drop_columns(list(BOX_COLUMNS))
    without = Catalog(table, tmp_path)
    assert without.boxes == [None] * 3
    assert without.fingerprint == boxed(tmp_path, None, None, None, sha256="ab" * 32).fingerprint


def test_boxes_from_a_csv_table(tmp_path):
    (tmp_path / "t.csv").write_text(
        "img_path,label,box_left,box_top,box_right,box_bottom\na.jpg,x,1,2,3,4\nb.jpg,y,,,,\n"
    )
    assert Catalog.read(tmp_path / "t.csv").boxes == [Box(1, 2, 3, 4), None]


def test_what_is_no_box_is_refused_or_reported(tmp_path):
    with pytest.raises(InputError, match=r"row 0 .a.jpg. has a box with some sides only"):
        boxed(tmp_path, (0, 1, None, 3))
    with pytest.raises(InputError, match="all of box_left"):
        Catalog.from_rows([{"image": "a", "label": "b", "box_left": 1}], root=tmp_path)
    (tmp_path / "t.csv").write_text(f"image,label,{','.join(BOX_COLUMNS)}\na.jpg,x,left,0,1,1\n")
    with pytest.raises(InputError, match="the column box_left holds"):
        Catalog.read(tmp_path / "t.csv")
    messages = [problem.message for problem in boxed(tmp_path, (5, 0, 5, 4)).problems(check_files=False)]
    assert messages == ["a.jpg has the empty box (5, 0, 5, 4)"]


def test_one_file_in_two_boxes_is_no_problem_and_in_one_box_twice_is(tmp_path):
    fine = boxed(tmp_path, (0, 0, 5, 5), (5, 0, 9, 5), sha256="ab" * 32)
    assert not fine.problems(check_files=False)
    twice = boxed(tmp_path, (0, 0, 5, 5), (0, 0, 5, 5), sha256="ab" * 32).problems(check_files=False)
    assert [problem.severity for problem in twice] == ["error", "warning"]
