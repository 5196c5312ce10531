"""When, where and by which camera: EXIF data from files of every format to a filter, damaged or not."""

import datetime
import io
import random
import warnings

import numpy as np
import pytest
from PIL import ExifTags, Image, TiffImagePlugin

from samething.catalog import Catalog
from samething.errors import InputError
from samething.images import decode
from samething.images.capture import capture_of
from samething.index import create_index
from samething.search import Searcher, find, index, rebuild, sync
from samething.search.collection import CAPTURE_COLUMNS
from scenes import photographs, write_things

JUNE = 1719236096.0  # 2024-06-24 13:34:56
WHOLE = {"taken": JUNE, "camera": "Apple iPhone 12", "latitude": -33.856833, "longitude": 151.215167}


def exif_of(
    moment="2024:06:24 13:34:56",
    *,
    make="Apple",
    model="iPhone 12",
    latitude=("S", (33.0, 51.0, 24.6)),
    longitude=("E", (151.0, 12.0, 54.6)),
):
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Model] = make, model
    exif[ExifTags.Base.DateTime] = "2031:01:01 00:00:00"  # when a program changed the file
    places: dict[int, object] = {}  # get_ifd of the lowest Pillow would hand out a copy
    exif[ExifTags.IFD.Exif] = {ExifTags.Base.DateTimeOriginal: moment}
    exif[ExifTags.IFD.GPSInfo] = places
    for tag, (side, parts) in ((1, latitude), (3, longitude)):
        places[tag] = side
        places[tag + 1] = tuple(TiffImagePlugin.IFDRational(round(part * 100), 100) for part in parts)
    return exif


def content_of(exif, kind="JPEG", size=(64, 48)):
    stream = io.BytesIO()
    photographs()[0].resize(size).save(stream, kind, exif=exif.tobytes())
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_every_format_says_when_where_and_by_which_camera(kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    assert decode(content_of(exif_of(), kind)).info["capture"] == pytest.approx(WHOLE)
    assert decode(content_of(Image.Exif(), kind)).info["capture"] == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"moment": "0000:00:00 00:00:00"}, {"taken": None}),
        ({"moment": "    :  :     :  :  "}, {"taken": None}),
        ({"moment": "2024-06-24T13:34:56"}, {"taken": JUNE}),
        ({"moment": "2024:06:24"}, {"taken": JUNE - (13 * 60 + 34) * 60 - 56}),
        ({"moment": "1969:12:31 23:59:59"}, {"taken": -1.0}),
        ({"make": "NIKON CORPORATION", "model": "NIKON D90\0\0junk"}, {"camera": "NIKON D90"}),
        ({"make": "", "model": ""}, {"camera": None}),
        ({"model": "\x1b[2Jcamera"}, {"camera": "Apple \\x1b[2Jcamera"}),
        ({"latitude": ("N", (0.0, 0.0, 0.0)), "longitude": ("E", (0.0, 0.0, 0.0))}, {"latitude": None}),
        ({"latitude": ("N", (91.0, 0.0, 0.0))}, {"latitude": None, "longitude": None}),
        (
            {"latitude": ("N", (48.5,)), "longitude": ("W", (2.25, 30.0))},
            {"latitude": 48.5, "longitude": -2.75},
        ),
    ],
)  # fmt: skip
def test_what_cameras_write(options, expected):
    found = decode(content_of(exif_of(**options))).info["capture"]
    assert {name: found.get(name) for name in expected} == expected
    assert set(found) >= set(WHOLE) - set(expected) - {"longitude"}


def test_a_place_of_zero_parts_is_no_place():
    exif = exif_of()
    exif[ExifTags.IFD.GPSInfo][2] = tuple(TiffImagePlugin.IFDRational(1, 0) for _ in range(3))
    assert "latitude" not in capture_of(lambda: exif)


def test_damaged_metadata_cost_no_image():
    """Bytes of the EXIF data are changed at random: the image is decoded, and what is said has its kind."""
    content, generator, kinds = content_of(exif_of()), random.Random(0), {"number": float, "text": str}
    start = content.index(b"Exif\0\0") + 6
    end = start + int.from_bytes(content[start - 8 : start - 6]) - 8
    seen = set()
    for _ in range(400):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 12)):
            changed[generator.randrange(start, end)] = generator.randrange(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow says what is odd
            image = decode(bytes(changed))
        for name, value in image.info["capture"].items():
            assert isinstance(value, kinds[CAPTURE_COLUMNS[name]]) and value == value
            str(value).encode()
        seen.add(len(image.info["capture"]))
    assert len(seen) > 2  # some were really damaged, others not


@pytest.fixture
def dated(tmp_path):
    """Twelve small images, three of them with EXIF data."""
    folder = write_things(tmp_path / "images", num_things=3)
    for number, moment in enumerate(("2024:01:01 00:00:00", "2024:06:30 23:59:59", "2025:02:28 12:00:00")):
        content = content_of(exif_of(moment), size=(90 + number, 80))
        (folder / f"photo {number}.jpg").write_bytes(content)
    return folder


def names(found):
    return sorted(match.path.rpartition("/")[2] for match in found.matches)


def test_a_search_is_narrowed_by_date_camera_and_place(line, dated, tmp_path, monkeypatch):
    made = index(dated, model=line / "model", output=tmp_path / "index")
    assert made.exit_status == 0 and made.index.count() == 15
    query = dated / "photo 0.jpg"

    def where(*conditions):
        return names(find(query, index=tmp_path / "index", k=20, where=list(conditions)))

    assert where("taken=2024-01..2024-06") == where("taken=2024") == ["photo 0.jpg", "photo 1.jpg"]
    assert where("taken=2024-07..") == ["photo 2.jpg"] and where("taken=2024-02..2024-05") == []
    assert len(where("camera=Apple iPhone 12")) == len(where("latitude=-34..-33", "longitude=151..152")) == 3
    assert where("latitude=0..") == []
    (dated / "photo 3.jpg").write_bytes(content_of(exif_of("2019:05:05 10:00:00"), size=(99, 70)))
    sync(tmp_path / "index")
    assert where("taken=2019") == ["photo 3.jpg"]
    (dated / "photo 3.jpg").rename(dated / "moved.jpg")
    sync(tmp_path / "index")  # not embedded again, and not read again
    assert where("taken=2019") == ["moved.jpg"]


def test_an_index_from_before_keeps_its_columns_until_it_is_rebuilt(line, dated, tmp_path):
    """Nothing is said of images that were indexed before; a rebuild, which reads them, has the columns."""
    made = index(dated, model=line / "model", output=tmp_path / "new")
    columns = {
        name: kind
        for name, kind in made.index.description.extra_columns.items()
        if name not in CAPTURE_COLUMNS
    }
    old = create_index(
        tmp_path / "index", dim=made.embedder.dim, model_fingerprint=made.embedder.fingerprint,
        model_name=made.embedder.name, extra_columns=columns,
    )  # fmt: skip
    Searcher(made.embedder, old).update_files([])
    again = index(dated, model=line / "model", output=tmp_path / "index")
    assert again.num_added == 15
    with pytest.raises(InputError, match="taken"):
        find(dated / "photo 0.jpg", index=tmp_path / "index", where=["taken=2024"])
    rebuild(tmp_path / "index", model=line / "model")
    assert len(find(dated / "photo 0.jpg", index=tmp_path / "index", where=["taken=2024"]).matches) == 2


def test_a_tables_own_columns_of_these_names_come_first(line, dated, tmp_path):
    """A table that has a camera for each image, and another kind of date, is believed, and nothing fails."""
    catalog = tmp_path / "table.csv"
    rows = [f"images/photo {number}.jpg,{number},camera {number},monday" for number in range(3)]
    catalog.write_text("\n".join(["img_path,label,camera,taken", *rows]))
    from samething.datasets import catalog as make_catalog

    make_catalog(catalog, output=tmp_path / "table.parquet")
    made = index(tmp_path / "table.parquet", model=line / "model", output=tmp_path / "index")
    [batch] = made.index.items(columns=["camera", "taken", "latitude"])
    assert sorted(batch.column("camera").to_pylist()) == ["camera 0", "camera 1", "camera 2"]
    assert set(batch.column("taken").to_pylist()) == {"monday"}
    np.testing.assert_allclose(batch.column("latitude").to_pylist(), WHOLE["latitude"], atol=1e-6)
    assert Catalog.read(tmp_path / "table.parquet").table["camera"][0].as_py() == "camera 0"


def test_a_table_that_comes_later_keeps_its_columns_under_names_of_their_kind(line, dated, tmp_path, capsys):
    """A text in a column called taken, or another table's price of 2.5 after whole ones, ended the sync with
    "metadata that does not fit", after all new images had been embedded."""
    from samething.datasets import catalog as make_catalog

    def table(name, *rows):
        text = "\n".join(["img_path,label,taken,price", *(f"images/{row}" for row in rows)])
        (tmp_path / f"{name}.csv").write_text(text)
        make_catalog(tmp_path / f"{name}.csv", output=tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    first = table("first", "photo 0.jpg,0,5,1", "photo 1.jpg,1,6,3")
    index(dated, model=line / "model", output=tmp_path / "index")
    sync(tmp_path / "index", first)  # a number for a number: the table is believed
    second = table("second", "photo 1.jpg,1,monday,2.5", "photo 2.jpg,2,tuesday,4.0")
    sync(tmp_path / "index", second)
    said = "taken is a column of another kind here: what does not fit it is kept as taken_text"
    assert capsys.readouterr().err.count(said) == 1
    rebuild(tmp_path / "index", model=line / "model")
    done = sync(tmp_path / "index")
    assert done.changes.num_added == 0 and said not in capsys.readouterr().err
    [batch] = done.index.items(columns=["path", "taken", "taken_text", "price", "price_number"])
    kept = {row["path"].rpartition("/")[2]: tuple(row.values())[2:] for row in batch.to_pylist()}
    february = datetime.datetime(2025, 2, 28, 12, tzinfo=datetime.UTC).timestamp()
    assert kept["photo 0.jpg"] == (5, None, 1, None)
    assert kept["photo 1.jpg"] == (6, "monday", 3, 2.5)
    assert kept["photo 2.jpg"] == (february, "tuesday", 4, None)
