"""The arithmetic of a fused margin step: two passes over the classes, a chunk at a time.

The plain path writes matrices of [batch, classes·centres] to memory a dozen times; at 35,000 classes each
is tens of megabytes, and the processor waits for them. Here a chunk of classes is normalised, multiplied
with the embeddings, reduced and multiplied back before the next one is touched. What makes that possible:

* The softmax is taken against a fixed maximum, ``scale × bound``, which every margin can name, so that no
  pass over the logits is needed to find the largest. (A scale far above 64 may need one after all, where a
  row's every logit is far below it.)
* The gradient of a logit is ``p_ij = e_ij / S_i``, and S_i is known only after the last chunk. It is a factor
  of the row, so it moves from the [batch, classes] side to the [batch, d] side of each product.
* The right class of a row is one number a row. It is computed on its own, in the weights' precision; in the
  sweep its place is empty. ``1 - p_iy`` is then a sum over the others and not a difference of near equals.
* The gradient by the unit class vector, its projection through the normalisation and the optimiser's step
  follow one another while the chunk's weights are in cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from samething.losses.head import check_lengths
from samething.losses.margins import Margin, RowContext

LARGEST_EXPONENT: Final = 64.0
"""Logits are moved so that none exceeds this: e^64 times a million classes is far below float32's 3e38. Up to
this scale nothing need be moved at all."""

SMALLEST_SUM: Final = 1e-20
"""A row whose moved exponentials add up to less has lost some to underflow; its own maximum is found then."""

NUMBERS_A_CHUNK: Final = 800_000
"""Cosines a chunk, 3.2 MB in float32: the fastest of 0.1 to 3.2 million on an AMD EPYC with 1 MB of L2 a core
(k = 3: 118, 94, 88, 85, 94, 99 ms a step), because smaller chunks mean more calls."""

LOG2_E: Final = math.log2(math.e)
"""exp2 takes a third of the time of exp, and its base costs nothing: it joins the scale."""

GradientSink: TypeAlias = Callable[[int, Tensor], None]
"""Takes the gradient of some consecutive class weights: number of the first row, gradient [rows, d]."""


class Workspace:
    """Buffers that all steps share: fresh memory costs more than filling it.

    ``kept [classes, b]`` and ``was_nearer [k - 1, classes, b]``, a byte each, pass from the first pass to the
    second: 4 + k - 1 bytes for each class and row in float32. Everything else is a chunk's worth.

    Args:
        weight: the class weights.
        num_centers: k.
        dtype: of the matrix products.
        limit_bytes: the most that these two may take; beyond it, they too are a chunk's worth.
    """

    def __init__(
        self, weight: Float[Tensor, "rows d"], num_centers: int, dtype: torch.dtype, limit_bytes: int
    ) -> None:
        self.weight = weight.detach()
        self.num_centers = num_centers
        self.dtype = dtype
        self.limit_bytes = limit_bytes
        self.batch_capacity = 0

    def make_room(self, batch: int) -> None:
        """Allocate for this batch size, unless there is room already."""
        if batch <= self.batch_capacity:
            return
        num_rows, d = self.weight.shape
        num_classes, k = num_rows // self.num_centers, self.num_centers
        n = min(num_classes, max(64, NUMBERS_A_CHUNK // (k * batch) // 64 * 64))
        numbers = num_classes * batch
        self.keeps_all = numbers * (self.dtype.itemsize + k - 1) <= self.limit_bytes
        numbers = numbers if self.keeps_all else n * batch
        self.kept = torch.empty(numbers, dtype=self.dtype)
        self.was_nearer = torch.empty((k - 1) * numbers, dtype=torch.bool)
        self.planes = torch.empty(n * k * batch if k > 1 else 0, dtype=self.dtype)
        self.sums = torch.empty(math.ceil(num_classes / n), batch, dtype=self.weight.dtype)
        self.unit_classes = torch.empty(n * k, d, dtype=self.dtype)
        self.products = torch.empty(n * k, d, dtype=self.dtype)
        self.scratch = torch.empty(n * k, d, dtype=self.weight.dtype)
        self.gradient = torch.empty(n * k, d, dtype=self.weight.dtype)
        self.lengths = torch.empty(num_rows, 1, dtype=self.weight.dtype)
        self.classes_per_chunk = n
        self.batch_capacity = batch


@dataclass(frozen=True)
class Chunk:
    """Some consecutive classes, and the targets among them."""

    number: int
    start: int
    """First class."""
    stop: int
    """One past the last class."""
    target_batch: Int[Tensor, " t"]
    """Batch rows whose own class is here."""
    target_places: Int[Tensor, " t"]
    """Where (class, batch row) is in a flat [classes, b] matrix of this chunk."""
    target_rows: Int[Tensor, " t"]
    """Row of the nearest centre of that class among the chunk's class weights."""


class ClassSweep:
    """One step: a first pass for the sums of exponentials, a second for the gradients.

    Within a chunk, a matrix has a row a class and a column a row of the batch, and the first centres of all
    classes come before the second ones (*planes*), so that the maximum over centres is one of whole planes.

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
        self.k = workspace.num_centers
        self.weight = workspace.weight
        self.centers = self.weight.view(-1, self.k, self.weight.shape[1])
        self.num_classes = len(self.centers) if classes is None else len(classes)
        self.num_rows = self.num_classes * self.k
        self.b = len(unit)
        workspace.make_room(self.b)
        self._find_targets(labels)

    def _find_targets(self, labels: Tensor) -> None:
        centers = self.centers[labels]
        centers = centers / centers.norm(dim=2, keepdim=True)
        cosines, nearest = (centers @ self.unit[:, :, None])[:, :, 0].max(dim=1)
        self.target_cosines = cosines
        self.target_centers = centers[torch.arange(self.b), nearest]
        columns = labels if self.classes is None else torch.searchsorted(self.classes, labels)
        n = self.workspace.classes_per_chunk
        num_chunks = math.ceil(self.num_classes / n)
        ordered, order = columns.sort()
        bounds = torch.searchsorted(ordered, torch.arange(num_chunks + 1) * n).tolist()
        places = (ordered % n) * self.b + order
        rows = (ordered % n) * self.k + nearest[order]
        self.chunks = [
            Chunk(
                number=i,
                start=i * n,
                stop=min(i * n + n, self.num_classes),
                target_batch=order[bounds[i] : bounds[i + 1]],
                target_places=places[bounds[i] : bounds[i + 1]],
                target_rows=rows[bounds[i] : bounds[i + 1]],
            )
            for i in range(num_chunks)
        ]

    # ---- the passes

    def other_logsumexp(self) -> Float[Tensor, " b"]:
        """``ln Σ_{j≠y} exp(a·cos θ_j)`` of each row, for the margins that need it first."""
        scale = self.margin.other_logsumexp_scale()
        self._factors, self._shift = self._columns(self.unit * (scale * LOG2_E)), None
        if scale > LARGEST_EXPONENT:
            self._shift = torch.full_like(self.unit[:, 0], (scale - LARGEST_EXPONENT) * LOG2_E)
        for chunk in self.chunks:
            self._add_up(chunk, self._exp2(self._nearest(chunk)))
        logarithm = self._total().log()
        if self._shift is not None:
            logarithm += self._shift.double() / LOG2_E
        return logarithm.to(self.unit.dtype)

    def run(
        self, context: RowContext, share: float, sink_for: Callable[[Tensor | None], GradientSink]
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, "b d"]]:
        """Loss of each row, and gradient of their mean by the unit embeddings; class gradients go to a sink.

        Args:
            context: what the margin says about the rows.
            share: factor of the gradients.
            sink_for: called between the passes, once it is clear that the step will be taken.
        """
        scale = float(context.scale)
        self._context = context
        # without a function between cosine and logit, the product with the scaled embedding is the logit
        self._factor_of_similarity = 1.0 if self.margin.keeps_other_cosines else scale * LOG2_E
        factors = self.unit * (scale * LOG2_E) if self.margin.keeps_other_cosines else self.unit
        self._factors, self._shift = self._columns(factors), None
        highest = scale * self.margin.similarity_bound(context)
        if highest > LARGEST_EXPONENT:
            self._shift = torch.full_like(self.unit[:, 0], (highest - LARGEST_EXPONENT) * LOG2_E)
        for chunk in self.chunks:
            self._forward(chunk)
        check_lengths("class weight", self.workspace.lengths[: self.num_rows, 0])
        if self._shift is not None and float(self._total().min()) < SMALLEST_SUM:
            self._shift = self._highest_exponents() - LARGEST_EXPONENT * LOG2_E
            for chunk in self.chunks:
                self._forward(chunk)

        others = self._total()
        similarity, slope = self._target_similarity(context)
        target = similarity.double() * scale
        if self._shift is not None:
            target -= self._shift.double() / LOG2_E
        # ln(1 + others/e^target), where either may be beyond the other's precision
        losses = torch.logaddexp(others.log() - target, torch.zeros_like(target))
        row_factor = (scale * share / self.b) / (others + target.exp())
        target_factor = -(row_factor * others * slope.double()).to(self.unit.dtype)[:, None]
        row_factor = row_factor.to(self.unit.dtype)[:, None]

        sink = sink_for(self.classes)
        weighted = (self.unit * row_factor).to(self.workspace.dtype)
        of_targets = self.unit * target_factor
        from_others = torch.zeros_like(self.unit)
        for chunk in self.chunks:
            if not self.workspace.keeps_all:
                self._forward(chunk)
            sink(chunk.start * self.k, self._backward(chunk, weighted, of_targets, from_others))
        return losses, from_others * row_factor + self.target_centers * target_factor

    def _target_similarity(self, context: RowContext) -> tuple[Tensor, Tensor]:
        """Similarity of each row with its own class, and its derivative by the cosine."""
        with torch.enable_grad():
            cosines = self.target_cosines.detach().requires_grad_()
            similarity = self.margin.target_similarity(cosines, context)
            (slope,) = torch.autograd.grad(similarity.sum(), cosines)
        return similarity.detach(), slope

    def _highest_exponents(self) -> Float[Tensor, " b"]:
        """Each row's largest logit of a wrong class, as an exponent of 2; a pass over the classes."""
        highest = torch.full_like(self.unit[:, 0], -math.inf)
        for chunk in self.chunks:
            exponents, _ = self._exponents(self._nearest(chunk))
            exponents.view(-1).index_fill_(0, chunk.target_places, -math.inf)
            highest = torch.maximum(highest, exponents.amax(dim=0).to(highest.dtype))
        return highest

    # ---- what a chunk goes through

    def _columns(self, rows: Float[Tensor, "b d"]) -> Float[Tensor, "d b"]:
        return rows.t().to(self.workspace.dtype).contiguous()

    def _weights(self, chunk: Chunk) -> Float[Tensor, "c k d"]:
        """A chunk's class weights: a view, or a gathered copy when classes are sampled."""
        if self.classes is None:
            return self.centers[chunk.start : chunk.stop]
        return self.centers[self.classes[chunk.start : chunk.stop]]

    def _lengths(self, chunk: Chunk) -> Float[Tensor, "c k 1"]:
        return self.workspace.lengths[chunk.start * self.k : chunk.stop * self.k].view(-1, self.k, 1)

    def _kept(self, chunk: Chunk) -> Float[Tensor, "c b"]:
        start = chunk.start * self.b if self.workspace.keeps_all else 0
        classes = chunk.stop - chunk.start
        return self.workspace.kept[start : start + classes * self.b].view(classes, self.b)

    def _was_nearer(self, chunk: Chunk) -> Bool[Tensor, "others c b"]:
        start = chunk.start * self.b * (self.k - 1) if self.workspace.keeps_all else 0
        classes = chunk.stop - chunk.start
        stop = start + classes * self.b * (self.k - 1)
        return self.workspace.was_nearer[start:stop].view(self.k - 1, classes, self.b)

    def _planes(self, chunk: Chunk) -> Float[Tensor, "k c b"]:
        classes = chunk.stop - chunk.start
        if self.k == 1:
            return self._kept(chunk)[None]
        return self.workspace.planes[: self.k * classes * self.b].view(self.k, classes, self.b)

    def _unit_classes(self, chunk: Chunk) -> Float[Tensor, "k c d"]:
        """A chunk's class weights at unit length, in planes; their lengths must be in the workspace."""
        weight, inverse = self._weights(chunk), self._lengths(chunk).reciprocal()
        rows = self.k * len(weight)
        unit = self.workspace.unit_classes[:rows].view(self.k, len(weight), -1)
        if unit.dtype == weight.dtype:
            return torch.mul(weight.transpose(0, 1), inverse.transpose(0, 1), out=unit)
        scratch = self.workspace.scratch[:rows].view(unit.shape)
        return unit.copy_(torch.mul(weight.transpose(0, 1), inverse.transpose(0, 1), out=scratch))

    def _nearest(self, chunk: Chunk) -> Float[Tensor, "c b"]:
        """``unit classes @ factors``, the largest over the centres of each class; notes which it was."""
        torch.linalg.vector_norm(self._weights(chunk), dim=2, keepdim=True, out=self._lengths(chunk))
        planes = self._planes(chunk)
        unit_classes = self._unit_classes(chunk)
        torch.mm(unit_classes.view(-1, unit_classes.shape[2]), self._factors, out=planes.view(-1, self.b))
        nearest, was_nearer = planes[0], self._was_nearer(chunk)
        spare = self._kept(chunk)
        for centre in range(1, self.k):
            # 1 where this centre is nearer than all before it; comparing in place stays in float, which is
            # several times faster than comparing into booleans
            torch.maximum(nearest, planes[centre], out=spare)
            was_nearer[centre - 1].copy_(planes[centre].gt_(nearest))
            nearest, spare = spare, nearest
        return nearest

    def _exponents(self, nearest: Float[Tensor, "c b"]) -> tuple[Float[Tensor, "c b"], Tensor | None]:
        """Logits as exponents of 2, and the slope of the similarity unless it is 1."""
        if self.margin.keeps_other_cosines:
            return nearest, None
        # the margins' methods have batch rows first; a transposed view costs nothing elementwise
        cosines = nearest.t().to(self.unit.dtype)
        similarity = self.margin.other_similarity(cosines, self._context)
        slope = self.margin.other_similarity_derivative(cosines, self._context)
        return (similarity * self._factor_of_similarity).t(), None if slope is None else slope.t()

    def _exp2(
        self, exponents: Float[Tensor, "c b"], out: Float[Tensor, "c b"] | None = None
    ) -> Float[Tensor, "c b"]:
        if self._shift is not None:
            exponents = exponents.sub_(self._shift)
        return torch.exp2(exponents, out=out)

    def _forward(self, chunk: Chunk) -> None:
        """Sums of exponentials; and in ``kept``, exponentials × slope, zero at the targets."""
        kept = self._kept(chunk)
        exponents, slope = self._exponents(self._nearest(chunk))
        if exponents.dtype == kept.dtype:
            exponentials = self._exp2(exponents, out=kept)
        else:
            exponentials = self._exp2(exponents)
        self._add_up(chunk, exponentials)
        if slope is not None:
            exponentials.mul_(slope)
        if exponentials is not kept:
            kept.copy_(exponentials)

    def _add_up(self, chunk: Chunk, exponentials: Float[Tensor, "c b"]) -> None:
        """Empty the targets' places, and keep the sum over the chunk."""
        if len(chunk.target_places):
            exponentials.view(-1).index_fill_(0, chunk.target_places, 0.0)
        sums = self.workspace.sums[chunk.number, : self.b]
        torch.sum(exponentials, dim=0, dtype=sums.dtype, out=sums)

    def _total(self) -> Float[Tensor, " b"]:
        return self.workspace.sums[: len(self.chunks), : self.b].double().sum(dim=0)

    def _give_to_nearest(self, chunk: Chunk) -> Float[Tensor, "rows b"]:
        """Each class's number goes to its nearest centre, the first among equals; the others get zero."""
        planes, left, was_nearer = self._planes(chunk), self._kept(chunk), self._was_nearer(chunk)
        for centre in range(self.k - 1, 0, -1):
            plane = planes[centre].copy_(was_nearer[centre - 1].view(torch.uint8)).mul_(left)
            torch.sub(left, plane, out=planes[0] if centre == 1 else left)
        return planes.view(-1, self.b)

    def _backward(
        self,
        chunk: Chunk,
        weighted: Float[Tensor, "b d"],
        of_targets: Float[Tensor, "b d"],
        from_others: Float[Tensor, "b d"],
    ) -> Float[Tensor, "rows d"]:
        """Gradient by a chunk's class weights, through their normalisation; adds to ``from_others``."""
        flat, unit = self._give_to_nearest(chunk), self._unit_classes(chunk)
        rows, k, d = len(flat), self.k, unit.shape[2]
        unit_rows = unit.view(rows, d)
        if self.workspace.dtype == from_others.dtype:
            from_others.addmm_(flat.t(), unit_rows)
        else:
            from_others.add_(flat.t() @ unit_rows)
        products = torch.mm(flat, weighted, out=self.workspace.products[:rows])
        # from planes back to the order of the weights, where the targets' share joins
        gradient = self.workspace.gradient[:rows].view(-1, k, d)
        weight, inverse = self._weights(chunk), self._lengths(chunk).reciprocal()
        torch.mul(products.view(k, -1, d).transpose(0, 1), inverse, out=gradient)
        flat_gradient = gradient.view(rows, d)
        if len(chunk.target_rows):
            share = of_targets[chunk.target_batch] * inverse.view(rows, 1)[chunk.target_rows]
            flat_gradient.index_add_(0, chunk.target_rows, share)
        scratch = self.workspace.scratch[:rows].view(-1, k, d)
        radial = torch.mul(gradient, weight, out=scratch).sum(dim=2, keepdim=True).mul_(inverse).mul_(inverse)
        gradient.addcmul_(weight, radial, value=-1)
        return flat_gradient
