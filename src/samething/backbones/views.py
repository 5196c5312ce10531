"""Several views of an image, several resolutions, several backbones: one canvas in, one feature out.

The views lie one below the other on one canvas of pixels, so whatever feeds a backbone (features, export,
index, search) needs to know nothing of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal, TypeAlias

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
        InputError: an unknown name.
    """
    names = "+".join(PRESETS.get(name, name) for name in views.split("+")).split("+")
    unknown = [name for name in names if name not in VIEWS]
    if unknown:
        raise InputError(
            f"views={views!r}: {', '.join(map(repr, unknown))}",
            expected=f"names joined by +, of {', '.join((*VIEWS, *PRESETS))}",
            next_step="for instance --views crop+pad",
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
        self._plan: list[list[tuple[int, int, int]]] = []  # of each member: network, top, side
        self.width = sum(
            member.width * (len(member.views) if member.combine == "keep" else 1) for member in members
        )
        top = 0
        for number, member in enumerate(members):
            plan = []
            for network, view in zip(member.networks, member.views, strict=True):
                plan.append((unique.index(network), top, view.size))
                top += view.size
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
                self.networks[network]((canvas[:, :, top : top + side, :side] - mean) / std).float()
                for (network, top, side), mean, std in zip(plan, means, stds, strict=True)
            ]
            features.append(torch.cat(described, 1) if combine == "keep" else sum(described) / len(described))
        if len(features) > 1:
            length = (self.width / len(features)) ** 0.5
            features = [length * nn.functional.normalize(feature, dim=1) for feature in features]
        return torch.cat(features, 1)
