"""The arithmetic of a fused margin step: two passes over the classes, a chunk at a time.

The plain path writes matrices of [batch, classes·centres] to memory a dozen times; at 35,000 classes each
is tens of megabytes, and the processor waits for them. Here a chunk of classes is normalised, multiplied
with the embeddings, reduced and multiplied back before the next one is touched. What makes that possible:

* The softmax is taken against a fixed maximum, ``scale × bound``, which every margin can name, so that no
  pass over the logits is needed to find the largest.
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
from jaxtyping import Float, Int
from torch import Tensor

from samething.losses.head import check_lengths
from samething.losses.margins import Margin, RowContext

LARGEST_EXPONENT: Final = 50.0
"""Logits are moved so that none exceeds this: e^50 times a million classes is far below float32's 3e38, and
e^-87, still a float32, is reached by a cosine of -1 up to a scale of 68. Smaller ones count as zero."""

NUMBERS_A_CHUNK: Final = 400_000
"""Cosines a chunk, 1.6 MB in float32; the fastest size on AMD Zen 4 (1 MB of L2 a core), flat around it."""

GradientSink: TypeAlias = Callable[[int, Tensor], None]
"""Takes the gradient of some consecutive class weights: number of the first row, gradient [rows, d]."""


class Workspace:
    """Buffers that all steps share: fresh memory costs more than filling it.

    Args:
        weight: the class weights.
        num_centers: k.
        dtype: of the matrix products.
        limit_bytes: the most that ``planes`` may take; beyond it, it is a chunk's worth.
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
        numbers = num_rows * batch
        self.keeps_planes = numbers * self.dtype.itemsize <= self.limit_bytes
        self.planes = torch.empty(numbers if self.keeps_planes else n * k * batch, dtype=self.dtype)
        self.nearest = torch.empty(n * batch, dtype=self.dtype)
        self.exponentials = torch.empty(n * batch, dtype=self.dtype)
        self.sums = torch.empty(math.ceil(num_classes / n), batch, dtype=self.weight.dtype)
        self.unit_classes = torch.empty(n * k, d, dtype=self.dtype)
        self.products = torch.empty(n * k, d, dtype=self.dtype)
        self.scratch = torch.empty(n * k, d, dtype=self.weight.dtype)
        self.gradient = self.products if self.dtype == self.weight.dtype else torch.empty_like(self.scratch)
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
    """Row of the nearest centre of that class among the chunk's."""


class ClassSweep:
    """One step. ``planes [classes, k, b]`` are a chunk's cosines at first, and its probabilities in the end.

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
        shift = max(0.0, scale - LARGEST_EXPONENT)
        factors = (self.unit * scale).t().to(self.workspace.dtype).contiguous()
        for chunk in self.chunks:
            nearest = self._nearest_cosines(chunk, self._unit_classes(chunk), factors)
            exponentials = torch.exp(nearest - shift)
            self._add_up(chunk, exponentials)
        return (self._total().log() + shift).to(self.unit.dtype)

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
        self.scale = scale
        self.context = context
        self.shift = max(0.0, scale * self.margin.similarity_bound(context) - LARGEST_EXPONENT)
        factors = self.unit * scale if self.margin.keeps_other_cosines else self.unit
        self.factors = factors.t().to(self.workspace.dtype).contiguous()
        keeps = self.workspace.keeps_planes
        from_others = torch.zeros_like(self.unit)
        for chunk in self.chunks:
            self._forward(chunk, from_others if keeps else None)
        check_lengths("class weight", self.workspace.lengths[: self.num_rows, 0])

        others = self._total()
        similarity, slope = self._target_similarity(context)
        target = similarity.double() * scale - self.shift
        total = others + target.exp()
        losses = torch.log1p(others * torch.exp(-target))
        row_factor = (scale * share / self.b) / total
        target_factor = -(row_factor * others * slope.double()).to(self.unit.dtype)[:, None]
        row_factor = row_factor.to(self.unit.dtype)[:, None]

        sink = sink_for(self.classes)
        weighted = (self.unit * row_factor).to(self.workspace.dtype)
        of_targets = self.unit * target_factor
        for chunk in self.chunks:
            if not keeps:
                self._forward(chunk, from_others)
            sink(chunk.start * self.k, self._class_gradient(chunk, weighted, of_targets))
        return losses, from_others * row_factor + self.target_centers * target_factor

    def _target_similarity(self, context: RowContext) -> tuple[Tensor, Tensor]:
        """Similarity of each row with its own class, and its derivative by the cosine."""
        with torch.enable_grad():
            cosines = self.target_cosines.detach().requires_grad_()
            similarity = self.margin.target_similarity(cosines, context)
            (slope,) = torch.autograd.grad(similarity.sum(), cosines)
        return similarity.detach(), slope

    # ---- what a chunk goes through

    def _weights(self, chunk: Chunk) -> Float[Tensor, "rows d"]:
        """A chunk's class weights: a view, or a gathered copy when classes are sampled."""
        if self.classes is None:
            return self.weight[chunk.start * self.k : chunk.stop * self.k]
        return self.centers[self.classes[chunk.start : chunk.stop]].flatten(0, 1)

    def _planes(self, chunk: Chunk) -> Float[Tensor, "c k b"]:
        start = chunk.start * self.k * self.b if self.workspace.keeps_planes else 0
        classes = chunk.stop - chunk.start
        return self.workspace.planes[start : start + classes * self.k * self.b].view(classes, self.k, self.b)

    def _room(self, buffer: Tensor, chunk: Chunk) -> Float[Tensor, "c b"]:
        classes = chunk.stop - chunk.start
        return buffer[: classes * self.b].view(classes, self.b)

    def _unit_classes(self, chunk: Chunk) -> Float[Tensor, "rows d"]:
        """A chunk's class weights at unit length; the lengths stay in the workspace."""
        weight = self._weights(chunk)
        lengths = self.workspace.lengths[chunk.start * self.k : chunk.stop * self.k]
        torch.linalg.vector_norm(weight, dim=1, keepdim=True, out=lengths)
        return torch.mul(weight, lengths.reciprocal(), out=self.workspace.unit_classes[: len(weight)])

    def _nearest_cosines(self, chunk: Chunk, unit_classes: Tensor, factors: Tensor) -> Float[Tensor, "c b"]:
        """Fill the planes with ``unit_classes @ factors``; the largest over the centres of each class."""
        planes = self._planes(chunk)
        torch.mm(unit_classes, factors, out=planes.view(-1, self.b))
        if self.k == 1:
            return planes[:, 0]
        nearest = self._room(self.workspace.nearest, chunk)
        torch.maximum(planes[:, 0], planes[:, 1], out=nearest)
        for centre in range(2, self.k):
            torch.maximum(nearest, planes[:, centre], out=nearest)
        return nearest

    def _forward(self, chunk: Chunk, from_others: Tensor | None) -> None:
        """Sums of exponentials; with ``from_others`` also probabilities × row total, and their products."""
        unit_classes = self._unit_classes(chunk)
        nearest = self._nearest_cosines(chunk, unit_classes, self.factors)
        planes = self._planes(chunk)
        slope = None
        if self.margin.keeps_other_cosines:
            exponentials = planes[:, 0] if self.k == 1 else self._room(self.workspace.exponentials, chunk)
            if self.shift:
                torch.exp(torch.sub(nearest, self.shift, out=exponentials), out=exponentials)
            else:
                torch.exp(nearest, out=exponentials)
        else:
            # the margins' methods have batch rows first; a transposed view costs nothing elementwise
            cosines = nearest.t().to(self.unit.dtype)
            similarity = self.margin.other_similarity(cosines, self.context)
            exponentials = (similarity * self.scale).sub_(self.shift).exp_().t()
            exponentials = exponentials.to(self.workspace.dtype).contiguous()
            slope = self.margin.other_similarity_derivative(cosines, self.context)
        self._add_up(chunk, exponentials)
        if from_others is None:
            return
        if slope is not None:
            exponentials.mul_(slope.t())
        self._give_to_nearest(planes, nearest, exponentials)
        flat = planes.view(-1, self.b)
        if self.workspace.dtype == from_others.dtype:
            from_others.addmm_(flat.t(), unit_classes)
        else:
            from_others.add_(flat.t() @ unit_classes)

    def _give_to_nearest(self, planes: Tensor, nearest: Tensor, exponentials: Tensor) -> None:
        """Each class's number goes to its nearest centre, the first among equals; the others get zero."""
        last = self.k - 1
        for centre in range(last):
            plane = planes[:, centre]
            plane.eq_(nearest).mul_(exponentials)
            torch.sub(exponentials, plane, out=planes[:, last] if centre == last - 1 else exponentials)
        if self.k == 1 and exponentials.data_ptr() != planes.data_ptr():
            planes[:, 0].copy_(exponentials)

    def _add_up(self, chunk: Chunk, exponentials: Float[Tensor, "c b"]) -> None:
        """Empty the targets' places, and keep the sum over the chunk."""
        if len(chunk.target_places):
            # a view in the order of the buffer, whose rows are classes
            exponentials.view(-1).index_fill_(0, chunk.target_places, 0.0)
        sums = self.workspace.sums[chunk.number, : self.b]
        torch.sum(exponentials, dim=0, dtype=sums.dtype, out=sums)

    def _total(self) -> Float[Tensor, " b"]:
        return self.workspace.sums[: len(self.chunks), : self.b].double().sum(dim=0)

    def _class_gradient(
        self, chunk: Chunk, weighted: Float[Tensor, "b d"], of_targets: Float[Tensor, "b d"]
    ) -> Float[Tensor, "rows d"]:
        """Gradient by a chunk's class weights, through their normalisation."""
        weight, flat = self._weights(chunk), self._planes(chunk).view(-1, self.b)
        gradient = self.workspace.gradient[: len(flat)]
        products = torch.mm(flat, weighted, out=self.workspace.products[: len(flat)])
        if products.dtype != gradient.dtype:
            gradient.copy_(products)
        if len(chunk.target_rows):
            gradient.index_add_(0, chunk.target_rows, of_targets[chunk.target_batch])
        inverse = self.workspace.lengths[chunk.start * self.k : chunk.stop * self.k].reciprocal()
        radial = torch.mul(gradient, weight, out=self.workspace.scratch[: len(flat)]).sum(dim=1, keepdim=True)
        return gradient.addcmul_(weight, radial * inverse * inverse, value=-1).mul_(inverse)
