"""How an image processor of Hugging Face transformers prepares images, in this project's terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from samething.images import Preprocessing

_RESAMPLING: Final[Mapping[int, Literal["lanczos", "bilinear", "bicubic"]]] = {
    1: "lanczos", 2: "bilinear", 3: "bicubic",
}  # fmt: skip


def processor_preprocessing(processor: Any) -> Preprocessing:
    """What an image processor of transformers does, said in this project's terms."""
    size = dict(processor.size or {})
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    side = int(crop.get("height") or size.get("height") or size.get("shortest_edge") or 224)
    short_side = int(size.get("shortest_edge") or 0)
    return Preprocessing(
        size=side,
        resize="short_side_crop" if short_side else "squash",
        crop_fraction=side / short_side if short_side else 1.0,
        interpolation=_RESAMPLING[int(processor.resample)],
        mean=tuple(map(float, processor.image_mean)),
        std=tuple(map(float, processor.image_std)),
        place=(0.4999, 0.4999) if crop else (0.5, 0.5),  # its offset is rounded down, others' to even
    )
