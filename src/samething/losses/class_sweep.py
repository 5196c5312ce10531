"""The arithmetic of a fused margin step: two passes over the classes, a chunk at a time.

The plain path writes matrices of [batch, classes·centres] to memory a dozen times; at 35,000 classes each
is tens of megabytes, and the processor waits for them. Here a chunk of classes is normalised, multiplied
with the embeddings, reduced and multiplied back before the next one is touched. What makes that possible:

* The softmax is taken against a fixed maximum, ``scale × bound``, which every margin can name, so that no
  pass over the logits is needed to find the largest. (A scale far above 64 may need one after all, where a
  row's every logit is far below it.)
* The gradient of a logit is ``p_ij = e_ij / S_i``, and S_i is known only after the last chunk. It is a factor
  of the row, so it moves from the [batch, classes] side to the [batch, d] side of each product.
* The right class of a row is one number per row. It is computed on its own, in the weights' precision; in the
  sweep its place is empty. ``1 - p_iy`` is then a sum over the others and not a difference of near equals.
* Between the passes one number per class and row is kept, ``e_ij``, and which sub-centre was nearest, in
  k - 1 bytes. The [classes, k, batch] matrices live for a chunk and never leave the cache.
* The gradient by the unit class vector, its projection through the normalisation and the optimiser's step
  follow one another while the chunk's weights are in cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from samething.arrays import Bool, Float, Int
from samething.losses.head import check_lengths
from samething.losses.margins import Margin, RowContext

LARGEST_SUM: Final = 87.0
"""Logits are moved down where the sum over the classes could exceed e^87, float32's largest number: at 35,000
classes where the scale is above 76."""

SMALLEST_SUM: Final = 1e-20
"""A row whose moved exponentials add up to less has lost some to underflow; its own maximum is found then."""

LOG2_E: Final = math.log2(math.e)
"""exp2 takes a third of the time of exp, and its base costs nothing: it joins the scale."""

NUMBERS_A_CHUNK: Final = 400_000
"""Cosines a chunk, 1.6 MB in float32. Twice as many are a little faster on an idle AMD Zen 4 and slower on
a busy one, whose cores share the next cache."""

LARGEST_CHUNK_ROWS: Final = 6144
"""Class weights a chunk at most, for small batches: their gradients and copies must stay in cache as well."""

GradientSink: TypeAlias = Callable[[int, Tensor], None]
"""Takes the gradient of some consecutive class weights: number of the first row, gradient [rows, d]."""


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
    products: Float[Tensor, "rows d"]
    gradient: Float[Tensor, "rows d"]
    scratch: Float[Tensor, "rows d"]
    cosines: Float[Tensor, "rows b"]
    """First pass: every centre with every embedding. Second pass, with several centres: exponentials, each
    with its nearest centre; the others zero."""
    planes: list[Float[Tensor, "c b"]]
    """The same, a view a centre."""
    nearest: list[Float[Tensor, "c b"]]
    """Two buffers for running maxima."""
    exponentials: Float[Tensor, "c b"]
    """Kept between the passes."""
    masks: list[Bool[Tensor, "c b"]]
    """Kept between the passes: mask i is set where centre i + 1 beats all before it."""
    sums: Float[Tensor, " b"]


class Workspace:
    """Buffers that all steps share: fresh memory costs more than filling it.

    Args:
        weight: the class weights.
        num_centers: k.
        dtype: of the matrix products.
        limit_bytes: the most that may be kept between the passes; beyond it, the first pass is repeated.
    """

    def __init__(
        self,
        weight: Float[Tensor, "rows d"],
        num_centers: int,
        dtype: torch.dtype,
        limit_bytes: int,
    ) -> None:
        self.weight = weight.detach()
        self.num_centers = num_centers
        self.dtype = dtype
        self.limit_bytes = limit_bytes
        self._sizes: tuple[int, ...] = ()
        self._plans: dict[tuple[int, int], Plan] = {}

    def plan(self, batch: int, num_classes: int) -> Plan:
        """How a batch goes through so many classes, whatever went before; room for it is made.

        The same batch always meets the same chunks, or a resumed run would round differently.
        """
        if (batch, num_classes) not in self._plans:
            k = self.num_centers
            n = min(NUMBERS_A_CHUNK // (k * batch), LARGEST_CHUNK_ROWS // k) // 64 * 64
            n = min(num_classes, max(64, n))
            keeps = num_classes * batch * (self.dtype.itemsize + k - 1) <= self.limit_bytes
            num_chunks = math.ceil(num_classes / n)
            self._make_room(n * k, n * batch, (num_classes if keeps else n) * batch, num_chunks * batch)
            if len(self._plans) >= 4:  # a full batch and the last one of an epoch are usual
                self._plans.clear()
            pieces = [
                self._piece(batch, i, slice(i * n, min(i * n + n, num_classes)), keeps=keeps)
                for i in range(num_chunks)
            ]
            sums = self.sums[: num_chunks * batch].view(num_chunks, batch)
            self._plans[batch, num_classes] = Plan(pieces, classes_a_piece=n, keeps=keeps, sums=sums)
        return self._plans[batch, num_classes]

    def _make_room(self, *sizes: int) -> None:
        """Grow the buffers to these numbers of rows, of cosines in a plane, kept, and of sums."""
        if self._sizes and all(have >= need for have, need in zip(self._sizes, sizes, strict=True)):
            return
        sizes = tuple(max(pair) for pair in zip(sizes, self._sizes or sizes, strict=True))
        num_rows, in_plane, num_kept, num_sums = sizes
        d, k = self.weight.shape[1], self.num_centers
        self.exponentials = torch.empty(num_kept, dtype=self.dtype)
        self.masks = torch.empty(num_kept * (k - 1), dtype=torch.bool)
        self.planes = torch.empty(in_plane * k, dtype=self.dtype)
        self.nearest = torch.empty(2, in_plane, dtype=self.dtype)
        self.sums = torch.empty(num_sums, dtype=self.weight.dtype)
        self.unit_classes = torch.empty(num_rows, d, dtype=self.dtype)
        self.products = torch.empty(num_rows, d, dtype=self.dtype)
        self.scratch = torch.empty(num_rows, d, dtype=self.weight.dtype)
        same = self.dtype == self.weight.dtype
        self.gradient = self.products if same else torch.empty_like(self.scratch)
        self.lengths = torch.empty(len(self.weight), 1, dtype=self.weight.dtype)
        self._sizes = sizes
        self._plans.clear()  # their views are of the buffers before

    def _piece(self, b: int, number: int, classes: slice, *, keeps: bool) -> Piece:
        start, stop, k = classes.start, classes.stop, self.num_centers
        n, kept = stop - start, start if keeps else 0
        exponentials = self.exponentials[kept * b : (kept + n) * b].view(n, b)
        planes = self.planes[: n * k * b].view(n, k, b)
        masks = self.masks[kept * (k - 1) * b : (kept + n) * (k - 1) * b].view(k - 1, n, b)
        return Piece(
            start=start,
            stop=stop,
            weight=self.weight[start * k : stop * k],
            lengths=self.lengths[start * k : stop * k],
            unit_classes=self.unit_classes[: n * k],
            products=self.products[: n * k],
            gradient=self.gradient[: n * k],
            scratch=self.scratch[: n * k],
            cosines=planes.view(n * k, b),
            planes=list(planes.unbind(1)),
            nearest=[each[: n * b].view(n, b) for each in self.nearest],
            exponentials=exponentials,
            masks=list(masks.unbind(0)),
            sums=self.sums[number * b : (number + 1) * b],
        )


@dataclass(frozen=True)
class Plan:
    """The pieces that a batch goes through."""

    pieces: list[Piece]
    classes_a_piece: int
    """Of all but the last."""
    keeps: bool
    """Whether there is room to keep something of every piece between the passes."""
    sums: Float[Tensor, "pieces b"]


@dataclass(frozen=True)
class Targets:
    """Rows of the batch whose own class is in a piece."""

    batch: Int[Tensor, " t"]
    """Batch row."""
    places: Int[Tensor, " t"]
    """Where (class, batch row) is in a flat [classes, b] matrix of the piece."""
    rows: Int[Tensor, " t"]
    """Row of the nearest centre of that class among the piece's."""


class ClassSweep:
    """One step.

    Args:
        workspace: the class weights and buffers.
        margin: elementwise in the cosines, see :mod:`samething.losses.margins`.
        unit: embeddings of unit length.
        labels: their classes.
        classes: the classes that take part, ascending, or None for all.
    """

    target_cosines: Float[Tensor, " b"]
    """Cosine of each row with the nearest centre of its class."""

    def __init__(
        self,
        workspace: Workspace,
        margin: Margin,
        unit: Float[Tensor, "b d"],
        labels: Int[Tensor, " b"],
        classes: Int[Tensor, " sampled"] | None,
    ) -> None:
        self.workspace, self.margin, self.unit, self.classes = workspace, margin, unit, classes
        self.k, self.weight = workspace.num_centers, workspace.weight
        self.centers = self.weight.view(-1, self.k, self.weight.shape[1])
        self.num_classes = len(self.centers) if classes is None else len(classes)
        self.num_rows = self.num_classes * self.k
        self.b = len(unit)
        self.plan = workspace.plan(self.b, self.num_classes)
        self.pieces = self.plan.pieces
        centers = self.centers[labels]
        centers = centers / centers.norm(dim=2, keepdim=True)
        cosines, nearest = (centers @ self.unit[:, :, None])[:, :, 0].max(dim=1)
        self.target_cosines = cosines
        self.target_centers = centers[torch.arange(self.b), nearest]
        columns = labels if classes is None else torch.searchsorted(classes, labels)
        n = self.plan.classes_a_piece
        ordered, order = columns.sort()
        bounds = torch.searchsorted(ordered, torch.arange(len(self.pieces) + 1) * n).tolist()
        places = (ordered % n) * self.b + order
        rows = (ordered % n) * self.k + nearest[order]
        ranges = [slice(*pair) for pair in itertools.pairwise(bounds)]
        self.targets = [
            Targets(order[some], places[some], rows[some]) if some.stop > some.start else None
            for some in ranges
        ]

    # ---- the passes

    def other_logsumexp(self) -> Float[Tensor, " b"]:
        """``ln Σ_{j≠y} exp(scale·cos θ_j)`` of each row, for the margins that need it first."""
        scale = float(self.margin.scale)
        others, shift = self._first_pass(None, scale, largest_logit=scale, masks=False)
        return (others.log() + shift).to(self.unit.dtype)

    def run(
        self, context: RowContext, share: float, sink_for: Callable[[Tensor | None], GradientSink]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b d"]]:
        """Loss of each row, and gradient of their mean by the unit embeddings; class gradients go to a sink.

        Args:
            context: what the margin says about the rows.
            share: factor of the gradients.
            sink_for: called between the passes, once it is clear that the step will be taken.
        """
        scale, keeps = float(context.scale), self.plan.keeps
        largest_logit = scale * self.margin.similarity_bound(context)
        plain = self.margin.keeps_other_cosines
        others, shift = self._first_pass(
            None if plain else context, scale, largest_logit=largest_logit, masks=keeps
        )
        check_lengths("class weight", self.workspace.lengths[: self.num_rows, 0])

        with torch.enable_grad():
            cosines = self.target_cosines.detach().requires_grad_()
            similarity = self.margin.target_similarity(cosines, context)
            (slope,) = torch.autograd.grad(similarity.sum(), cosines)
        target = similarity.detach().double() * scale - shift
        # ln(1 + others/e^target), where either may be beyond the other's precision
        losses = torch.logaddexp(others.log() - target, torch.zeros_like(target))
        row_factor = (scale * share / self.b) / (others + target.exp())
        target_factor = -(row_factor * others * slope.double()).to(self.unit.dtype)[:, None]
        row_factor = row_factor.to(self.unit.dtype)[:, None]

        # bfloat16 as int16: the product with 0 or 1 is the same, in a third of the time
        bits = torch.int16 if self.workspace.dtype == torch.bfloat16 else self.workspace.dtype
        sink = sink_for(self.classes)
        weighted = (self.unit * row_factor).to(self.workspace.dtype)
        of_targets = self.unit * target_factor
        from_others = torch.zeros_like(self.unit.t(), memory_format=torch.contiguous_format)
        for piece, targets in zip(self.pieces, self.targets, strict=True):
            if keeps:
                weight = self._normalise(piece, lengths_known=True)
            else:
                weight = self._sum_exponentials(piece, targets, masks=True)
            # what was kept goes to each class's nearest centre; the others get zero
            rest, planes = piece.exponentials.view(bits), [plane.view(bits) for plane in piece.planes]
            for i in range(self.k - 1, 0, -1):
                torch.mul(rest, piece.masks[i - 1].view(torch.uint8), out=planes[i])
                torch.sub(rest, planes[i], out=planes[0] if i == 1 else rest)
            numbers = piece.exponentials if self.k == 1 else piece.cosines
            if self.workspace.dtype == from_others.dtype:
                from_others.addmm_(piece.unit_classes.t(), numbers)
            else:
                from_others.add_(piece.unit_classes.t() @ numbers)
            gradient = piece.gradient
            torch.mm(numbers, weighted, out=piece.products)
            if piece.products.dtype != gradient.dtype:
                gradient.copy_(piece.products)
            if targets is not None:
                gradient.index_add_(0, targets.rows, of_targets[targets.batch])
            # by the unit class vectors, it becomes that by the weights
            inverse = piece.lengths.reciprocal()
            radial = torch.mul(gradient, weight, out=piece.scratch).sum(dim=1, keepdim=True)
            gradient.addcmul_(weight, radial.mul_(inverse).mul_(inverse), value=-1).mul_(inverse)
            sink(piece.start * self.k, gradient)
        return losses, from_others.t() * row_factor + self.target_centers * target_factor

    def _first_pass(
        self, context: RowContext | None, scale: float, *, largest_logit: float, masks: bool
    ) -> tuple[Float[Tensor, " b"], Tensor | float]:
        """Sum of ``exp(logit - shift)`` over the other classes, for each row, and the shift.

        Without a context the logit is ``scale × cosine``, which the product with a scaled embedding gives at
        once; with one, the margin's similarity stands between them.
        """
        self.context, self.exponent_scale = context, scale * LOG2_E
        factors = self.unit * self.exponent_scale if context is None else self.unit
        self.factors = factors.t().to(self.workspace.dtype).contiguous()
        self.shift = None
        excess = largest_logit + math.log(self.num_classes) - LARGEST_SUM
        if excess > 0:
            self.shift = torch.full_like(self.unit[:, 0], excess * LOG2_E)
        for piece, targets in zip(self.pieces, self.targets, strict=True):
            self._sum_exponentials(piece, targets, masks=masks)
        if self.shift is not None and float(self.plan.sums.double().sum(dim=0).min()) < SMALLEST_SUM:
            # each row's largest logit of a wrong class, as an exponent of 2
            highest = torch.full_like(self.unit[:, 0], -math.inf)
            for piece, targets in zip(self.pieces, self.targets, strict=True):
                self._normalise(piece)
                exponents, _ = self._exponents(piece, masks=False)
                if targets is not None:
                    exponents.view(-1).index_fill_(0, targets.places, -math.inf)
                highest = torch.maximum(highest, exponents.amax(dim=0).to(highest.dtype))
            self.shift = highest
            for piece, targets in zip(self.pieces, self.targets, strict=True):
                self._sum_exponentials(piece, targets, masks=masks)
        shift = 0.0 if self.shift is None else self.shift.double() / LOG2_E
        return self.plan.sums.double().sum(dim=0), shift

    # ---- what a piece goes through

    def _normalise(self, piece: Piece, *, lengths_known: bool = False) -> Float[Tensor, "rows d"]:
        """Bring a piece's class weights to unit length; returns the weights, a copy when sampled."""
        weight = piece.weight
        if self.classes is not None:
            weight = self.centers[self.classes[piece.start : piece.stop]].flatten(0, 1)
        if not lengths_known:
            torch.linalg.vector_norm(weight, dim=1, keepdim=True, out=piece.lengths)
        torch.mul(weight, piece.lengths.reciprocal(), out=piece.unit_classes)
        return weight

    def _exponents(self, piece: Piece, *, masks: bool) -> tuple[Float[Tensor, "c b"], Tensor | None]:
        """Logits as exponents of 2, and the slope of the similarity unless it is 1 throughout.

        They are of the nearest of the centres of each class; masks say which that was.
        """
        torch.mm(piece.unit_classes, self.factors, out=piece.cosines)
        best = piece.planes[0]
        for i, challenger in enumerate(piece.planes[1:]):
            larger = torch.maximum(best, challenger, out=piece.nearest[i % 2])
            if masks:
                # comparisons of floats are vectorised in place, but not into bytes
                piece.masks[i].copy_(challenger.gt_(best))
            best = larger
        if self.context is None:
            return best, None
        # the margins' methods have batch rows first; a transposed view costs nothing elementwise
        cosines = best.t().to(self.unit.dtype)
        similarity = self.margin.other_similarity(cosines, self.context)
        slope = self.margin.other_similarity_derivative(cosines, self.context)
        return (similarity * self.exponent_scale).t(), None if slope is None else slope.t()

    def _sum_exponentials(
        self, piece: Piece, targets: Targets | None, *, masks: bool
    ) -> Float[Tensor, "rows d"]:
        """First pass: sum up exp(logit) but the targets', and keep it, times the slope of the similarity."""
        weight = self._normalise(piece)
        exponents, slope = self._exponents(piece, masks=masks)
        if self.shift is not None:
            exponents = torch.sub(exponents, self.shift, out=piece.exponentials)
        torch.exp2(exponents, out=piece.exponentials)
        if targets is not None:
            piece.exponentials.view(-1).index_fill_(0, targets.places, 0.0)
        # a sum that is wider than what it adds is not vectorised
        piece.sums.copy_(torch.sum(piece.exponentials, dim=0, dtype=piece.lengths.dtype))
        if slope is not None:
            piece.exponentials.mul_(slope)
        return weight
