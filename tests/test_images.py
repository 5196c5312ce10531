"""Every kind of file people keep images in, damaged ones included, and parity with timm and torchvision."""

import io
import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm.data
import torch
import torchvision.transforms
from PIL import Image, ImageOps

from samething.errors import ImageError, InputError
from samething.images import (
    IMAGE_SUFFIXES,
    Preprocessing,
    decode,
    dimensions,
    find_files,
    prepare,
    thumbnail,
)
from scenes import encoded

SAMPLES = Path(skimage.data.__file__).parent
ORIENTATION = 0x0112


def gradient(width: int = 24, height: int = 16) -> np.ndarray:
    """An image without symmetries, so that every wrong turn shows; (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], 2).astype(
        np.uint8
    )


def pixels(image: object) -> np.ndarray:
    image = decode(image)
    assert image.mode == "RGB"
    return np.asarray(image)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, *, rows: bytes = b"", bits: int = 8, colour: int = 2, extra: bytes = b""
) -> bytes:
    """A PNG file written by hand, after the PNG specification, 3rd edition, sections 5 and 11."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# ---- orientation


def turned_by_hand(array: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF 2.3, table of tag Orientation: which side the file's 0th row and 0th column are."""
    return {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(array, 1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(encoded(Image.fromarray(gradient()), kind, exif=exif, **options))
    expected = turned_by_hand(gradient(), orientation)
    assert np.abs(pixels(path).astype(int) - expected).max() <= (3 if kind == "JPEG" else 0)
    with Image.open(path) as opened:
        np.testing.assert_array_equal(pixels(path), ImageOps.exif_transpose(opened).convert("RGB"))
    assert dimensions(path) == (expected.shape[1], expected.shape[0])


def test_orientation_of_a_pillow_image_is_applied_and_the_image_is_left_alone():
    image = Image.fromarray(gradient())
    image.getexif()[ORIENTATION] = 6
    np.testing.assert_array_equal(pixels(image), np.rot90(gradient(), -1))
    assert image.getexif()[ORIENTATION] == 6
    np.testing.assert_array_equal(np.asarray(image), gradient())


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(gradient()), "PNG", exif=exif)), gradient())


@pytest.mark.parametrize("seed", range(20))
def test_damaged_exif_costs_the_metadata_and_not_the_image(seed):
    garbage = b"Exif\x00\x00" + np.random.default_rng(seed).bytes(64)
    if seed % 2:  # a right start, so that the parser goes on into the garbage
        garbage = b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00" + garbage[6:]
    content = encoded(Image.fromarray(gradient()), "JPEG", quality=100, subsampling=0, exif=garbage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = np.asarray(decode(content))
    assert found.shape in {(16, 24, 3), (24, 16, 3)}


# ---- modes and depths


def test_cmyk_jpeg_becomes_rgb():
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    found = pixels(content).reshape(-1, 3).mean(0)
    assert found[0] > 240
    assert found[1] < 15
    assert found[2] < 15


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
def test_palette_images_get_their_colours(kind):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([2, 0, 1])
    np.testing.assert_array_equal(pixels(encoded(image, kind)), [[[0, 0, 255], [255, 0, 0], [0, 255, 0]]])


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 128])])
def test_transparent_palette_entries_lie_on_white(transparency):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    last = [0, 0, 255] if transparency == 1 else [127, 127, 255]
    found = pixels(encoded(image, "PNG", transparency=transparency))
    np.testing.assert_allclose(found[0], [[255, 0, 0], [255, 255, 255], last], atol=1)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_rgba_is_laid_on_white(kind):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(200, 100, 0, 255), (200, 100, 0, 0), (200, 100, 0, 51)])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    # 51 of 255 is a fifth: 255 · 4/5 + colour · 1/5
    expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
    np.testing.assert_allclose(pixels(encoded(image, kind, **options))[0], expected, atol=1)


@pytest.mark.parametrize("mode", ["LA", "La", "RGBa", "PA"])
def test_other_modes_with_alpha_are_laid_on_white(mode):
    image = Image.new("PA" if mode == "PA" else "LA", (2, 1))
    if mode == "PA":
        image.putpalette([0, 0, 0])
    image.putpixel((0, 0), (0, 255))
    image.putpixel((1, 0), (0, 0))
    if mode == "RGBa":
        image = image.convert("RGBA")
    np.testing.assert_array_equal(pixels(image.convert(mode)), [[[0] * 3, [255] * 3]])
    if mode == "LA":
        np.testing.assert_array_equal(pixels(encoded(image, "PNG")), [[[0] * 3, [255] * 3]])


def test_a_transparent_colour_of_an_opaque_png_is_white():
    rows = b"\x00" + bytes([9, 9, 9, 1, 2, 3])
    extra = chunk(b"tRNS", struct.pack(">HHH", 9, 9, 9))
    np.testing.assert_array_equal(pixels(png(2, 1, rows=rows, extra=extra)), [[[255] * 3, [1, 2, 3]]])


def test_grey_and_one_bit_images_become_rgb():
    grey = np.array([[0, 100, 255]], np.uint8)
    expected = np.repeat(grey[..., None], 3, 2)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(grey), "PNG")), expected)
    one_bit = Image.fromarray(grey > 128)
    assert one_bit.mode == "1"
    for kind in ("PNG", "TIFF", "BMP"):
        np.testing.assert_array_equal(pixels(encoded(one_bit, kind)), [[[0] * 3, [0] * 3, [255] * 3]])


SIXTEEN_BIT = np.array([[0, 257, 32896, 65535]], np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        png(4, 1, rows=b"\x00" + SIXTEEN_BIT.astype(">u2").tobytes(), bits=16, colour=0),
        encoded(Image.fromarray(SIXTEEN_BIT), "TIFF"),
        b"P5 4 1 65535\n" + SIXTEEN_BIT.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "pgm"],
)
def test_sixteen_bit_grey_is_scaled(content):
    np.testing.assert_array_equal(pixels(content)[0, :, 0], [0, 1, 128, 255])


def test_sixteen_bit_colour_keeps_its_high_bytes():
    values = np.array([[[65535, 32896, 257]]], ">u2")
    np.testing.assert_array_equal(
        pixels(png(1, 1, rows=b"\x00" + values.tobytes(), bits=16)), [[[255, 128, 1]]]
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 7, 255], [0, 7, 255]),  # 8-bit values in a 32-bit image
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 1_000_000, 2_000_000], [0, 128, 255]),
        ([-5, 0, 255], [0, 0, 255]),
    ],
)
def test_thirty_two_bit_integers(values, expected):
    image = Image.fromarray(np.array([values], np.int32))
    assert image.mode == "I"
    np.testing.assert_array_equal(pixels(encoded(image, "TIFF"))[0, :, 0], expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 100.4, 300.0], [0, 100, 255]),
        ([-1.0, np.nan, 1.0], [0, 0, 255]),
        ([np.inf, -np.inf, 0.5], [0, 0, 128]),
    ],
)
def test_float_tiff(values, expected):
    content = encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")
    np.testing.assert_array_equal(pixels(content)[0, :, 0], expected)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.n_frames == 3
    np.testing.assert_array_equal(pixels(content), np.asarray(frames[0]))


def test_a_real_animation_and_a_real_paged_tiff():
    assert decode(SAMPLES / "no_time_for_that_tiny.gif").size == (14, 25)
    assert decode(SAMPLES / "multipage.tif").mode == "RGB"


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM", "TGA", "ICO", "DIB"])
def test_the_other_formats_are_read(kind):
    image = Image.fromarray(gradient(32, 32))
    options = {"AVIF": {"quality": 100}, "ICO": {"sizes": [(32, 32)]}}.get(kind, {})
    found = pixels(encoded(image, kind, **options)).astype(int)
    assert np.abs(found - gradient(32, 32)).max() <= (12 if kind == "AVIF" else 0)


# ---- names that mislead


def test_the_content_decides_and_not_the_name(tmp_path):
    content = encoded(Image.fromarray(gradient()), "PNG")
    for name in ("a.jpg", "b", "c.txt", "Größe 図書館.webp"):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(pixels(tmp_path / name), gradient())
        np.testing.assert_array_equal(pixels(str(tmp_path / name)), gradient())
        assert dimensions(tmp_path / name) == (24, 16)


# ---- what cannot be read

JPEG = encoded(Image.open(SAMPLES / "rocket.jpg").resize((160, 107)), "JPEG")
PNG = encoded(Image.open(SAMPLES / "coffee.png").resize((150, 100)), "PNG")
GIF = encoded(Image.open(SAMPLES / "coffee.png").resize((150, 100)), "GIF")
WEBP = encoded(Image.open(SAMPLES / "coffee.png").resize((150, 100)), "WEBP")
TIFF = encoded(Image.open(SAMPLES / "coffee.png").resize((150, 100)), "TIFF", compression="tiff_deflate")


# a tenth of it is more than the last row of blocks, which may be missing
TALL_JPEG = encoded(Image.open(SAMPLES / "rocket.jpg").resize((320, 427)), "JPEG")


@pytest.mark.parametrize(
    "content", [TALL_JPEG, PNG, GIF, WEBP, TIFF], ids=["jpeg", "png", "gif", "webp", "tiff"]
)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path, content, share):
    path = tmp_path / "cut off.jpg"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ImageError, match=r"cut off\.jpg is (damaged|not an image)") as caught:
        decode(path)
    assert caught.value.next_step


def test_dimensions_do_not_need_the_whole_file(tmp_path):
    for content, size in ((JPEG, (160, 107)), (PNG, (150, 100))):
        (tmp_path / "a").write_bytes(content[: len(content) // 2])
        assert dimensions(tmp_path / "a") == size


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_flipped_bytes_gives_a_image_or_an_image_error(seed):
    random = np.random.default_rng(seed)
    content = bytearray([JPEG, PNG, GIF, WEBP, TIFF][seed % 5])
    for position in random.integers(0, len(content), 10):
        content[position] = random.integers(256)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decode(bytes(content)).mode == "RGB"
        except ImageError as error:
            assert error.given.startswith("the bytes given")


@pytest.mark.parametrize("read", [decode, dimensions])
def test_what_is_no_image_is_said_to_be_none(tmp_path, read):
    cases = {
        "empty.jpg": (b"", "is empty"),
        "text.jpg": (b"this is a text, quite a long one, and certainly no image\n" * 5, "not an image"),
        "page.png": (b"<!doctype html><html><body>404</body></html>", "not an image"),
        "zeros.jpg": (bytes(5000), "not an image|no pixels"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=message) as caught:
            read(tmp_path / name)
        assert name in caught.value.given
    with pytest.raises(ImageError, match="No such file"):
        read(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="is not a file"):
        read(tmp_path)
    with pytest.raises(ImageError, match="null"):
        read(Path("a\0b.jpg"))


def test_empty_bytes_are_refused():
    with pytest.raises(ImageError, match="the bytes given is empty"):
        decode(b"")


def test_postscript_is_not_handed_to_an_interpreter():
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.format == "EPS"
    with pytest.raises(ImageError, match="not an image in a known format"):
        decode(content)


@pytest.mark.parametrize("side", [9_500, 20_000, 60_000])
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_small_file_that_claims_a_huge_image_is_refused(tmp_path, side, action):
    bomb = png(side, side, rows=bytes(1000), bits=1, colour=0)
    assert len(bomb) < 200
    (tmp_path / "bomb.png").write_bytes(bomb)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        for read in (decode, dimensions):
            with pytest.raises(ImageError, match=r"bomb\.png has .* pixels") as caught:
                read(tmp_path / "bomb.png")
            assert "89,478,485" in caught.value.expected


def test_the_limit_can_be_lowered(tmp_path):
    content = encoded(Image.fromarray(gradient(10, 10)), "PNG")
    assert decode(content, max_pixels=100).size == (10, 10)
    for image in (content, Image.fromarray(gradient(10, 10))):
        with pytest.raises(ImageError, match="10 × 10 = 100 pixels"):
            decode(image, max_pixels=99)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="is not a file"):
        decode(tmp_path / "pipe.jpg")
    assert not any(file.is_image for file in find_files(tmp_path))


def test_a_damaged_pillow_image_is_an_image_error():
    with (
        Image.open(io.BytesIO(PNG[: len(PNG) // 2])) as lazy,
        pytest.raises(ImageError, match="the Pillow image is damaged"),
    ):
        decode(lazy)


# ---- arrays


def test_arrays_become_rgb():
    np.testing.assert_array_equal(pixels(gradient()), gradient())
    np.testing.assert_array_equal(pixels(gradient()[::-1, ::2]), gradient()[::-1, ::2])
    grey = gradient()[..., 0]
    np.testing.assert_array_equal(pixels(grey), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ImageError, match="an array of shape"):
        decode(array)


def test_changing_the_array_or_image_later_does_not_change_the_result():
    array = gradient()
    image = Image.fromarray(gradient())
    from_array, from_image = decode(array), decode(image)
    array[:] = 0
    image.paste((0, 0, 0), (0, 0, 24, 16))
    np.testing.assert_array_equal(np.asarray(from_array), gradient())
    np.testing.assert_array_equal(np.asarray(from_image), gradient())


# ---- threads


def test_decoding_in_threads_gives_the_same_and_leaves_the_warning_filters_alone():
    contents = [PNG, JPEG, GIF, WEBP, TIFF] * 8
    expected = [np.asarray(decode(content)) for content in contents[:5]]
    before, start = list(warnings.filters), threading.Barrier(4)

    def work(number: int) -> bool:
        if number < 4:
            start.wait(timeout=20)
        return np.array_equal(np.asarray(decode(contents[number])), expected[number % 5])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(len(contents))))
    assert warnings.filters == before


# ---- preparation: bit for bit what timm does

LITE0 = {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic", "crop_mode": "center"}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

REAL_IMAGES = [
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "page.png",
]
SIZES = [
    None,
    (100, 80),
    (80, 100),
    (50, 50),
    (300, 40),
    (37, 411),
    (224, 224),
    (256, 256),
    (257, 256),
    (1, 7),
]


def real_images() -> list[Image.Image]:
    images = [decode(SAMPLES / name) for name in REAL_IMAGES]
    return images + [images[number % 5].resize(size) for number, size in enumerate(SIZES) if size]


def as_timm_sees_it(image: Image.Image, **options: object) -> np.ndarray:
    transform = timm.data.create_transform(is_training=False, mean=(0, 0, 0), std=(1, 1, 1), **options)
    return (transform(image) * 255).round().to(torch.uint8).numpy()


def test_lite0s_configuration_is_the_one_used_here():
    config = timm.models.get_pretrained_cfg("tf_efficientnet_lite0")
    assert config is not None
    assert {name: getattr(config, name) for name in LITE0 if name != "crop_mode"} == {
        name: value for name, value in LITE0.items() if name != "crop_mode"
    }


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_short_side_crop_equals_timms_evaluation_transform(interpolation):
    preprocessing = Preprocessing(size=224, crop_fraction=0.875, interpolation=interpolation)
    for image in real_images():
        expected = as_timm_sees_it(image, **{**LITE0, "interpolation": interpolation})
        np.testing.assert_array_equal(prepare(image, preprocessing), expected, err_msg=str(image.size))


@pytest.mark.parametrize(("size", "crop_fraction"), [(64, 1.0), (97, 0.9), (224, 0.95), (33, 0.34)])
def test_other_sizes_and_crops_equal_timms_too(size, crop_fraction):
    preprocessing = Preprocessing(size=size, crop_fraction=crop_fraction)
    for image in real_images():
        expected = as_timm_sees_it(
            image, input_size=(3, size, size), crop_pct=crop_fraction, interpolation="bicubic"
        )
        np.testing.assert_array_equal(prepare(image, preprocessing), expected, err_msg=str(image.size))


def test_squash_equals_timms_transform_for_siglip():
    preprocessing = Preprocessing(size=96, resize="squash")
    for image in real_images():
        expected = as_timm_sees_it(
            image, input_size=(3, 96, 96), crop_pct=1.0, crop_mode="squash", interpolation="bicubic"
        )
        np.testing.assert_array_equal(prepare(image, preprocessing), expected, err_msg=str(image.size))


def test_crop_pads_nothing_because_the_short_side_never_gets_below_the_crop():
    # torchvision's CenterCrop would fill with black what an image lacks; white stays white everywhere
    for size in (1, 3, 33, 97, 224):
        for crop_fraction in (1.0, 0.999, 0.9, 0.875, 1 / 3):
            for shape in ((1, 1), (5, 100), (100, 5), (size, size + 1)):
                found = prepare(
                    Image.new("RGB", shape, "white"), Preprocessing(size=size, crop_fraction=crop_fraction)
                )
                assert found.shape == (3, size, size)
                assert found.min() == 255


def test_a_thin_strip_needs_little_memory_and_keeps_its_middle():
    strip = np.zeros((2, 60_000, 3), np.uint8)
    strip[:, 29_000:31_000] = 200
    found = prepare(Image.fromarray(strip), Preprocessing(size=384))
    np.testing.assert_array_equal(found, np.full((3, 384, 384), 200))
    upright = prepare(Image.fromarray(strip.transpose(1, 0, 2)), Preprocessing(size=384))
    np.testing.assert_array_equal(upright, np.full((3, 384, 384), 200))


def test_cutting_the_ends_of_a_strip_does_not_change_what_is_seen():
    # 65 : 1 is cut, and the same strip resized whole by timm's way
    strip = np.random.default_rng(0).integers(0, 255, (4, 260, 3)).astype(np.uint8)
    image = Image.fromarray(strip)
    expected = as_timm_sees_it(image, input_size=(3, 32, 32), crop_pct=1.0, interpolation="bicubic")
    np.testing.assert_array_equal(prepare(image, Preprocessing(size=32)), expected)


def test_padding_keeps_the_whole_image_and_fills_with_the_mean():
    image = Image.new("RGB", (200, 100), (10, 20, 30))
    preprocessing = Preprocessing(size=50, resize="longer_side_pad", mean=(0.5, 0.4, 0.2))
    found = prepare(image, preprocessing)
    np.testing.assert_array_equal(found[:, 12:37, :], np.broadcast_to([[[10]], [[20]], [[30]]], (3, 25, 50)))
    border = np.concatenate([found[:, :12], found[:, 37:]], 1)
    np.testing.assert_array_equal(border, np.broadcast_to([[[128]], [[102]], [[51]]], border.shape))


def normalise(pixels, preprocessing):
    """Float32 as a backbone computes them from uint8 pixels (b, 3, height, width)."""
    mean, std = (
        np.asarray(channels, np.float32)[:, None, None]
        for channels in (preprocessing.mean, preprocessing.std)
    )
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def test_padding_equals_timms_border_mode():
    preprocessing = Preprocessing(size=64, resize="longer_side_pad", mean=MEAN, std=STD)
    transform = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", mean=MEAN, std=STD, crop_pct=1.0, crop_mode="border"
    )
    for image in real_images():
        expected = transform(image).numpy()
        found = normalise(prepare(image, preprocessing)[None], preprocessing)[0]
        np.testing.assert_allclose(found, expected, atol=2e-6, err_msg=str(image.size))


def test_normalise_equals_torchvision():
    preprocessing = Preprocessing(size=64, mean=MEAN, std=STD)
    images = real_images()[:4]
    prepared = np.stack([prepare(image, preprocessing) for image in images])
    found = normalise(prepared, preprocessing)
    assert found.dtype == np.float32
    then = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(64, torchvision.transforms.InterpolationMode.BICUBIC),
            torchvision.transforms.CenterCrop(64),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(MEAN, STD),
        ]
    )
    np.testing.assert_allclose(found, torch.stack([then(image) for image in images]).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"size": 0},
        {"size": 8, "crop_fraction": 0.0},
        {"size": 8, "crop_fraction": 1.1},
        {"size": 8, "std": (0.5, 0.0, 0.5)},
    ],
)
def test_impossible_preprocessing_is_refused(options):
    with pytest.raises(InputError):
        Preprocessing(**options)


def test_preprocessing_survives_json():
    preprocessing = Preprocessing(size=64, resize="squash", mean=MEAN, std=STD)
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing


# ---- thumbnails and folders


def test_a_thumbnail_is_a_small_jpeg_of_the_same_shape():
    image = decode(SAMPLES / "rocket.jpg")
    with Image.open(io.BytesIO(thumbnail(image, longer_side=100))) as small:
        assert small.format == "JPEG"
        assert small.size == (100, 67)
    assert image.size == (640, 427)
    with Image.open(io.BytesIO(thumbnail(Image.new("RGB", (5, 3)), longer_side=100))) as small:
        assert small.size == (5, 3)


def test_image_files_are_told_by_name_and_else_by_content(tmp_path):
    yes = {
        "a.jpg": b"",
        "b.JPEG": b"x",
        "c.heic": b"x",
        "d": JPEG,
        "e.0001": PNG,
        "f.bin": WEBP,
        "g": GIF,
        "h": TIFF,
    }
    no = {"i.txt": b"text", "j": b"", "k.json": b"{}", "l.wav": b"RIFF0000WAVE"}
    for name, content in {**yes, **no}.items():
        (tmp_path / name).write_bytes(content)
    assert {Path(file.path).name for file in find_files(tmp_path) if file.is_image} == set(yes)
    assert {Path(file.path).name for file in find_files(tmp_path) if not file.is_image} == set(no)
    files = {file.path: file.status for file in find_files(tmp_path) if file.is_image}
    assert set(files) == {str(tmp_path / name) for name in yes}
    assert all(status.st_size == Path(path).stat().st_size for path, status in files.items())

    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)


def test_folders_are_walked_in_order_without_hidden_files_and_linked_folders(tmp_path):
    for name in ("b/2.jpg", "b/10.jpg", "a ü/x/1.jpg", "z.jpg", ".hidden/1.jpg", "b/._2.jpg", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(JPEG)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "linked.jpg").symlink_to(tmp_path / "z.jpg")
    files = {file.path: file.status for file in find_files(tmp_path) if file.is_image}
    assert files[str(tmp_path / "gone.jpg")] is None and files[str(tmp_path / "linked.jpg")] is not None
    found = [(str(Path(file.path).relative_to(tmp_path)), file.is_image) for file in find_files(tmp_path)]
    assert found == [
        (".hidden", False),
        ("gone.jpg", True),
        ("link", False),
        ("linked.jpg", True),
        ("loop", False),
        ("z.jpg", True),
        ("a ü/x/1.jpg", True),
        ("b/.DS_Store", False),
        ("b/._2.jpg", False),
        ("b/10.jpg", True),
        ("b/2.jpg", True),
    ]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot list the folder"):
        list(find_files(tmp_path / "nowhere"))


def test_a_folder_full_of_other_things_holds_no_images(tmp_path):
    for number in range(50):
        (tmp_path / f"{number}.csv").write_text("a,b\n")
        (tmp_path / f"{number}").write_bytes(bytes(20))
    assert [file.is_image for file in find_files(tmp_path)] == [False] * 100
