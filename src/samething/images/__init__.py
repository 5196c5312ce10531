"""One picture, from any file to the pixels a backbone sees: the only decoding path of the project.

Training, indexing and querying all go through :func:`decode` and :func:`prepare`, so a picture looks the
same to the model whenever it is met. :func:`read_pixels` does both in one call, and knows a faster way whose
pixels differ by 2 of 255 at most.
"""

from __future__ import annotations

from samething.images.decoding import FORMATS, MAX_PIXELS, Picture, clipped, decode
from samething.images.listing import (
    PICTURE_SUFFIXES,
    dimensions,
    find_picture_files,
    find_pictures,
    is_picture_file,
    thumbnail,
)
from samething.images.pixels import read_pixels
from samething.images.preparing import (
    Decoding,
    Preprocessing,
    ResizePolicy,
    normalise,
    prepare,
    to_batch,
)
from samething.images.sources import Box, Source, container_of, is_url, located

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "Box",
    "Decoding",
    "Picture",
    "Preprocessing",
    "ResizePolicy",
    "Source",
    "clipped",
    "container_of",
    "decode",
    "dimensions",
    "find_picture_files",
    "find_pictures",
    "is_picture_file",
    "is_url",
    "located",
    "normalise",
    "prepare",
    "read_pixels",
    "thumbnail",
    "to_batch",
]
