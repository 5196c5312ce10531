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
import tifffile
from PIL import Image, PpmImagePlugin
from pillow_jxl import JpegXLImagePlugin  # noqa: F401  (registers the format for saving)

from samething.catalog import Catalog
from samething.datasets import catalog
from samething.errors import ImageError, InputError
from samething.features.worker_pool import ImageReader
from samething.images import Box, Preprocessing, decode, dimensions, find_files, prepare, read_pixels
from samething.images.jpeg_xl import header
from scenes import encoded

pillow_heif.register_heif_opener()
PHOTO = Image.open(Path(skimage.data.__file__).parent / "rocket.jpg").convert("RGB").resize((160, 107))
TURNED = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}


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
                kind, letter = (3, "H") if tag in (258, 259, 262, 274, 277, 284, 339) else (4, "I")
                data, count = struct.pack(f"{order}{len(values)}{letter}", *values), len(values)
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
    jpeg = encoded(preview, "JPEG", quality=92)
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
    path.write_bytes(encoded(PHOTO, kind, exif=exif.tobytes(), quality=95))
    turn = TURNED[orientation]
    expected = PHOTO if turn is None else PHOTO.transpose(turn)
    assert difference(decode(path), expected) < 4
    assert dimensions(path) == expected.size
    assert [file.is_image for file in find_files(tmp_path)] == [True]


def test_heic_is_read_by_a_process_that_registered_nothing(tmp_path):
    """Reading HEIC depended on a plugin that the application had to register."""
    (tmp_path / "a.hif").write_bytes(encoded(PHOTO, "HEIF"))
    code = "import sys; from samething.images import decode; print(decode(sys.argv[1]).size)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.hif"], capture_output=True, text=True)
    assert done.stdout == "(160, 107)\n", done.stderr


def test_a_jpeg_inside_of_a_jpeg_xl_keeps_its_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(PHOTO, "JPEG", exif=exif, quality=95))
    with Image.open(tmp_path / "a.jpg") as image, pytest.warns(UserWarning, match="reconstruction"):
        image.save(tmp_path / "a.jxl")
    assert difference(decode(tmp_path / "a.jxl"), decode(tmp_path / "a.jpg")) < 1
    assert header((tmp_path / "a.jxl").read_bytes())[:2] == (160, 107)


@pytest.mark.parametrize("size", [(8, 8), (256, 64), (300, 200), (1, 5000), (99, 99), (160, 90)])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_unpacked(size):
    """The plugin unpacks a file while it opens it, so that its limit came too late."""
    content = encoded(Image.new("RGB", size), "JXL")
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
    [("rawpy", camera_file(preview_side=1200), "raw"), ("pillow_jxl", encoded(PHOTO, "JXL"), "jxl")],
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byteorder": ">"},
        {"compression": "zlib", "predictor": 2},
        {"tile": (64, 64), "compression": "zlib"},
        {"bigtiff": True, "rowsperstrip": 16},
    ],
)
def test_planes_of_16_bits_are_read(options):
    """Pillow took the bytes of a planar 16-bit TIFF for its values: noise."""
    values = np.asarray(PHOTO).astype(np.uint16) * 257
    stream = io.BytesIO()
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    tifffile.imwrite(stream, planes, photometric="rgb", planarconfig="separate", **options)
    np.testing.assert_array_equal(np.asarray(decode(stream.getvalue())), np.asarray(PHOTO))


# ---- slow on purpose


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_unpacked():
    """491 kB of scans took 200 seconds, in which the server answered nobody and could not be ended."""
    content = encoded(PHOTO, "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    many = content[:last] + content[last:-2] * 3000 + b"\xff\xd9"
    with pytest.raises(ImageError, match="more than 100 scans"):
        decode(many)
    with pytest.raises(ImageError, match="more than 100 scans"):
        read_pixels(many, Preprocessing(size=64, decoding="fast"))
    assert decode(content[:last] + content[last:-2] * 80 + b"\xff\xd9").size == PHOTO.size


def test_what_lies_behind_a_jpeg_is_not_counted_as_scans():
    """Motion photos hold a film behind the image, where any two bytes occur."""
    content = encoded(PHOTO, "JPEG")
    np.testing.assert_array_equal(
        np.asarray(decode(content + b"\xff\xda" * 500)), np.asarray(decode(content))
    )


@pytest.mark.parametrize("largest", [1, 100, 254, 1000, 65535])
@pytest.mark.parametrize("kind", [b"P1", b"P2", b"P3", b"P5", b"P6"])
def test_netpbm_files_are_read_at_once_with_pillows_values(monkeypatch, kind, largest):
    """20 MB of 16-bit PPM took 30 seconds in Pillow's Python loop, a value at a time."""
    random = np.random.default_rng(0)
    values = random.integers(
        0, (1 if kind == b"P1" else largest) + 1, 7 * 5 * (3 if kind in (b"P3", b"P6") else 1)
    )
    head = kind + b" 7 5\n" + (b"" if kind == b"P1" else b"%d\n" % largest)
    if kind in (b"P5", b"P6"):
        content = head + values.astype(">u2" if largest > 255 else "u1").tobytes()
    else:
        content = head + b" # a comment 7\n".join(str(value).encode() for value in values) + b"\n"
    with Image.open(io.BytesIO(content)) as image:
        expected = np.asarray(decode(image.copy()))
    for loop in (PpmImagePlugin.PpmDecoder, PpmImagePlugin.PpmPlainDecoder):
        monkeypatch.setattr(loop, "decode", None)
    np.testing.assert_array_equal(np.asarray(decode(content)), expected)
    with pytest.raises(ImageError, match="damaged"):
        decode(content[: len(content) * 2 // 3])


def test_an_icon_is_refused_by_the_size_inside_of_it():
    """An icon said 16 × 16 and held a PNG of 169 megapixels, which was unpacked before anybody looked."""
    inner = encoded(Image.new("1", (3000, 2000)), "PNG")
    head = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22)
    with pytest.raises(ImageError, match=r"3,000 × 2,000 = 6,000,000 pixels"):
        dimensions(head + inner, max_pixels=5_000_000)
    small = encoded(PHOTO.resize((32, 32)), "ICO", sizes=[(32, 32)], bitmap_format="bmp")
    assert difference(decode(small, max_pixels=32 * 32), PHOTO.resize((32, 32))) == 0


def test_transparency_is_laid_on_its_ground_in_bands():
    """An image with alpha was in memory four times: 1 GB for 49 megapixels."""
    image = PHOTO.resize((600, 900))
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    np.testing.assert_array_equal(np.asarray(decode(image)), np.asarray(expected))
    code = """if True:
        import resource, sys
        from PIL import Image, PpmImagePlugin
        from samething.images import decode
        image = Image.new("RGBA", (7000, 7000), (200, 10, 10, 128))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        decode(image)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500  # MiB: the result itself takes 187


# ---- cut off, large, with other colours


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"restart_marker_rows": 1}])
def test_a_jpeg_without_its_last_bytes_is_whole_where_less_than_a_row_of_blocks_is_missing(
    options, progressive
):
    """Files without their end marker were damaged, though every viewer shows them."""
    content = encoded(PHOTO, "JPEG", quality=90, progressive=progressive, **options)
    whole = decode(content)
    np.testing.assert_array_equal(np.asarray(decode(content[:-1])), np.asarray(whole))
    np.testing.assert_array_equal(np.asarray(decode(content[:-2])), np.asarray(whole))
    nearly = decode(content[:-8])
    if progressive:
        assert difference(nearly, whole) < 1
    else:
        np.testing.assert_array_equal(np.asarray(nearly)[:-18], np.asarray(whole)[:-18])
    for share in (0.05, 0.3, 0.5, 0.7):
        with pytest.raises(ImageError, match="damaged"):
            decode(content[: int(share * len(content))])
    fast = read_pixels(content[:-2], Preprocessing(size=64, decoding="fast"))
    assert np.abs(fast.astype(int) - read_pixels(content, Preprocessing(size=64)).astype(int)).max() <= 2


def test_a_progressive_jpeg_that_lacks_its_last_scans_is_damaged():
    """Each scan may be whole, and the image still be a blurred one."""
    content = encoded(PHOTO, "JPEG", progressive=True)
    with pytest.raises(ImageError, match="damaged"):
        decode(content[: content.rindex(b"\xff\xda")])


@pytest.mark.parametrize("turn", [1, 6])
def test_a_large_jpeg_is_unpacked_at_half_its_sides(turn):
    """Photographs of 108 and 200 megapixels were refused, though half of their sides is more than enough."""
    exif = Image.Exif()
    exif[0x0112] = turn
    large = PHOTO.resize((1600, 1070))
    content = encoded(large, "JPEG", quality=95, exif=exif)
    upright = large if turn == 1 else large.transpose(Image.Transpose.ROTATE_270)
    limit = 500_000
    found = decode(content, max_pixels=limit)
    assert found.info["full_size"] == dimensions(content, max_pixels=limit) == upright.size
    assert difference(found, upright.resize((upright.width // 2, upright.height // 2))) < 4
    part = decode(content, max_pixels=limit, box=Box(200, 100, 600, 500))
    assert part.size == (200, 200)
    assert difference(part, upright.crop((200, 100, 600, 500)).resize((200, 200))) < 4
    for decoding in ("exact", "fast", "scaled"):
        preprocessing = Preprocessing(size=64, decoding=decoding)
        pixels = read_pixels(content, preprocessing, max_pixels=limit, box=Box(200, 100, 600, 500))
        assert np.abs(pixels.astype(int) - prepare(part, Preprocessing(size=64)).astype(int)).max() <= 2
    with pytest.raises(ImageError, match="expected: at most 1,600,000 pixels"):
        decode(content, max_pixels=400_000)
    with pytest.raises(ImageError, match="expected: at most 500,000 pixels"):
        decode(encoded(large, "JPEG", progressive=True), max_pixels=limit)


def profile(red, green, blue, gamma: float) -> bytes:
    """A colour profile of three primaries (XYZ under D50) and a gamma, after ICC.1:2001-04."""

    def numbers(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    white = (0.9642, 1, 0.8249)
    points = zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), (red, green, blue, white), strict=True)
    tags = {name: b"XYZ \0\0\0\0" + numbers(*point) for name, point in points}
    curve = b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0)
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s", 128 + len(table) + len(body), b"lcms", 2 << 24, b"mntr", b"RGB ", b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + numbers(*white)
    return head.ljust(128, b"\0") + table + body


SRGB = ((0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141))
P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_unusual_colour_profile_is_applied(kind):
    """Such profiles were ignored: an image with its channels swapped (as in XYB) looked like another one."""
    red, green, blue = PHOTO.split()
    swapped = Image.merge("RGB", (green, red, blue))
    content = encoded(swapped, kind, icc_profile=profile(SRGB[1], SRGB[0], SRGB[2], 2.2))
    assert difference(decode(content), PHOTO) < 8
    fast = read_pixels(content, Preprocessing(size=64, decoding="fast"))
    exact = prepare(decode(content), Preprocessing(size=64))
    assert np.abs(fast.astype(int) - exact.astype(int)).max() <= 2


@pytest.mark.parametrize(("primaries", "gamma"), [(SRGB, 2.2), (P3, 2.2), (ADOBE, 2.2), (SRGB, 1.8)])
def test_usual_colour_profiles_stay_unapplied(primaries, gamma):
    """The backbones were trained without; vectors of ordinary photographs stay as they are."""
    content = encoded(PHOTO, "PNG", icc_profile=profile(*primaries, gamma))
    np.testing.assert_array_equal(np.asarray(decode(content)), np.asarray(PHOTO))
    damaged = encoded(PHOTO, "PNG", icc_profile=b"not a profile")
    np.testing.assert_array_equal(np.asarray(decode(damaged)), np.asarray(PHOTO))


def test_larger_images_can_be_listed_and_what_is_listed_is_read(tmp_path, monkeypatch):
    """There was no way to take scans of more than 89 megapixels in, and Pillow's own limit above."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    monkeypatch.setattr("samething.features.worker_pool.MAX_PIXELS", 100_000)
    folder = tmp_path / "images" / "page"
    folder.mkdir(parents=True)
    PHOTO.resize((500, 400)).save(folder / "scan.png")
    with pytest.raises(InputError, match="200,000 pixels"):
        catalog(tmp_path / "images", max_megapixels=0.1, output=tmp_path / "c.parquet", val=0.0, test=0.0)
    for wrong in (0.0, -1.0):
        with pytest.raises(InputError, match="--max-megapixels"):
            catalog(tmp_path / "images", max_megapixels=wrong, output=tmp_path / "c.parquet")
    catalog(tmp_path / "images", max_megapixels=0.3, output=tmp_path / "c.parquet", val=0.0, test=0.0)
    listed = Catalog.read(tmp_path / "c.parquet")
    assert listed.table["width"].to_pylist() == [500]
    seen = ImageReader(listed, {}, Preprocessing(size=8)).read(0)
    assert isinstance(seen, np.ndarray) and seen.shape == (3, 8, 8)


# ---- nothing to see


def test_an_image_of_no_finite_values_is_refused():
    """An image of NaNs was taken as black."""
    with pytest.raises(ImageError, match="has no finite value"):
        decode(encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))


def test_white_shapes_on_nothing_are_laid_on_black():
    """White logos on a transparent ground were all the same white image, with a score of 1."""
    shape = Image.new("L", (40, 40))
    shape.paste(255, (5, 5, 20, 30))
    white = Image.new("RGBA", shape.size, (250, 255, 255, 0))
    white.putalpha(shape)
    np.testing.assert_array_equal(np.asarray(decode(white))[..., 1], np.asarray(shape))
    grey = Image.new("RGBA", shape.size, (200, 200, 200, 0))
    grey.putalpha(shape)
    assert decode(grey).getpixel((0, 0)) == (255, 255, 255)
    nothing = Image.new("RGBA", shape.size, (0, 0, 0, 0))
    assert decode(nothing).getextrema() == ((255, 255),) * 3
