"""Image towers of open_clip, with or without their projection."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final, Literal, cast

from torch import nn

from samething.errors import ArtefactError, InputError, first_line, needed
from samething.images import Preprocessing, ResizePolicy

_RESIZE: Final[dict[str, ResizePolicy]] = {
    "shortest": "short_side_crop", "squash": "squash", "longest": "longer_side_pad",
}  # fmt: skip


def open_clip_network(
    identifier: str,
    *,
    projection: bool = False,
    size: int | None = None,
    pretrained: bool = True,
    checkpoint: Path | None = None,
    device: Literal["cpu", "meta"] = "cpu",
) -> nn.Module:
    """An image tower of open_clip that maps normalised pixels (b, 3, height, width) to features (b, w).

    Args:
        identifier: ARCHITECTURE/WEIGHTS.
        projection: keep the projection into the space shared with texts.
        size: side of the input, where it is not the architecture's own.
        pretrained: with the weights; otherwise random.
        checkpoint: a file in open_clip's layout instead of the weights named.
        device: meta builds without memory, to count.

    Raises:
        ArtefactError: the checkpoint does not exist or does not fit.
        InputError: open_clip does not know the name.
        MissingExtraError: open_clip is not installed.
    """
    open_clip = needed("open_clip", extra="train")
    architecture, tag = split_identifier(identifier)
    options: dict[str, Any] = {"force_image_size": size} if size else {}
    source = str(checkpoint) if checkpoint else (tag if pretrained else None)
    if checkpoint and not checkpoint.is_file():
        raise ArtefactError(
            f"{checkpoint} does not exist",
            expected=f"a checkpoint of {architecture} in open_clip's layout",
            next_step="check the path given with --weights",
        )
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.ERROR)  # it warns of random weights, which are asked for here
    try:
        model = open_clip.create_model(architecture, pretrained=source, device=device, **options)
    except Exception as error:
        if checkpoint is None:
            raise
        raise ArtefactError(
            f"{checkpoint} does not fit {architecture} ({type(error).__name__}: {first_line(error)})",
            expected=f"a checkpoint of {architecture} in open_clip's layout",
            next_step="check that backbone and checkpoint belong together",
        ) from error
    finally:
        logger.setLevel(before)
    tower: Any = model.visual
    if not projection:
        if hasattr(tower, "trunk"):
            tower = tower.trunk
        elif getattr(tower, "proj", None) is not None:
            tower.proj = None
    return cast(nn.Module, tower)


def open_clip_settings(identifier: str) -> Preprocessing:
    """Preprocessing of open_clip's own evaluation transform."""
    open_clip = needed("open_clip", extra="train")
    architecture, tag = split_identifier(identifier)
    model = open_clip.get_model_config(architecture)
    configured = open_clip.get_pretrained_cfg(architecture, tag)
    side = model["vision_cfg"]["image_size"]
    return Preprocessing(
        size=side if isinstance(side, int) else side[0],
        resize=_RESIZE[configured["resize_mode"]],
        interpolation=configured["interpolation"],
        mean=tuple(map(float, configured["mean"])),
        std=tuple(map(float, configured["std"])),
    )


def split_identifier(identifier: str) -> tuple[str, str]:
    """Architecture and tag of ARCHITECTURE/WEIGHTS, if open_clip knows both.

    Raises:
        InputError: it does not.
    """
    open_clip = needed("open_clip", extra="train")
    architecture, _, tag = identifier.partition("/")
    known = open_clip.list_pretrained()
    if (architecture, tag) not in known:
        tags = [there for name, there in known if name == architecture]
        close = tags or [f"{name}/{there}" for name, there in known if name.startswith(architecture[:5])]
        raise InputError(
            f"open_clip:{identifier}",
            expected="ARCHITECTURE/WEIGHTS that this version of open_clip knows",
            next_step=f"for instance {', '.join(close[:5])}" if close else "see open_clip.list_pretrained()",
        )
    return architecture, tag
