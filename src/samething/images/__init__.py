"""One image, from any file to the pixels a backbone sees: the only decoding path of the project.

Training, indexing and querying all go through :func:`decode` and :func:`prepare`, so an image looks the
same to the model whenever it is met. :func:`read_pixels` does both in one call, and knows a faster way whose
pixels differ by 2 of 255 at most.
"""

from __future__ import annotations

from samething.images.addresses import container_of, is_url, located
from samething.images.decoding import ImageLike, clipped, decode, dimensions, thumbnail
from samething.images.finding import find_files
from samething.images.formats import IMAGE_SUFFIXES
from samething.images.pixels import read_pixels
from samething.images.preparing import Decoding, Preprocessing, ResizePolicy, least_side, prepare
from samething.images.reading import as_they_are, checksum, identify, in_threads, prepared
from samething.images.source import Box, Source, disk_state, keyed

__all__ = [
    "IMAGE_SUFFIXES",
    "Box",
    "Decoding",
    "ImageLike",
    "Preprocessing",
    "ResizePolicy",
    "Source",
    "as_they_are",
    "checksum",
    "clipped",
    "container_of",
    "decode",
    "dimensions",
    "disk_state",
    "find_files",
    "identify",
    "in_threads",
    "is_url",
    "keyed",
    "least_side",
    "located",
    "prepare",
    "prepared",
    "read_pixels",
    "thumbnail",
]
