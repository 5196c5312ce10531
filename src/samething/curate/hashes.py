"""What two copies of one image share: the SHA-256 of the file, and a perceptual hash of what it shows.

The perceptual hash is pHash (Zauner, *Implementation and Benchmarking of Perceptual Image Hash Functions*,
2010): the image in grey at 32 × 32, its cosine transform, the 64 coefficients of the lowest frequencies
without the constant ones, each a bit that says whether it is above their median. Saving an image again or
scaling it changes few of the 64 bits; two different images differ in about 32. The hash of the mirrored
image costs nothing more, because mirroring changes only the sign of every other column of coefficients.
Cutting off a border changes many bits, so the inner part of each image has a hash of its own: what was cut
from an image is near that.

A hash is taken once per file: results are kept in an SQLite file under its address, and its size and time of
change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from samething.arrays import Bool, Float, UInt64
from samething.catalog import Catalog
from samething.curate.sources import sources_of
from samething.errors import ArtefactError, ImageError
from samething.files import disk_errors
from samething.images import Source, as_they_are, checksum, decode, in_threads, keyed
from samething.progress import progress_bar

IMAGES_PER_COMMIT: Final = 1024
"""Images whose hashes are written at a time; what a killed run loses at most."""

_SIDE: Final = 32
_COSINES: Final = np.cos(np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * np.arange(1, 9)[:, None])
"""Rows 1 to 8 of the discrete cosine transform (type II) of 32 values, not normalised: the frequencies that
become bits, in each direction. Row 0 is the mean, which every light changes."""

FLATTEST: Final = 2.0
"""Standard deviation of the grey values, 0 to 255, below which an image has no hash: nothing is in it but
noise, and all such images would look alike or not by chance."""

_TABLE: Final = """
create table if not exists images (
    path text primary key, size integer, changed_ns integer,
    sha256 text, hash integer, mirrored integer, inner integer, reason text
) without rowid
"""

_RESULTS: Final = "sha256, hash, mirrored, inner, reason"

INNER_SHARE: Final = 0.88
"""Share of each side that the inner part keeps; with some bits of tolerance it stands for 0.82 to 0.94."""

_Row: TypeAlias = tuple[str | None, int | None, int | None, int | None, str | None]
"""SHA-256, hash, those of the mirrored image and of its inner part, and the reason why there are none."""
_NOTHING: Final = (None, None, None, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hashes:
    """Hashes of n images, in catalog order."""

    sha256: np.ndarray
    """n strings of 64 hexadecimal digits; empty where the image cannot be read."""
    perceptual: UInt64[np.ndarray, " n"]
    """64 bits; 0 where there is none."""
    mirrored: UInt64[np.ndarray, " n"]
    """The same of the image mirrored left to right."""
    inner: UInt64[np.ndarray, " n"]
    """The same of the middle of the image, 88 % of each side."""
    is_hashed: Bool[np.ndarray, " n"]
    """Whether there is a perceptual hash: the image can be read and shows more than one colour."""
    unreadable: Mapping[int, str]
    """Row and reason of the images that cannot be read."""
    num_computed: int = 0
    """Images opened in this run; the others were known."""


class PerceptualHashes(NamedTuple):
    """The 64-bit hashes of one image."""

    own: int
    mirrored: int
    inner: int


def perceptual_hashes(image: Image.Image) -> PerceptualHashes | None:
    """The 64-bit hashes of a decoded image; None for a flat one.

    >>> ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1)))
    >>> found = perceptual_hashes(ramp)
    >>> perceptual_hashes(ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).own == found.mirrored
    True
    >>> perceptual_hashes(Image.new("RGB", (64, 64), "white")) is None
    True
    """
    grey = image.convert("L")
    width, height = grey.size
    left, top = width * (1 - INNER_SHARE) / 2, height * (1 - INNER_SHARE) / 2
    whole = _low_frequencies(grey, (0.0, 0.0, float(width), float(height)))
    if whole is None:
        return None
    inner = _low_frequencies(grey, (left, top, width - left, height - top))
    # mirrored, the n-th cosine changes its sign where n is odd; the columns here are numbered from 1
    mirrored = whole * np.where(np.arange(1, 9) % 2, -1.0, 1.0)
    # an image with nothing but a border has no inner hash; its own one stands for it
    return PerceptualHashes(_bits(whole), _bits(mirrored), _bits(whole if inner is None else inner))


def _low_frequencies(
    grey: Image.Image, box: tuple[float, float, float, float]
) -> Float[np.ndarray, "8 8"] | None:
    """Cosine coefficients of a part of an image; None where that is flat."""
    small = grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box=box)
    values = np.asarray(small, np.float64)
    if values.std() < FLATTEST:
        return None
    return np.asarray(_COSINES @ values @ _COSINES.T)


def _bits(low: Float[np.ndarray, "8 8"]) -> int:
    """Which coefficients are above the median, as an integer; rounded first, so that both halves of an even
    image give the same zeros."""
    values = np.round(low.ravel(), 6)
    return int.from_bytes(np.packbits(values > np.median(values)).tobytes(), "big")


def image_hashes(images: Catalog, *, cache: Path) -> Hashes:
    """SHA-256 and perceptual hashes of every image, from the cache where the file has not changed.

    Of a part of an image, the box is added to the SHA-256 of the file: two parts of one file are not copies.

    A killed run goes on from the cache. Progress is shown on stderr.

    Args:
        images: what is hashed.
        cache: SQLite file that is read and added to; made if missing.

    Raises:
        ArtefactError: the cache is no file of this kind.
        InputError: the cache cannot be written.
    """
    rows: list[_Row] = []
    num_computed = 0
    with _database(Path(cache)) as database, progress_bar("images") as progress:
        task = progress.add_task("hashing", total=len(images))
        sources = sources_of(images)
        while block := list(itertools.islice(sources, IMAGES_PER_COMMIT)):
            marks = ",".join("?" * len(block))
            query = f"select path, size, changed_ns, {_RESULTS} from images where path in ({marks})"
            known = {row[0]: row[1:] for row in database.execute(query, [source.key for source in block])}
            block = list(as_they_are(block))
            new = {
                source.key: source
                for source in block
                if not source.mark or tuple(map(str, known.get(source.key, ())[:2])) != _state(source)
            }
            computed: dict[str, _Row] = {}
            for key, found in zip(new, in_threads(_hash, new.values()), strict=True):
                computed[key] = (*_NOTHING, found.reason) if isinstance(found, ImageError) else found
            with database:
                database.executemany(
                    "insert or replace into images values (?, ?, ?, ?, ?, ?, ?, ?)",
                    [(key, *_state(new[key]), *row) for key, row in computed.items() if new[key].mark],
                )
            rows += [computed[key] if key in computed else known[key][2:] for key in (s.key for s in block)]
            num_computed += sum(source.key in computed for source in block)
            progress.advance(task, len(block))
    numbers = [[row[place] or 0 for row in rows] for place in (1, 2, 3)]
    # SQLite's integers are signed
    whole, mirrored, inner = np.asarray(numbers, np.int64).view(np.uint64)
    return Hashes(
        sha256=np.asarray([row[0] or "" for row in rows], dtype=object),
        perceptual=whole,
        mirrored=mirrored,
        inner=inner,
        is_hashed=np.asarray([row[1] is not None for row in rows], dtype=bool),
        unreadable={number: row[4] for number, row in enumerate(rows) if row[4] is not None},
        num_computed=num_computed,
    )


@contextlib.contextmanager
def _database(cache: Path) -> Iterator[sqlite3.Connection]:
    with disk_errors(cache):
        cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(cache, timeout=60)) as database:
            database.execute(_TABLE)
            yield database
    except sqlite3.DatabaseError as error:
        raise ArtefactError(
            f"{cache} cannot be used ({error})",
            expected="a file of hashes written by samething curate, or a path for a new one",
            next_step=f"remove {cache}: they are computed again; or name another file (hashes = ...)",
        ) from error


def _state(source: Source) -> tuple[str, str]:
    """Size and time of change; of an image elsewhere what its server says, in one or both."""
    size, _, changed = source.mark.partition(":")
    return size, changed


def _hash(source: Source) -> _Row:
    found = perceptual_hashes(decode(source))
    sha256 = keyed(checksum(source), source.box)
    if found is None:
        return (sha256, None, None, None, None)
    own, mirrored, inner = np.asarray(found, np.uint64).view(np.int64).tolist()  # SQLite's are signed
    return (sha256, own, mirrored, inner, None)
