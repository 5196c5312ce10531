"""Colour profiles that matter: applied where colours mean something else than in the usual spaces."""

from __future__ import annotations

import functools
import io
from typing import Final

import numpy as np
from PIL import Image, ImageCms

LEAST_SHIFT: Final = 14.0
"""A profile that moves colours by less (mean over a grid of colours, of 255 levels) is left unapplied, as in
the pipelines that the backbones were trained with. sRGB moves them by 1, Display P3, Adobe RGB and Apple's
old gamma by 11; Rec. 2020 by 18, ProPhoto by 24, linear light by 41."""


def in_usual_colours(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An RGB or CMYK image in sRGB where its profile is an unusual one; else the image as it is, in RGB."""
    transform = unusual(profile, image.mode)
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    return ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(64)
def unusual(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where there is none, a usual, a damaged, or one of other colours."""
    if not profile:
        return None
    levels = np.linspace(0, 255, 5 if mode == "CMYK" else 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(*[levels] * len(mode)), -1).reshape(1, -1, len(mode))
    colours = Image.frombytes(mode, (grid.shape[1], 1), grid.tobytes())
    try:
        transform = ImageCms.buildTransform(
            ImageCms.getOpenProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB"
        )
        found = ImageCms.applyTransform(colours, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    shift = np.abs(np.asarray(found, float) - np.asarray(colours.convert("RGB"), float)).mean()
    return transform if shift >= LEAST_SHIFT else None
