"""Several views of an image, several resolutions, several backbones: one canvas in, one feature out.

The views lie one below the other on one canvas of pixels, so whatever feeds a backbone (features, export,
index, search) needs to know nothing of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from samething.arrays import Float
from samething.errors import InputError
from samething.images import Preprocessing

Combine: TypeAlias = Literal["average", "keep"]


_View: TypeAlias = Callable[[Preprocessing], Preprocessing]


def _cut(horizontal: float, vertical: float, *, share: float = 1.0) -> _View:
    def view(own: Preprocessing) -> Preprocessing:
        return dataclasses.replace(
            own, resize="short_side_crop", crop_fraction=share, place=(horizontal, vertical)
        )

    return view


VIEWS: Final[Mapping[str, _View]] = {
    "own": lambda own: own,
    "squash": lambda own: dataclasses.replace(own, resize="squash"),
    "pad": lambda own: dataclasses.replace(own, resize="longer_side_pad"),
    "whole": lambda own: dataclasses.replace(own, resize="longer_side", interpolation="bicubic"),
    "crop": _cut(0.5, 0.5),
    "start": _cut(0.0, 0.0),
    "end": _cut(1.0, 1.0),
    "zoom": _cut(0.5, 0.5, share=0.75),
    "top-left": _cut(0.0, 0.0, share=0.75),
    "top-right": _cut(1.0, 0.0, share=0.75),
    "bottom-left": _cut(0.0, 1.0, share=0.75),
    "bottom-right": _cut(1.0, 1.0, share=0.75),
    "mirror": lambda own: dataclasses.replace(own, flip=True),
}
"""Name of a view to how its pixels are prepared, from the backbone's own preprocessing.

``whole`` is ILIAS' (Kordopatis-Zilos et al. 2025): the longer side to the input size, and nothing filled up.
``crop``, ``start`` and ``end`` are squares of the whole shorter side, at the middle and at both ends of the
longer one; ``zoom`` and the corners are squares of three quarters of the shorter side.
"""

PRESETS: Final[Mapping[str, str]] = {
    "aspect": "crop+pad+squash",
    "crops": "start+crop+end",
    "five": "zoom+top-left+top-right+bottom-left+bottom-right",
}
"""Names for several views together."""


def named_views(views: str, own: Preprocessing) -> tuple[Preprocessing, ...]:
    """The preparations that names joined by + stand for.

    >>> [view.resize for view in named_views("aspect", Preprocessing(size=224))]
    ['short_side_crop', 'longer_side_pad', 'squash']

    Raises:
        InputError: an unknown name, or whole among others.
    """
    names = "+".join(PRESETS.get(name, name) for name in views.split("+")).split("+")
    unknown = [name for name in names if name not in VIEWS]
    if unknown:
        raise InputError(
            f"views={views!r}: {', '.join(map(repr, unknown))}",
            expected=f"names joined by +, of {', '.join((*VIEWS, *PRESETS))}",
            next_step="for instance --views crop+pad",
        )
    if "whole" in names and len(names) > 1:
        raise InputError(
            f"views={views!r}",
            expected="whole alone: its network takes any shape, that of other views one",
            next_step="give --views whole, with several --sizes for several resolutions",
        )
    return tuple(VIEWS[name](own) for name in names)


@dataclasses.dataclass(frozen=True)
class Member:
    """One backbone of a canvas: its views, and the network that computes each."""

    networks: Sequence[nn.Module]
    """A network for each view; the same object where one serves several."""
    views: Sequence[Preprocessing]
    """How the pixels of each view are prepared."""
    combine: Combine
    """Average the features of the views, or keep them side by side."""
    width: int
    """Numbers in the feature of one view."""
    licence: str = "unknown"
    """Licence of the weights."""


def canvas_preprocessing(members: Sequence[Member]) -> Preprocessing:
    """How an image becomes the canvas that :class:`CanvasNetwork` reads."""
    views = tuple(view for member in members for view in member.views)
    return Preprocessing(
        size=max(view.size for view in views), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), views=views
    )


class CanvasNetwork(nn.Module):
    """Compute every view on a canvas and join the features.

    The features of several backbones stand side by side, each brought to the same length, the square root of
    the whole width over their number: cosines of the whole are then the mean of the backbones' own cosines,
    and numbers have about unit size. A single backbone's feature keeps its length.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        super().__init__()
        unique = list(dict.fromkeys(network for member in members for network in member.networks))
        self.networks = nn.ModuleList(unique)
        self._combines = [member.combine for member in members]
        self._plan: list[list[tuple[int, int, Preprocessing]]] = []  # of each member: network, top, view
        self.width = sum(
            member.width * (len(member.views) if member.combine == "keep" else 1) for member in members
        )
        top = 0
        for number, member in enumerate(members):
            plan = []
            for network, view in zip(member.networks, member.views, strict=True):
                plan.append((unique.index(network), top, view))
                top += view.shape[0]
            self._plan.append(plan)
            for kind in ("mean", "std"):
                values = torch.tensor([getattr(view, kind) for view in member.views])
                self.register_buffer(f"{kind}_{number}", values.view(-1, 3, 1, 1), persistent=False)

    def forward(self, canvas: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b w"]:
        """Features of canvases with values in [0, 1]."""
        features = []
        for number, (plan, combine) in enumerate(zip(self._plan, self._combines, strict=True)):
            means, stds = getattr(self, f"mean_{number}"), getattr(self, f"std_{number}")
            described = [
                self._described(network, canvas[:, :, top:], view, mean, std)
                for (network, top, view), mean, std in zip(plan, means, stds, strict=True)
            ]
            average = sum(described[1:], described[0]) / len(described)
            features.append(torch.cat(described, 1) if combine == "keep" else average)
        if len(features) > 1:
            length = (self.width / len(features)) ** 0.5
            features = [length * nn.functional.normalize(feature, dim=1) for feature in features]
        return torch.cat(features, 1)

    def _described(
        self,
        number: int,
        canvas: Float[Tensor, "b 3 height width"],
        view: Preprocessing,
        mean: Float[Tensor, "3 1 1"],
        std: Float[Tensor, "3 1 1"],
    ) -> Float[Tensor, "b w"]:
        """Features of the view at the top of a canvas."""
        network, side = self.networks[number], view.size
        pixels = (canvas[:, :, :side, :side] - mean) / std
        if view.resize != "longer_side":
            features: Tensor = network(pixels)
            return features.float()
        sides = (255 * canvas[:, :, side, 0]).round().long()  # as images.preparing.with_its_sides says them
        shapes: Any = torch.stack([(256 * sides[:, 0] + sides[:, 1]).clamp(1, side), sides[:, 2]], 1)
        order, found = [], []
        for shape in shapes.unique(dim=0):
            (rows,) = (shapes == shape).all(1).nonzero(as_tuple=True)
            shorter, is_wide = shape.tolist()
            tall, wide = (shorter, side) if is_wide else (side, shorter)
            order.append(rows)
            found.append(network(whole_patches(pixels[rows, :, :tall, :wide], patch_side(network))).float())
        return torch.cat(found)[torch.cat(order).argsort()]


def whole_patches(pixels: Float[Tensor, "b 3 _ _"], patch: int) -> Float[Tensor, "b 3 _ _"]:
    """Images with zeros around them, up to a whole number of patches each way; left and top get the less.

    >>> whole_patches(torch.ones(1, 3, 2, 4), 4)[0, 0].tolist()[:2]
    [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    """
    around: list[int] = []
    for side in (pixels.shape[3], pixels.shape[2]):
        more = -side % patch
        around += [more // 2, more - more // 2]
    return nn.functional.pad(pixels, around)


def patch_side(network: Any) -> int:
    """Side in pixels of the patches that a transformer cuts its input into; 1 of convolutional networks."""
    config = getattr(getattr(network, "model", None), "config", None)  # of transformers
    if hasattr(config, "num_attention_heads"):
        return int(getattr(config, "patch_size", 1))
    inner = getattr(network, "network", None) or getattr(network, "trunk", network)  # pooled, or open_clip's
    if inner is not network:
        return patch_side(inner)
    return int(network.patch_embed.patch_size[0]) if hasattr(network, "patch_embed") else 1
