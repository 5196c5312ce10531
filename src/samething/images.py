"""One picture, from any file to the pixels a backbone sees: the only decoding path of the project.

Training, indexing and querying all go through :func:`decode` and :func:`prepare`, so a picture looks the
same to the model whenever it is met.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

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
    ".apng", ".avif", ".bmp", ".dib", ".gif", ".heic", ".heif", ".ico", ".j2k", ".jfif", ".jp2", ".jpe",
    ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp",
})

# What is tried on a file, whatever its name. A closed list, because Pillow would start Ghostscript on some
# others; HEIF counts where a plugin for it is registered. TGA is last: it has no signature.
FORMATS: Final = (
    "JPEG", "MPO", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "BMP", "DIB", "ICO", "PPM",
    "TGA",
)

# First bytes of the formats people keep pictures in, to find those whose name does not say so.
_SIGNATURES: Final = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",  # TIFF, little-endian
    b"MM\x00*",  # TIFF, big-endian
)
# fmt: on

# EXIF 2.3, tag 0x0112; 1 is upright
_TURNS: Final[dict[object, Image.Transpose]] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_LONGEST_STRIP: Final = 64


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
    place: tuple[float, float] = (0.5, 0.5)
    """Where ``short_side_crop`` cuts: shares of the spare room left of it and above it, in [0, 1]."""
    flip: bool = False
    """Mirror the prepared picture, left for right."""
    views: tuple[Preprocessing, ...] = ()
    """Several preparations of the same picture, one below the other on a canvas; the other fields are then
    those of the canvas: its width is ``size``, the widest view's, and each view is normalised by its own
    ``mean`` and ``std``."""

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
        for name, value, legal in (
            ("resize", self.resize, get_args(ResizePolicy)),
            ("interpolation", self.interpolation, tuple(_RESAMPLING)),
        ):
            if value not in legal:
                raise InputError(
                    f"{name}={value!r}",
                    expected=f"one of {', '.join(legal)}",
                    next_step=f"give another {name}",
                )
        if min(self.std) <= 0:
            raise InputError(f"std={self.std}", expected="numbers above 0", next_step="give another std")
        if not all(0 <= share <= 1 for share in self.place):
            raise InputError(
                f"place={self.place}", expected="two shares in [0, 1]", next_step="give another place"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a prepared picture, in pixels."""
        if self.views:
            return sum(view.shape[0] for view in self.views), max(view.shape[1] for view in self.views)
        return self.size, self.size

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, for fingerprints and configuration files.

        What came later than the format (place, flip, views) is left out where it says nothing.
        """
        value: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            item = getattr(self, field.name)
            if field.name in _LATER_FIELDS and item == field.default:
                continue
            if field.name == "views":
                item = [view.to_json() for view in item]
            value[field.name] = list(item) if isinstance(item, tuple) else item
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_json`."""
        fields: dict[str, Any] = {
            key: tuple(item) if isinstance(item, list) else item for key, item in value.items()
        }
        if "views" in fields:
            fields["views"] = tuple(cls.from_json(view) for view in fields["views"])
        return cls(**fields)


_LATER_FIELDS: Final = ("place", "flip", "views")


def decode(picture: Picture, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one picture to upright 8-bit RGB. Safe to call from several threads at once.

    EXIF orientation is applied, transparency is laid on white, 16-bit and float values are scaled to 8 bits,
    CMYK, grey and palette pictures become RGB, and of an animated file the first frame is taken. Colour
    profiles are not applied, as in the pipelines that the backbones were trained with.

    Pillow's warnings about odd metadata pass through: filters are the application's to set, and changing
    them here would race with other threads.

    Args:
        picture: a path, the bytes of a file, a Pillow image (its current frame), or a uint8 array
            (height, width[, 3]).
        max_pixels: refuse larger pictures before they are unpacked. Pillow refuses files of more than twice
            its own ``Image.MAX_IMAGE_PIXELS`` in any case.

    Raises:
        ImageError: not a picture, damaged, empty, too large or not readable; the message says which.
    """
    if isinstance(picture, np.ndarray):
        return _from_array(picture)
    with _opened(picture, max_pixels=max_pixels) as image:
        return _to_rgb(image)


@contextlib.contextmanager
def _opened(picture: str | Path | bytes | Image.Image, *, max_pixels: int) -> Iterator[Image.Image]:
    """A picture with its header read and its size checked; whatever goes wrong inside is an ImageError."""
    name = _name_of(picture)
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(picture, Image.Image):
                image = picture
            else:
                stream = stack.enter_context(_stream(picture, name))
                image = stack.enter_context(Image.open(stream, formats=_formats()))
            _check_size(image, name=name, max_pixels=max_pixels)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not a picture in a known format",
            expected=f"one of {', '.join(FORMATS)}",
            next_step="convert or remove the file",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, "too many", max_pixels) from error
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise nearly anything on a damaged file
        raise ImageError(
            f"{name} is damaged or of a kind that cannot be decoded ({error or type(error).__name__})",
            expected="a whole picture file",
            next_step="replace or remove the file",
        ) from error


def _name_of(picture: str | Path | bytes | Image.Image) -> str:
    if isinstance(picture, bytes):
        return "the bytes given"
    return "the Pillow image" if isinstance(picture, Image.Image) else str(picture)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextlib.contextmanager
def _stream(picture: str | Path | bytes, name: str) -> Iterator[BinaryIO]:
    """The bytes of a file; refuses what is empty, missing or no regular file (a pipe would never end)."""
    empty = ImageError(f"{name} is empty", expected="a picture", next_step="replace or remove the file")
    if isinstance(picture, bytes):
        if not picture:
            raise empty
        yield io.BytesIO(picture)
        return
    try:
        status = Path(picture).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(f"{name} is not a file", expected="a picture file", next_step="check the path")
        if status.st_size == 0:
            raise empty
        stream = Path(picture).open("rb")  # noqa: SIM115 (closed below)
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise ImageError(
            f"{name}: {getattr(error, 'strerror', None) or error}",
            expected="a readable picture file",
            next_step="check the path and its permissions",
        ) from error
    with stream:
        yield stream


def _check_size(image: Image.Image, *, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height == 0:
        raise ImageError(f"{name} has no pixels", expected="a picture", next_step="remove the file")
    if width * height > max_pixels:
        raise _too_large(name, f"{width:,} × {height:,} = {width * height:,}", max_pixels)


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


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _scaled_to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow drops the alpha of "La" on any other way
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Turn a picture the way its EXIF orientation says.

    Not ``ImageOps.exif_transpose``, which also rewrites the metadata and so fails on pictures whose pixels
    are whole but whose metadata is not.
    """
    image.load()  # first, because Pillow turns TIFF files by itself while loading
    turn = _TURNS.get(_orientation(image.getexif))
    return image if turn is None else image.transpose(turn)


def _orientation(getexif: Callable[[], Image.Exif]) -> object:
    """The EXIF orientation, 1…8; 1 (upright) where there is none or the metadata is damaged."""
    try:
        return getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata makes the pixels no worse
        return 1


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits, scaled to 8 bits.

    Integers are read as 16-bit; if they exceed that, their largest becomes white. Floats are read as [0, 1],
    or as [0, 255] if they exceed 1. What is not finite becomes black.
    """
    values = np.asarray(image).astype(np.float64)
    values[~np.isfinite(values)] = 0
    largest = float(values.max())
    if image.mode.startswith("F"):
        scale = 255.0 if largest <= 1 else 1.0
    elif image.mode == "I" and largest <= 255:
        scale = 1.0  # mode "I" also carries 8-bit values (PGM, label maps); they stay as they are
    else:
        scale = 255 / max(65535.0, largest)
    return Image.fromarray((values * scale).round().clip(0, 255).astype(np.uint8))


def prepare(image: Image.Image, preprocessing: Preprocessing) -> Pixels:
    """Resize and crop a decoded picture to uint8 (3, height, width): (3, size, size), or a canvas of views.

    The arithmetic is Pillow's antialiased resampling and torchvision's rounding of sides and crop offsets,
    so that the pixels equal those of timm's evaluation transform. Only strips longer than 64 times their
    width may differ under ``short_side_crop``: their ends, which the crop leaves out, are cut off first.
    """
    if preprocessing.views:
        return _canvas([prepare(image, view) for view in preprocessing.views], preprocessing.shape)
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
        short_side = int(size / preprocessing.crop_fraction)
        square = _short_side_crop(image, size, short_side, resampling, preprocessing.place)
    pixels = np.asarray(square).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[:, :, ::-1] if preprocessing.flip else pixels)


def _canvas(views: Sequence[Pixels], shape: tuple[int, int]) -> Pixels:
    """Views of one picture, one below the other; what a narrower one leaves free is black and never read."""
    canvas = np.zeros((3, *shape), np.uint8)
    top = 0
    for view in views:
        height, width = view.shape[1:]
        canvas[:, top : top + height, :width] = view
        top += height
    return canvas


def _short_side_crop(
    image: Image.Image,
    size: int,
    short_side: int,
    resampling: Image.Resampling,
    place: tuple[float, float],
) -> Image.Image:
    image = _without_far_ends(image)
    width, height = image.size
    if width <= height:
        resized = (short_side, int(short_side * height / width))
    else:
        resized = (int(short_side * width / height), short_side)
    left, top = round((resized[0] - size) * place[0]), round((resized[1] - size) * place[1])
    scaled = image if image.size == resized else image.resize(resized, resampling)
    return scaled.crop((left, top, left + size, top + size))


def _without_far_ends(image: Image.Image) -> Image.Image:
    """Cut a strip to 64 times its width: resized whole, one of 1 × 60,000 pixels would need gigabytes."""
    width, height = image.size
    longest = _LONGEST_STRIP * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))


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


def dimensions(path: Path, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of a picture file in pixels, upright, from its header alone.

    A file that is cut off after its header has dimensions but cannot be decoded. A PNG that keeps its EXIF
    data behind its pixels is taken as upright.

    Raises:
        ImageError: not a picture, empty, too large or not readable.
    """
    with _opened(path, max_pixels=max_pixels) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow reports the upright size of these
            return width, height
        # the base class's method, because the one for PNG unpacks the whole picture
        turned = _orientation(lambda: Image.Image.getexif(image)) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def is_picture_file(path: Path) -> bool:
    """Whether a file looks like a picture: by its suffix, or for other names by its first bytes.

    A broken link named like a picture counts, so that it is listed; pipes and devices do not.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        if path.suffix.lower() in PICTURE_SUFFIXES:
            return True
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError:
        return path.suffix.lower() in PICTURE_SUFFIXES
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def find_pictures(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Walk a folder in sorted order and yield every file with whether it looks like a picture.

    Hidden files and folders (names starting with a dot) are passed over. Links to folders are not followed;
    they are yielded as files that are no pictures.

    Raises:
        InputError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise InputError(
            f"cannot list the folder {error.filename}: {error.strerror}",
            expected="folders that this user may read",
            next_step="change the folder's permissions, or move it elsewhere",
        ) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted([*names, *links]):
            if not name.startswith("."):
                path = Path(parent, name)
                yield path, is_picture_file(path)


def to_batch(pixels: list[Pixels]) -> UInt8[np.ndarray, "b 3 height width"]:
    """Stack prepared pictures of one size."""
    return np.stack(pixels)
