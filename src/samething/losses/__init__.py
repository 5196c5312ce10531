"""Margin-softmax losses: pure functions, margins with their state, and class weights that train under them.

Pick one by name::

    margin = build_margin("arcface", num_classes=100, margin_radians=0.5)
    loss = MarginHead(embedding_dim=64, num_classes=100, margin=margin, num_centers=3)
    loss(embeddings, labels).backward()

``docs/losses.md`` has a section per loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

from samething.errors import InputError
from samething.losses.head import MarginHead
from samething.losses.margins import (
    AdaCos,
    AdaFace,
    ArcFace,
    BatchRows,
    CosFace,
    CurricularFace,
    DynamicArcFace,
    LiArcFace,
    Margin,
    NormFace,
    RowContext,
)

LOSSES: Final[dict[str, Callable[..., Margin]]] = {
    "normface": NormFace,
    "cosface": CosFace,
    "arcface": ArcFace,
    "dynm-arcface": DynamicArcFace,
    "liarcface": LiArcFace,
    "adacos": AdaCos,
    "curricularface": CurricularFace,
    "adaface": AdaFace,
}
"""Name -> margin, built from keyword options. Sub-centres are an option of the class weights."""


def build_margin(
    name: str, *, num_classes: int, class_counts: Sequence[int] | None = None, **options: Any
) -> Margin:
    """A margin by name.

    Args:
        name: a key of ``LOSSES``.
        num_classes: C; handed on to the margins that ask for it.
        class_counts: training images of each class; only ``dynm-arcface`` needs them.
        options: the margin's own keyword options, such as ``scale`` and ``margin_radians``.

    Raises:
        InputError: no such loss, an option that it does not have or of another kind, or class counts missing
            or too many.

    >>> build_margin("cosface", num_classes=10, margin=0.2).margin
    0.2
    """
    if name not in LOSSES:
        raise InputError(
            f"loss {name!r}", expected="one of " + ", ".join(LOSSES), next_step="choose one of these"
        )
    constructor = LOSSES[name]
    accepted = inspect.signature(constructor).parameters
    facts: dict[str, Any] = {"num_classes": num_classes, "class_counts": class_counts}
    unknown = options.keys() - (accepted.keys() - facts.keys())
    if unknown:
        raise InputError(
            f"option {', '.join(sorted(unknown))} for the loss {name!r}",
            expected="only " + ", ".join(sorted(accepted.keys() - facts.keys())),
            next_step="remove it or choose another loss",
        )
    if "class_counts" in accepted and (class_counts is None or len(class_counts) != num_classes):
        raise InputError(
            f"{'no' if class_counts is None else len(class_counts)} class counts for {num_classes} classes",
            expected=f"one number of training images per class for the loss {name!r}",
            next_step="pass class_counts, counted on the training catalog",
        )
    for key, value in options.items():
        default = accepted[key].default
        if isinstance(default, bool) and value in (0, 1):
            options[key] = bool(value)  # 0 and 1 are also false and true
            continue
        kind = {bool: "true or false", str: "a word"}.get(type(default), "a number")
        fits = isinstance(value, str) if kind == "a word" else isinstance(value, int | float)
        if kind == "true or false" or not fits or (isinstance(value, bool) and kind == "a number"):
            raise InputError(
                f"{key} = {value!r} for the loss {name!r}",
                expected=f"{kind}, such as {default}",
                next_step="see docs/losses.md for the options of every loss",
            )
    return constructor(**{key: facts[key] for key in facts.keys() & accepted.keys()}, **options)


__all__ = [
    "LOSSES",
    "AdaCos",
    "AdaFace",
    "ArcFace",
    "BatchRows",
    "CosFace",
    "CurricularFace",
    "DynamicArcFace",
    "LiArcFace",
    "Margin",
    "MarginHead",
    "NormFace",
    "RowContext",
    "build_margin",
]
