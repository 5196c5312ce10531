"""What is computed number by number in a chunk of a fused margin step.

Every operation reads and writes the whole chunk in buffers that are there already, while it is in cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some consecutive classes, and their views of the buffers."""

    start: int
    """First class."""
    stop: int
    """One past the last class."""
    weight: Float[Tensor, "rows d"]
    """Their weights, where all classes take part."""
    lengths: Float[Tensor, "rows 1"]
    unit_classes: Float[Tensor, "rows d"]
    unit_by_dim: Float[Tensor, "d rows"]
    products: Float[Tensor, "rows d"]
    gradient: Float[Tensor, "rows d"]
    scratch: Float[Tensor, "rows d"]
    cosines: Float[Tensor, "rows b"]
    """First pass: every centre with every embedding."""
    planes: list[Float[Tensor, "c b"]]
    """The same, a view a centre."""
    nearest: list[Float[Tensor, "c b"]]
    """Two buffers for running maxima."""
    exponentials: Float[Tensor, "c b"]
    """Kept between the passes."""
    flat_exponentials: Float[Tensor, " cb"]
    masks: list[Bool[Tensor, "c b"]]
    """Kept between the passes: mask i is set where centre i + 1 beats all before it."""
    masks_as_bytes: list[UInt8[Tensor, "c b"]]
    exponentials_as_bits: Shaped[Tensor, "c b"]
    """bfloat16 as int16: the product with 0 or 1 is the same, in a third of the time; others as they are."""
    planes_as_bits: list[Shaped[Tensor, "c b"]]
    numbers: Float[Tensor, "rows b"]
    """Second pass: exponentials, each with its nearest centre; the others zero."""
    sums: Float[Tensor, " b"]


def normalise(piece: Piece, weight: Float[Tensor, "rows d"], *, lengths_known: bool) -> None:
    """Class weights at unit length, and their lengths."""
    if not lengths_known:
        torch.linalg.vector_norm(weight, dim=1, keepdim=True, out=piece.lengths)
    torch.mul(weight, piece.lengths.reciprocal(), out=piece.unit_classes)


def nearest(piece: Piece, *, masks: bool) -> Float[Tensor, "c b"]:
    """The largest of the cosines over the centres of each class; masks say where it was."""
    best = piece.planes[0]
    for i, challenger in enumerate(piece.planes[1:]):
        larger = torch.maximum(best, challenger, out=piece.nearest[i % 2])
        if masks:
            # comparisons of floats are vectorised in place, but not into bytes
            piece.masks[i].copy_(challenger.gt_(best))
        best = larger
    return best


def sum_exponentials(
    piece: Piece,
    exponents: Float[Tensor, "c b"],
    shift: Float[Tensor, " b"] | None,
    places: Int[Tensor, " t"] | None,
) -> None:
    """2 to the power of the exponents less the shift, and sums over the classes.

    Places, of the right class of a row in a flat [classes, b] matrix, become zero.
    """
    if shift is not None:
        exponents = torch.sub(exponents, shift, out=piece.exponentials)
    torch.exp2(exponents, out=piece.exponentials)
    if places is not None:
        piece.flat_exponentials.index_fill_(0, places, 0.0)
    # a sum that is wider than what it adds is not vectorised
    piece.sums.copy_(torch.sum(piece.exponentials, dim=0, dtype=piece.lengths.dtype))


def give_to_nearest(piece: Piece) -> None:
    """What was kept goes to each class's nearest centre; the others get zero."""
    rest, planes = piece.exponentials_as_bits, piece.planes_as_bits
    for i in range(len(planes) - 1, 0, -1):
        torch.mul(rest, piece.masks_as_bytes[i - 1], out=planes[i])
        torch.sub(rest, planes[i], out=planes[0] if i == 1 else rest)


def through_normalisation(piece: Piece, weight: Float[Tensor, "rows d"]) -> None:
    """The gradient by the unit class vectors becomes that by the weights."""
    inverse = piece.lengths.reciprocal()
    radial = torch.mul(piece.gradient, weight, out=piece.scratch).sum(dim=1, keepdim=True)
    piece.gradient.addcmul_(weight, radial.mul_(inverse).mul_(inverse), value=-1).mul_(inverse)
