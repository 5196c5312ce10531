"""Formats that phones, cameras and scanners write, and files that are odd, hostile or cut off."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import skimage.data
from PIL import Image
from pillow_jxl import JpegXLImagePlugin  # noqa: F401  (registers the format for saving)

from samething.errors import ImageError
from samething.images import decode, dimensions, find_files
from samething.images.jpeg_xl import header

pillow_heif.register_heif_opener()
PHOTO = Image.open(Path(skimage.data.__file__).parent / "rocket.jpg").convert("RGB").resize((160, 107))
TURNED = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def difference(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    return float(
        np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean()
    )


def tiff(*directories: dict[int, object], order: str = "<") -> bytes:
    """A TIFF file by hand, after TIFF 6.0: image data (bytes) of tags 273 and 513 are put beside the tags.

    The first directory is the file's image, further ones lie inside of it (tag 330).
    """
    body = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))

    def put(data: bytes) -> int:
        place = len(body)
        body.extend(data + b"\0" * (len(data) % 2))
        return place

    places: list[int] = []
    for tags in reversed(directories):
        if tags is directories[0] and places:
            tags = {**tags, 330: tuple(reversed(places))}
        out = b""
        for tag, value in sorted(tags.items()):
            if tag in (273, 513):
                parts = value if isinstance(value, tuple) else (value,)
                value = tuple(put(part) for part in parts)
            values = value if isinstance(value, tuple) else (value,)
            if isinstance(value, bytes):
                kind, data, count = (1 if tag == 50706 else 2), value, len(value)
            else:
                if tag in (258, 259, 262, 274, 277, 284, 339):
                    kind = 3
                data, count = (
                    struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values),
                    len(values),
                )
            if len(data) > 4:
                data = struct.pack(f"{order}I", put(data))
            out += struct.pack(f"{order}HHI", tag, kind, count) + data.ljust(4, b"\0")
        places.append(put(struct.pack(f"{order}H", len(tags)) + out + bytes(4)))
    body[4:8] = struct.pack(f"{order}I", places[-1])
    return bytes(body)


def camera_file(*, preview_side: int, turn: int = 1, dng: bool = True) -> bytes:
    """A RAW file as cameras write it: a thumbnail, the sensor's values and a preview."""
    thumb = np.asarray(PHOTO.resize((64, 48))).tobytes()
    mosaic = np.asarray(PHOTO.resize((320, 240)), np.uint16)
    rows, columns = np.mgrid[0:240, 0:320]
    sensor = np.choose((rows % 2) + (columns % 2), [mosaic[..., 0], mosaic[..., 1], mosaic[..., 2]]) * 64
    first = {
        254: 1, 256: 64, 257: 48, 258: (8, 8, 8), 259: 1, 262: 2, 271: b"ACME\0", 272: b"One\0", 273: thumb,
        274: turn, 277: 3, 278: 48, 279: len(thumb),
    }  # fmt: skip
    if dng:
        first[50706] = b"\1\4\0\0"
    raw = {
        254: 0, 256: 320, 257: 240, 258: 16, 259: 1, 262: 32803, 273: sensor.astype("<u2").tobytes(), 277: 1,
        278: 240, 279: 2 * sensor.size, 33421: (2, 2), 50717: 16383,
    }  # fmt: skip
    preview = PHOTO.resize((preview_side, preview_side * 3 // 4))
    jpeg = saved(preview, "JPEG", quality=92)
    shown = {
        254: 1, 256: preview.width, 257: preview.height, 258: (8, 8, 8), 259: 7, 262: 6, 273: jpeg, 277: 3,
        278: preview.height, 279: len(jpeg),
    }  # fmt: skip
    return tiff(first, raw, shown)


# ---- phones and cameras


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["HEIF", "JXL"])
def test_phones_formats_are_read_upright(tmp_path, kind, orientation):
    """HEIC was refused unless somebody had registered a plugin; JPEG XL always was."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo.bin"
    path.write_bytes(saved(PHOTO, kind, exif=exif.tobytes(), quality=95))
    turn = TURNED[orientation]
    expected = PHOTO if turn is None else PHOTO.transpose(turn)
    assert difference(decode(path), expected) < 4
    assert dimensions(path) == expected.size
    assert [file.is_image for file in find_files(tmp_path)] == [True]


def test_heic_is_read_by_a_process_that_registered_nothing(tmp_path):
    """Reading HEIC depended on a plugin that the application had to register."""
    (tmp_path / "a.hif").write_bytes(saved(PHOTO, "HEIF"))
    code = "import sys; from samething.images import decode; print(decode(sys.argv[1]).size)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.hif"], capture_output=True, text=True)
    assert done.stdout == "(160, 107)\n", done.stderr


def test_a_jpeg_inside_of_a_jpeg_xl_keeps_its_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(saved(PHOTO, "JPEG", exif=exif, quality=95))
    with Image.open(tmp_path / "a.jpg") as image, pytest.warns(UserWarning, match="reconstruction"):
        image.save(tmp_path / "a.jxl")
    assert difference(decode(tmp_path / "a.jxl"), decode(tmp_path / "a.jpg")) < 1
    assert header((tmp_path / "a.jxl").read_bytes())[:2] == (160, 107)


@pytest.mark.parametrize("size", [(8, 8), (256, 64), (300, 200), (1, 5000), (99, 99), (160, 90)])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_unpacked(size):
    """The plugin unpacks a file while it opens it, so that its limit came too late."""
    content = saved(Image.new("RGB", size), "JXL")
    assert header(content) == (*size, False)
    with pytest.raises(ImageError, match=f"has {size[0]:,} × {size[1]:,} = "):
        decode(content, max_pixels=size[0] * size[1] - 1)


@pytest.mark.parametrize("turn", [1, 6, 8])
def test_a_raw_file_is_its_large_preview_and_never_its_thumbnail(turn):
    """A DNG was read as the TIFF thumbnail of 64 × 48 pixels that it begins with."""
    content = camera_file(preview_side=1200, turn=turn)
    with Image.open(io.BytesIO(content)) as seen_by_pillow:
        assert sorted(seen_by_pillow.size) == [48, 64]
    found = decode(content)
    upright = PHOTO if turn == 1 else PHOTO.rotate(270 if turn == 6 else 90, expand=True)
    assert max(found.size) == 1200
    assert found.size == dimensions(content)
    assert difference(found, upright.resize(found.size)) < 4


def test_a_raw_file_of_an_unknown_camera_is_refused_and_not_its_thumbnail():
    """A NEF or ARW was read as its thumbnail; here LibRaw does not know the camera."""
    for read in (decode, dimensions):
        with pytest.raises(ImageError, match="Unsupported file format or not RAW"):
            read(camera_file(preview_side=1200, dng=False))


def test_a_raw_file_with_a_small_preview_is_developed():
    """As above; the sensor's own pixels are the image where the camera left only a small preview."""
    found = decode(camera_file(preview_side=640))
    assert found.size == (320, 240)
    grey = np.asarray(found.convert("L"), float).ravel()
    assert np.corrcoef(grey, np.asarray(PHOTO.resize((320, 240)).convert("L"), float).ravel())[0, 1] > 0.8
    with pytest.raises(ImageError, match="160 × 120"):
        decode(camera_file(preview_side=640), max_pixels=1000)


@pytest.mark.parametrize(
    ("package", "content", "extra"),
    [("rawpy", camera_file(preview_side=1200), "raw"), ("pillow_jxl", saved(PHOTO, "JXL"), "jxl")],
)
def test_a_missing_extra_is_named_and_costs_one_image(monkeypatch, package, content, extra):
    """Such files were damaged or no images, in the words of the message, or their thumbnail was taken."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    for read in (decode, dimensions):
        with pytest.raises(ImageError, match=rf"pip install 'samething\[{extra}\]'") as caught:
            read(content)
        assert extra in caught.value.reason


def test_what_cannot_be_read_is_called_what_it_is():
    """An uncommon TIFF was "not an image in a known format"."""
    content = tiff(
        {256: 4, 257: 4, 258: (16, 16), 259: 1, 262: 2, 273: bytes(64), 277: 2, 278: 4, 279: 64, 339: (3, 3)}
    )
    with pytest.raises(ImageError, match="a TIFF image of RGB with 2 × 16-bit floating-point samples"):
        decode(content)
    with pytest.raises(ImageError, match="is a PDF document and not an image"):
        decode(b"%PDF-1.7\n" + bytes(100))
