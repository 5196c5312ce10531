"""The fast way of reading an image against the reference, on photographs and on everything that is odd."""

import dataclasses
import functools
import struct
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image

from samething.errors import ImageError, MissingExtraError
from samething.images import Box, Preprocessing, decode, least_side, prepare, read_pixels
from scenes import encoded, photographs

for module in ("torch", "simplejpeg"):
    pytest.importorskip(module, reason="the fast way is decoded with simplejpeg and resized with torch")

LARGEST_DIFFERENCE = 2  # of 255; stated in docs/benchmarks.md and in read_pixels
PHOTOGRAPHS = sorted(
    path for path in Path(skimage.data.__file__).parent.iterdir() if path.suffix in (".jpg", ".png")
)


def ways(**options: object) -> tuple[Preprocessing, Preprocessing]:
    exact = Preprocessing(**{"size": 224, "crop_fraction": 0.875, **options})
    return exact, dataclasses.replace(exact, decoding="fast")


def difference(content: bytes, **options: object) -> int:
    exact, fast = ways(**options)
    ours, reference = read_pixels(content, fast), read_pixels(content, exact)
    assert ours.flags.c_contiguous
    assert np.array_equal(reference, prepare(decode(content), exact))
    return int(np.abs(ours.astype(int) - reference.astype(int)).max())


@pytest.mark.parametrize(
    ("resize", "interpolation"),
    [
        ("short_side_crop", "bicubic"),
        pytest.param("squash", "bicubic", marks=pytest.mark.slow),
        pytest.param("longer_side_pad", "bilinear", marks=pytest.mark.slow),
        ("squash", "lanczos"),
    ],
)
def test_photographs_are_within_two_of_255(resize, interpolation):
    worst = [
        difference(content, resize=resize, interpolation=interpolation, size=size)
        for path in PHOTOGRAPHS
        for size in (224, 384)
        for content in (path.read_bytes() if size == 224 else encoded(decode(path), quality=90),)
    ]
    assert len(worst) > 20
    assert max(worst) <= LARGEST_DIFFERENCE
    assert max(worst) > 0 or interpolation == "lanczos"  # the two ways are not the same code


@pytest.mark.parametrize(
    ("quality", "subsampling", "progressive"), [(30, 2, False), (75, 1, True), (95, 0, False), (90, 2, True)]
)
def test_every_kind_of_jpeg(quality, subsampling, progressive):
    for image in photographs()[:3]:
        content = encoded(image, quality=quality, subsampling=subsampling, progressive=progressive)
        assert difference(content) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "MPO"])
def test_orientation(orientation, kind):
    image = photographs()[0].crop((20, 30, 380, 270))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    assert difference(encoded(image, kind, exif=exif, **options)) <= LARGEST_DIFFERENCE


def odd_images() -> dict[str, bytes]:
    image = photographs()[0].resize((300, 260))
    rng = np.random.default_rng(0)
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.fromarray(rng.integers(0, 256, image.size[::-1], dtype=np.uint8)))
    deep = Image.fromarray(rng.integers(0, 65536, (90, 130), dtype=np.uint16))
    return {
        "cmyk": encoded(image.convert("CMYK")),
        "grey": encoded(image.convert("L")),
        "grey with alpha": encoded(image.convert("LA"), "PNG"),
        "alpha": encoded(alpha, "PNG"),
        "webp": encoded(alpha, "WEBP"),
        "palette": encoded(image.convert("P"), "PNG"),
        "16 bit": encoded(deep, "PNG"),
        "16 bit tiff": encoded(deep, "TIFF"),
        "gif": encoded(image, "GIF"),
        "one pixel": encoded(image.resize((1, 1))),
        "strip": encoded(image.resize((3000, 2))),
        "smaller than the input": encoded(image.resize((40, 30))),
        "of the input's size": encoded(image.resize((224, 224))),
        "with junk behind": encoded(image) + b"junk" * 50,
    }


def test_odd_images():
    worst = {
        (name, resize): difference(content, resize=resize)
        for name, content in odd_images().items()
        for resize in ("short_side_crop", "squash", "longer_side_pad")
    }
    assert {key: value for key, value in worst.items() if value > LARGEST_DIFFERENCE} == {}


def hostile() -> dict[str, bytes]:
    whole = encoded(photographs()[0])
    tall = whole.replace(whole[whole.index(b"\xff\xc0") + 5 :][:4], struct.pack(">HH", 60000, 60000), 1)
    return {
        "cut": whole[: len(whole) // 2],
        "cut in the header": whole[:100],
        "empty": b"",
        "text": b"no image at all",
        "more pixels than it says": tall,
    }


@pytest.mark.parametrize("name", hostile())
def test_what_is_refused_is_refused_for_the_same_reason(name):
    said = []
    for way in ways():
        with pytest.raises(ImageError) as caught:
            read_pixels(hostile()[name], way)
        said.append(caught.value.given)
    assert said[0] == said[1]


@pytest.mark.parametrize("seed", range(24))
def test_damaged_files_are_read_or_refused_as_the_reference_does(seed):
    """Where the two agree that there is an image, they agree on its pixels."""
    rng = np.random.default_rng(seed)
    content = bytearray(encoded(photographs()[seed % 3], quality=80))
    for place in rng.integers(2, len(content), 3):
        content[place] = rng.integers(256)
    found = []
    for way in ways():
        try:
            found.append(read_pixels(bytes(content), way).astype(int))
        except ImageError:
            found.append(None)
    assert (found[0] is None) == (found[1] is None)
    if found[0] is not None:
        assert np.abs(found[0] - found[1]).max() <= LARGEST_DIFFERENCE


def test_scaled_decoding_is_close_where_it_scales_and_fast_elsewhere():
    image = photographs()[0]
    exact, fast = ways()
    scaled = dataclasses.replace(exact, decoding="scaled")
    large = encoded(image.resize((image.width * 4, image.height * 4)), quality=92)
    ours, reference = (read_pixels(large, way).astype(int) for way in (scaled, exact))
    assert 0 < np.abs(ours - reference).mean() < 1
    assert not np.array_equal(ours, read_pixels(large, fast))
    small = encoded(image)
    assert np.array_equal(read_pixels(small, scaled), read_pixels(small, fast))


def test_the_choice_is_part_of_the_description_and_exact_is_what_there_was_before():
    exact, fast = ways()
    assert "decoding" not in exact.to_json()
    assert fast.to_json()["decoding"] == "fast"
    for way in (exact, fast):
        assert Preprocessing.from_json(way.to_json()) == way


@pytest.mark.parametrize("module", ["simplejpeg", "torch"])
def test_without_the_packages_the_error_names_the_extra(module, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=r"samething\[train\]"):
        read_pixels(encoded(photographs()[0]), ways()[1])


# ---- unpacked at a fraction, by Pillow alone: what an index and its queries are decoded by


@functools.cache
def photograph(width, height, orientation=1):
    """A large photograph with the noise of a sensor, as the bytes of a JPEG file."""
    pixels = np.asarray(photographs()[0].resize((width, height), Image.Resampling.LANCZOS)).astype(np.float32)
    noise = np.random.default_rng(0).standard_normal((height, width, 1), dtype=np.float32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray((pixels + 6 * noise).clip(0, 255).astype(np.uint8)), quality=90, exif=exif)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photograph_at_a_fraction_is_nearly_the_same_to_a_model(orientation):
    """A phone's photograph cost four times what its pixels at a quarter of the sides cost."""
    exact, _ = ways()
    least = least_side(exact)
    assert least == 512
    content = photograph(2600, 1950, orientation)
    part, whole = decode(content, least_side=least), decode(content)
    assert sorted(part.size) == [975, 1300] and (part.width < part.height) == (orientation == 6)
    assert part.info["full_size"] == whole.size and "full_size" not in whole.info
    difference = np.abs(prepare(part, exact).astype(int) - prepare(whole, exact).astype(int))
    assert 0 < difference.max() <= 6 and difference.mean() < 0.5


def test_small_images_other_formats_and_boxes_are_whole():
    content = photograph(1000, 900)
    assert decode(content, least_side=512).size == (1000, 900)  # half of it would be less
    for kind in ("PNG", "WEBP"):
        assert decode(encoded(photographs()[0], kind), least_side=64).size == photographs()[0].size
    box = Box(11, 13, 611, 413)
    large = photograph(2600, 1950)
    part = decode(large, least_side=512, box=box)
    assert part.size == (600, 400) and np.array_equal(part, decode(large).crop(box))


@pytest.mark.parametrize("size", [(4095, 4096), (4096, 4095)])
def test_the_full_size_of_a_nearly_square_image_is_not_turned(size):
    """Which way an image was turned was told from its sides, which a fraction can make equal."""
    content = encoded(Image.new("RGB", size, (90, 120, 40)))
    assert decode(content, least_side=512).info["full_size"] == size
    assert decode(content, max_pixels=size[0] * size[1] // 2).info["full_size"] == size


@pytest.mark.parametrize("end", range(1, 12))
def test_a_fraction_refuses_what_the_whole_refuses(end):
    """A file that is cut off: an eighth of the pixels says less about what is missing than all of them."""
    content = photograph(1600, 1201)
    cut = content[: len(content) - end * end * 60]
    seen = []
    for least in (None, 128):
        try:
            seen.append(decode(cut, least_side=least).size)
        except ImageError as error:
            seen.append(error.reason)
    assert seen[0] == seen[1]


def test_a_large_file_with_odd_sides_and_a_missing_end_stays_at_half():
    """Its mended pixels came whole, with four times the memory, since half of an odd side is rounded up."""
    content = photograph(1601, 1201)
    assert decode(content[:-40], max_pixels=1_000_000).size == (801, 601)
