"""One picture, from any file to the pixels a backbone sees: the only decoding path of the project.

Training, indexing and querying all go through :func:`decode` and :func:`prepare`, so a picture looks the
same to the model whenever it is met.
"""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from samething.arrays import PixelBatch, Pixels
from samething.errors import ImageError, InputError

Picture: TypeAlias = str | Path | bytes | Image.Image | np.ndarray
"""A path, the bytes of a file, a Pillow image, or a uint8 array (height, width[, 3])."""

MAX_PIXELS: Final = 89_478_485
"""Pictures with more pixels are refused before they are unpacked (Pillow's own threshold)."""

ResizePolicy: TypeAlias = Literal["short_side_crop", "squash", "longer_side_pad"]

_RESAMPLING: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}

# fmt: off
PICTURE_SUFFIXES: Final = frozenset({
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg",
    ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})
# fmt: on

# First bytes of the formats people keep pictures in, to find those whose name does not say so.
_SIGNATURES: Final = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",  # TIFF, little-endian
    b"MM\x00*",  # TIFF, big-endian
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a decoded picture becomes a backbone's input."""

    size: int
    """Side of the square input, in pixels."""
    resize: ResizePolicy = "short_side_crop"
    """``short_side_crop``: shorter side to ``size / crop_fraction``, then the central square;
    ``squash``: both sides to ``size``; ``longer_side_pad``: longer side to ``size``, the rest filled."""
    crop_fraction: float = 1.0
    """Share of the resized shorter side that the central crop keeps, in (0, 1]; for ``short_side_crop``."""
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    """Resampling filter, antialiased."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Subtracted from red, green and blue after scaling to [0, 1]."""
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides red, green and blue after the mean is subtracted."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(
                f"size={self.size}", expected="a side of at least 1 pixel", next_step="give another size"
            )
        if not 0 < self.crop_fraction <= 1:
            raise InputError(
                f"crop_fraction={self.crop_fraction}",
                expected="a share in (0, 1]",
                next_step="give another crop_fraction",
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for fingerprints and configuration files."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_json`."""
        fields: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        return cls(**fields)


def decode(picture: Picture, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one picture to upright 8-bit RGB.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float values are scaled to 8 bits,
    CMYK, grey and palette pictures become RGB, and of an animation the first frame is taken.

    Args:
        picture: a path, the bytes of a file, a Pillow image, or a uint8 array (height, width[, 3]).
        max_pixels: refuse larger pictures before they are unpacked.

    Raises:
        ImageError: not a picture, damaged, empty, too large or not readable; the message says which.
    """
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, name="the Pillow image", max_pixels=max_pixels)
    name = "the bytes given" if isinstance(picture, bytes) else str(picture)
    try:
        content = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
    except OSError as error:
        raise ImageError(
            f"{name}: {error.strerror or error}",
            expected="a readable picture file",
            next_step="check the path and its permissions",
        ) from error
    if not content:
        raise ImageError(f"{name} is empty", expected="a picture", next_step="replace or remove the file")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of the sizes that are refused just below
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as opened:
                return _to_rgb(opened, name=name, max_pixels=max_pixels)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not a picture in a known format",
            expected="JPEG, PNG, WebP, TIFF, GIF or another format that Pillow reads",
            next_step="convert or remove the file",
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, "more than twice the limit of", max_pixels) from error
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise nearly anything on a damaged file
        raise ImageError(
            f"{name} is damaged ({error or type(error).__name__})",
            expected="a whole picture file",
            next_step="replace or remove the file",
        ) from error


def _too_large(name: str, size: str, max_pixels: int) -> ImageError:
    return ImageError(
        f"{name} has {size} pixels",
        expected=f"at most {max_pixels:,} pixels",
        next_step="scale the picture down",
    )


def _from_array(array: np.ndarray) -> Image.Image:
    shape_is_right = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if array.dtype != np.uint8 or not shape_is_right or 0 in array.shape:
        raise ImageError(
            f"an array of shape {array.shape} and type {array.dtype}",
            expected="uint8 (height, width) or (height, width, 3)",
            next_step="convert it, for instance with (array * 255).astype('uint8')",
        )
    return Image.fromarray(array).convert("RGB")


def _to_rgb(image: Image.Image, *, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} has no pixels", expected="a picture", next_step="remove the file")
    if width * height > max_pixels:
        raise _too_large(name, f"{width:,} × {height:,} = {width * height:,}", max_pixels)
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _scaled_to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits: integers are read as 16-bit, floats as [0, 1] unless they exceed it."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I"):
        # mode "I" also carries 8-bit values (PGM, some PNG); they stay as they are
        scale = 255 / 65535 if image.mode != "I" or values.max() > 255 else 1.0
    else:
        values = np.nan_to_num(values)
        scale = 255.0 if values.max() <= 1 else 1.0
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Resize and crop a decoded picture to uint8 (3, size, size).

    The arithmetic is Pillow's antialiased resampling and torchvision's rounding of sides and crop offsets,
    so that the pixels equal those of timm's evaluation transform.
    """
    size, resampling = preprocessing.size, _RESAMPLING[preprocessing.interpolation]
    if preprocessing.resize == "squash":
        square = image.resize((size, size), resampling)
    elif preprocessing.resize == "longer_side_pad":
        width, height = image.size
        scale = size / max(width, height)
        fitted = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), resampling)
        fill = tuple(round(255 * channel) for channel in preprocessing.mean)
        square = Image.new("RGB", (size, size), fill)
        square.paste(fitted, ((size - fitted.width) // 2, (size - fitted.height) // 2))
    else:
        square = _short_side_crop(image, size, int(size / preprocessing.crop_fraction), resampling)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _short_side_crop(
    image: Image.Image, size: int, short_side: int, resampling: Image.Resampling
) -> Image.Image:
    width, height = image.size
    if width <= height:
        resized = (short_side, int(short_side * height / width))
    else:
        resized = (int(short_side * width / height), short_side)
    left, top = round((resized[0] - size) / 2.0), round((resized[1] - size) / 2.0)
    scaled = image if image.size == resized else image.resize(resized, resampling)
    return scaled.crop((left, top, left + size, top + size))


def normalise(pixels: PixelBatch, preprocessing: Preprocessing) -> Float[np.ndarray, "b 3 height width"]:
    """Scale uint8 pixels to [0, 1], subtract the mean and divide by the standard deviation; float32."""
    mean = np.asarray(preprocessing.mean, np.float32)[:, None, None]
    std = np.asarray(preprocessing.std, np.float32)[:, None, None]
    return (pixels.astype(np.float32) / np.float32(255) - mean) / std


def thumbnail(image: Image.Image, *, longer_side: int) -> bytes:
    """A JPEG of the picture whose longer side is at most ``longer_side`` pixels."""
    small = image.copy()
    small.thumbnail((longer_side, longer_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def dimensions(path: Path) -> tuple[int, int]:
    """Width and height of a picture file in pixels, upright, from its header alone.

    Raises:
        ImageError: the header cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation: 5…8 swap the sides
                width, height = image.size
                return (height, width) if turned else (width, height)
    except Exception as error:
        raise ImageError(
            f"{path} has no readable picture header ({error or type(error).__name__})",
            expected="a picture file",
            next_step="replace or remove the file",
        ) from error


def is_picture_file(path: Path) -> bool:
    """Whether a file looks like a picture: by its suffix, or for other names by its first bytes."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return False
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def find_pictures(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Walk a folder in sorted order and yield every file with whether it looks like a picture.

    Hidden files and folders (names starting with a dot) are passed over; links to folders are not followed.
    """
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                path = Path(parent, name)
                yield path, is_picture_file(path)


def to_batch(pixels: list[Pixels]) -> UInt8[np.ndarray, "b 3 height width"]:
    """Stack prepared pictures of one size."""
    return np.stack(pixels)
