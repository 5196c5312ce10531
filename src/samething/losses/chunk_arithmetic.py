"""What is computed number by number in a chunk of a fused margin step: by torch, or by a compiled file of C.

Both do the same to the same buffers, up to rounding. Torch's operations each read and write the whole chunk;
compiled, what can be done while a number is in a register is done there, at a third of the time. Matrix
products and the optimiser's step are torch's in either case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from samething.losses.chunk_kernels import ChunkKernels


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
    """Kept between the passes: mask i is set where centre i + 1 beats all before it. Compiled, there is but
    one, and its bytes are the number of the nearest centre."""
    masks_as_bytes: list[UInt8[Tensor, "c b"]]
    exponentials_as_bits: Shaped[Tensor, "c b"]
    """bfloat16 as int16: the product with 0 or 1 is the same, in a third of the time; others as they are."""
    planes_as_bits: list[Shaped[Tensor, "c b"]]
    numbers: Float[Tensor, "rows b"]
    """Second pass: exponentials, each with its nearest centre; the others zero."""
    sums: Float[Tensor, " b"]


class TorchArithmetic:
    """By torch's own operations."""

    @staticmethod
    def num_masks(num_centers: int) -> int:
        """Bytes a class and row that say which centre was nearest."""
        return num_centers - 1

    @staticmethod
    def sum_dtype(dtype: torch.dtype) -> torch.dtype:
        """Type of a piece's sums, where weights have this one."""
        return dtype

    def normalise(self, piece: Piece, weight: Float[Tensor, "rows d"], *, lengths_known: bool) -> None:
        """Class weights at unit length, and their lengths."""
        if not lengths_known:
            torch.linalg.vector_norm(weight, dim=1, keepdim=True, out=piece.lengths)
        torch.mul(weight, piece.lengths.reciprocal(), out=piece.unit_classes)

    def nearest(self, piece: Piece, *, masks: bool) -> Float[Tensor, "c b"]:
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
        self,
        piece: Piece,
        shift: Float[Tensor, " b"] | None,
        places: Int[Tensor, " t"] | None,
        *,
        masks: bool,
    ) -> None:
        """2 to the power of the nearest centre's number less the shift, and sums over the classes.

        Places, of the right class of a row in a flat [classes, b] matrix, become zero.
        """
        self.exponentiate(piece, self.nearest(piece, masks=masks), shift, places)

    def exponentiate(
        self,
        piece: Piece,
        exponents: Float[Tensor, "c b"],
        shift: Float[Tensor, " b"] | None,
        places: Int[Tensor, " t"] | None,
    ) -> None:
        """The same of exponents that are there already."""
        if shift is not None:
            exponents = torch.sub(exponents, shift, out=piece.exponentials)
        torch.exp2(exponents, out=piece.exponentials)
        if places is not None:
            piece.flat_exponentials.index_fill_(0, places, 0.0)
        # a sum that is wider than what it adds is not vectorised
        piece.sums.copy_(torch.sum(piece.exponentials, dim=0, dtype=piece.lengths.dtype))

    def give_to_nearest(self, piece: Piece) -> None:
        """What was kept goes to each class's nearest centre; the others get zero."""
        rest, planes = piece.exponentials_as_bits, piece.planes_as_bits
        for i in range(len(planes) - 1, 0, -1):
            torch.mul(rest, piece.masks_as_bytes[i - 1], out=planes[i])
            torch.sub(rest, planes[i], out=planes[0] if i == 1 else rest)

    def through_normalisation(self, piece: Piece, weight: Float[Tensor, "rows d"]) -> None:
        """The gradient by the unit class vectors becomes that by the weights."""
        inverse = piece.lengths.reciprocal()
        radial = torch.mul(piece.gradient, weight, out=piece.scratch).sum(dim=1, keepdim=True)
        piece.gradient.addcmul_(weight, radial.mul_(inverse).mul_(inverse), value=-1).mul_(inverse)


class CompiledArithmetic:
    """By ``chunk_kernels.c``, for float32 weights; on one thread, however many torch uses."""

    def __init__(self, kernels: ChunkKernels, dtype: torch.dtype) -> None:
        self.kernels = kernels
        self.suffix = "bf16" if dtype == torch.bfloat16 else "f32"
        self.eager = TorchArithmetic()
        self.no_shift = torch.empty(0)

    @staticmethod
    def num_masks(num_centers: int) -> int:
        """Bytes a class and row that say which centre was nearest."""
        return min(num_centers - 1, 1)

    @staticmethod
    def sum_dtype(dtype: torch.dtype) -> torch.dtype:
        """Type of a piece's sums, where weights have this one."""
        del dtype
        return torch.float64

    def normalise(self, piece: Piece, weight: Float[Tensor, "rows d"], *, lengths_known: bool) -> None:
        """See :meth:`TorchArithmetic.normalise`."""
        self.kernels.normalise(self.suffix, weight, piece.lengths, piece.unit_classes, lengths_known)

    def nearest(self, piece: Piece, *, masks: bool) -> Float[Tensor, "c b"]:
        """See :meth:`TorchArithmetic.nearest`."""
        best = piece.nearest[0]
        which = piece.masks_as_bytes[0] if masks and piece.masks else None
        self.kernels.nearest(self.suffix, piece.cosines, best, which, len(piece.planes))
        return best

    def sum_exponentials(
        self,
        piece: Piece,
        shift: Float[Tensor, " b"] | None,
        places: Int[Tensor, " t"] | None,
        *,
        masks: bool,
    ) -> None:
        """See :meth:`TorchArithmetic.sum_exponentials`."""
        if shift is None:
            if len(self.no_shift) != len(piece.sums):
                self.no_shift = torch.zeros(len(piece.sums))
            shift = self.no_shift
        which = piece.masks_as_bytes[0] if masks and piece.masks else None
        self.kernels.nearest(
            self.suffix,
            piece.cosines,
            piece.exponentials,
            which,
            len(piece.planes),
            shift,
            places,
            piece.sums,
        )

    def exponentiate(
        self,
        piece: Piece,
        exponents: Float[Tensor, "c b"],
        shift: Float[Tensor, " b"] | None,
        places: Int[Tensor, " t"] | None,
    ) -> None:
        """See :meth:`TorchArithmetic.exponentiate`: torch's, like the margin's own operations around."""
        self.eager.exponentiate(piece, exponents, shift, places)

    def give_to_nearest(self, piece: Piece) -> None:
        """See :meth:`TorchArithmetic.give_to_nearest`."""
        if piece.masks:
            k = len(piece.planes)
            self.kernels.spread(self.suffix, piece.exponentials, piece.masks_as_bytes[0], piece.numbers, k)

    def through_normalisation(self, piece: Piece, weight: Float[Tensor, "rows d"]) -> None:
        """See :meth:`TorchArithmetic.through_normalisation`."""
        self.kernels.through_normalisation(piece.gradient, weight, piece.lengths)


Arithmetic: TypeAlias = TorchArithmetic | CompiledArithmetic
