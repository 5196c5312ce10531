"""Margins: the part of a loss that is not the class weights.

A margin sees a batch in two steps. First :meth:`Margin.prepare` gets one number or two per row (the cosine
with the right class, the embedding's length), moves whatever the margin remembers, and returns a
:class:`RowContext`. Then the margin is *elementwise*: a row's similarity with each class depends on that one
cosine and the row's context alone. So the classes may be visited in any order and in pieces, and
:class:`~samething.losses.fused_step.FusedMarginStep` runs every margin in chunks that stay in cache.

All a margin remembers is in buffers. With ``torch.distributed`` running, batch statistics are those of the
global batch, so every process holds the same numbers.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from samething.arrays import Float, Int
from samething.errors import InputError
from samething.losses.class_margins import cosine_margins, inverse_root_margins
from samething.losses.processes import gather_rows
from samething.losses.similarities import (
    ADAFACE_EPSILON,
    adacos_dynamic_scale,
    adacos_fixed_scale,
    adaface_qualities,
    adaface_target,
    arcface_target,
    curricularface_threshold,
    is_hard,
    li_arcface_similarity,
    put_targets,
    reciprocal_sines,
)


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """What a margin is told about a batch: one number or two per row; no gradient inside."""

    target_cosines: Float[Tensor, " b"]
    """Cosine of each embedding with its own class (the nearest of its sub-centres)."""
    norms: Float[Tensor, " b"]
    """Length of each embedding before normalisation, > 0."""
    labels: Int[Tensor, " b"]
    """Class numbers, 0 … C - 1."""
    other_logsumexp: Float[Tensor, " b"] | None = None
    """``ln Σ_{j≠y} exp(scale·cos θ_j)``, for margins with ``needs_other_logsumexp``. Pieces over chunks of
    classes add up with ``torch.logaddexp``."""


@dataclass(frozen=True, kw_only=True)
class RowContext:
    """What a margin knows about a batch's rows before it looks at the other classes; no gradient inside."""

    scale: Float[Tensor, ""]
    """s, without unit."""
    margins: Float[Tensor, " b"]
    """m of each row: radians, or a difference of cosines for CosFace; 0 without a margin."""
    qualities: Float[Tensor, " b"] | None = None
    """AdaFace: q in [-1, 1]."""
    hard_above: Float[Tensor, " b"] | None = None
    """CurricularFace: the cosine above which a wrong class is hard."""
    hardness: Float[Tensor, ""] | None = None
    """CurricularFace: t, in [-1, 1]."""


class Margin(nn.Module, abc.ABC):
    """A margin-softmax loss without its class weights; ``logits = scale × similarity``.

    Args:
        scale: s > 0, without unit.
        margin: m of every row, in the unit of the loss; 0 where there is none or each row has its own.
    """

    needs_other_logsumexp: bool = False
    """Whether :meth:`prepare` wants a statistic over all wrong classes, ``other_logsumexp``."""

    keeps_other_cosines: bool = True
    """Whether :meth:`other_similarity` is the cosine itself, so that nothing needs computing."""

    def __init__(self, *, scale: float, margin: float = 0.0) -> None:
        super().__init__()
        self.margin = margin
        require(scale > 0 and math.isfinite(scale), "scale", scale, "a positive number")
        # float64, so that a scale of √2·ln(C - 1) is exact under float64 weights; a number without
        # dimensions does not promote the float32 matrix that it multiplies
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))

    scale: Tensor

    def prepare(self, batch: BatchRows) -> RowContext:
        """Take notice of a batch: in training mode move the state, then say what holds for each row.

        Here: nothing moves, and every row has the same margin.
        """
        margins = torch.full_like(batch.target_cosines, self.margin)
        return RowContext(scale=self.scale.clone(), margins=margins)

    @abc.abstractmethod
    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """Similarity of each row with its own class."""

    def other_similarity(self, cosines: Float[Tensor, "b c"], context: RowContext) -> Float[Tensor, "b c"]:
        """Similarity with wrong classes, elementwise; the cosine itself unless a margin says otherwise."""
        del context
        return cosines

    def other_similarity_derivative(
        self, cosines: Float[Tensor, "b c"], context: RowContext
    ) -> Float[Tensor, "b c"] | None:
        """Derivative of :meth:`other_similarity` by its cosine, elementwise; None: it is 1 throughout."""
        del cosines, context
        return None

    def similarity_bound(self, context: RowContext) -> float:
        """A number that no similarity exceeds: ``scale × bound`` serves as the softmax's fixed maximum."""
        del context
        return 1.0

    def logits(
        self,
        cosines: Float[Tensor, "b c"],
        columns: Int[Tensor, " b"],
        *,
        norms: Float[Tensor, " b"],
        labels: Int[Tensor, " b"],
    ) -> Float[Tensor, "b c"]:
        """Prepare and apply in one call, differentiably, for the whole matrix.

        Args:
            cosines: of each embedding with each class, or with a sample of the classes.
            columns: where each row's own class stands among them.
            norms: length of each embedding before normalisation.
            labels: each row's class number; equals ``columns`` when all classes are there.
        """
        targets = cosines.gather(1, columns[:, None])[:, 0]
        statistic = None
        if self.needs_other_logsumexp and self.training:
            infinite = torch.full_like(targets, -math.inf)
            others = put_targets(cosines.detach() * self.scale, columns, infinite)
            statistic = torch.logsumexp(others, dim=1)
        with torch.no_grad():
            batch = BatchRows(
                target_cosines=targets.detach(),
                norms=norms.detach(),
                labels=labels,
                other_logsumexp=statistic,
            )
            context = self.prepare(batch)
        others = self.other_similarity(cosines, context)
        return context.scale * put_targets(others, columns, self.target_similarity(targets, context))


class NormFace(Margin):
    """Cosine softmax without a margin (arXiv 1704.06369).

    Args:
        scale: s > 0.
    """

    def __init__(self, *, scale: float = 30.0) -> None:
        super().__init__(scale=scale)

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """The cosine."""
        return cosines


class CosFace(Margin):
    """Margin on the cosine (arXiv 1801.09414).

    Args:
        scale: s > 0.
        margin: m in [0, 1], a difference of cosines.
    """

    def __init__(self, *, scale: float = 30.0, margin: float = 0.35) -> None:
        require(0 <= margin <= 1, "margin", margin, "a difference of cosines in [0, 1]")
        super().__init__(scale=scale, margin=margin)

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """``cos θ - m``."""
        return cosines - context.margins


class ArcFace(Margin):
    """Margin on the angle (arXiv 1801.07698).

    With ``num_centers > 1`` on the class weights this is Sub-Center ArcFace (Deng et al., ECCV 2020).

    Args:
        scale: s > 0.
        margin_radians: m in [0, π/2].
    """

    def __init__(self, *, scale: float = 30.0, margin_radians: float = 0.5) -> None:
        _check_angle("margin_radians", margin_radians)
        super().__init__(scale=scale, margin=margin_radians)

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """``cos(θ + m)``, straight beyond π - m."""
        return arcface_target(cosines, context.margins)


class DynamicArcFace(Margin):
    """ArcFace with wider margins for rarer classes (arXiv 2409.13513), with any number of sub-centres.

    Args:
        class_counts: training images of each class, in the order of the labels.
        scale: s > 0.
        margin_min_radians: margin of the largest class, in [0, π/2].
        margin_max_radians: margin of the rarest class, at least the other.
        schedule: ``cosine`` (the paper's) or ``inverse_root`` (∝ n^-1/4); see
            :mod:`samething.losses.class_margins`.
    """

    class_margins: Tensor

    def __init__(
        self,
        *,
        class_counts: Sequence[int],
        scale: float = 30.0,
        margin_min_radians: float = 0.2,
        margin_max_radians: float = 0.5,
        schedule: Literal["cosine", "inverse_root"] = "cosine",
    ) -> None:
        super().__init__(scale=scale)
        _check_angle("margin_min_radians", margin_min_radians)
        _check_angle("margin_max_radians", margin_max_radians)
        wide_enough = margin_max_radians >= margin_min_radians
        require(wide_enough, "margin_max_radians", margin_max_radians, f"at least {margin_min_radians}")
        schedules = {"cosine": cosine_margins, "inverse_root": inverse_root_margins}
        require(schedule in schedules, "schedule", schedule, " or ".join(schedules))
        margins = schedules[schedule](
            class_counts, margin_min_radians=margin_min_radians, margin_max_radians=margin_max_radians
        )
        self.register_buffer("class_margins", torch.from_numpy(margins))

    def prepare(self, batch: BatchRows) -> RowContext:
        """Each row gets its class's margin."""
        margins = self.class_margins[batch.labels].to(batch.target_cosines.dtype)
        return RowContext(scale=self.scale.clone(), margins=margins)

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """``cos(θ + m_y)``, straight beyond π - m_y."""
        return arcface_target(cosines, context.margins)


class LiArcFace(Margin):
    """Linear in the angle (arXiv 1907.12256).

    Args:
        scale: s > 0.
        margin_radians: m in [0, π/2].
    """

    keeps_other_cosines = False

    def __init__(self, *, scale: float = 64.0, margin_radians: float = 0.45) -> None:
        _check_angle("margin_radians", margin_radians)
        super().__init__(scale=scale, margin=margin_radians)

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """``1 - 2(θ + m)/π``."""
        return li_arcface_similarity(cosines, context.margins)

    def other_similarity(self, cosines: Float[Tensor, "b c"], context: RowContext) -> Float[Tensor, "b c"]:
        """``1 - 2θ/π``."""
        return li_arcface_similarity(cosines)

    def other_similarity_derivative(
        self, cosines: Float[Tensor, "b c"], context: RowContext
    ) -> Float[Tensor, "b c"]:
        """``2/(π·sin θ)``, and 0 at cosine ±1."""
        return reciprocal_sines(cosines).mul_(2 / math.pi)


class AdaCos(Margin):
    """Cosine softmax that finds its own scale (arXiv 1905.00292).

    Fixed: ``s = √2·ln(C - 1)``, for ever. Dynamic: that is the start; each training step moves the scale
    *before* it is used, from the targets' median angle and the mean over rows of ``Σ_{j≠y} exp(s·cos θ_j)``
    under the old scale; see :func:`~samething.losses.similarities.adacos_dynamic_scale`. Should a batch
    propose a scale that is not positive (few classes, all far away), the old one stays.

    Args:
        num_classes: C, at least 3 (with two classes the formula's scale is 0).
        dynamic: whether the scale follows the batches.
    """

    def __init__(self, *, num_classes: int, dynamic: bool = False) -> None:
        require(num_classes >= 3, "num_classes", num_classes, "at least 3 classes for AdaCos")
        super().__init__(scale=adacos_fixed_scale(num_classes))
        self.dynamic = dynamic
        self.needs_other_logsumexp = dynamic

    def prepare(self, batch: BatchRows) -> RowContext:
        """Move the scale if it is dynamic; there is no margin."""
        if self.dynamic and self.training:
            if batch.other_logsumexp is None:
                raise InputError(
                    "dynamic AdaCos without other_logsumexp",
                    expected="ln Σ exp(scale × cosine) over the wrong classes of each row",
                    next_step="pass it, or use MarginHead, which does",
                )
            proposed = adacos_dynamic_scale(
                gather_rows(batch.target_cosines), gather_rows(batch.other_logsumexp)
            )
            self.scale.copy_(torch.where(proposed > 0, proposed, self.scale.to(proposed.dtype)))
        return super().prepare(batch)

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """The cosine."""
        return cosines


class CurricularFace(Margin):
    """Hard negatives weigh more as training goes on (arXiv 2004.00288).

    ``t`` starts at 0; each training step first sets ``t ← momentum·mean(cos θ_y) + (1 - momentum)·t``.

    Args:
        scale: s > 0.
        margin_radians: m in [0, π/2].
        momentum: weight of the newest batch, in (0, 1]; 0.01 in the authors' code.
    """

    keeps_other_cosines = False
    t: Tensor

    def __init__(self, *, scale: float = 30.0, margin_radians: float = 0.5, momentum: float = 0.01) -> None:
        _check_angle("margin_radians", margin_radians)
        require(0 < momentum <= 1, "momentum", momentum, "a number in (0, 1]")
        super().__init__(scale=scale, margin=margin_radians)
        self.momentum = momentum
        self.register_buffer("t", torch.tensor(0.0, dtype=torch.float64))

    def prepare(self, batch: BatchRows) -> RowContext:
        """Move t, and say from which cosine on a wrong class is hard."""
        if self.training:
            _move(self.t, gather_rows(batch.target_cosines).mean(), self.momentum)
        context = super().prepare(batch)
        threshold = curricularface_threshold(batch.target_cosines, context.margins)
        return replace(context, hard_above=threshold, hardness=self.t.clone())

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """``cos(θ + m)``, straight beyond π - m."""
        return arcface_target(cosines, context.margins)

    def other_similarity(self, cosines: Float[Tensor, "b c"], context: RowContext) -> Float[Tensor, "b c"]:
        """``cos θ·(t + cos θ)`` where hard, ``cos θ`` elsewhere."""
        assert context.hard_above is not None and context.hardness is not None
        return cosines * (1 + is_hard(cosines, context.hard_above) * (cosines + (context.hardness - 1)))

    def other_similarity_derivative(
        self, cosines: Float[Tensor, "b c"], context: RowContext
    ) -> Float[Tensor, "b c"]:
        """``t + 2·cos θ`` where hard, 1 elsewhere."""
        assert context.hard_above is not None and context.hardness is not None
        return 1 + is_hard(cosines, context.hard_above) * (2 * cosines + (context.hardness - 1))

    def similarity_bound(self, context: RowContext) -> float:
        """``1 + |t|``: reached by a hard class at cosine 1 (t > 0)."""
        assert context.hardness is not None
        return 1.0 + abs(float(context.hardness))


class AdaFace(Margin):
    """The margin follows an image's quality, read from its embedding's length (arXiv 2204.00964).

    The mean and standard deviation of the lengths (clipped to [0.001, 100], n - 1 in the denominator) are
    running: 20 and 100 at first, then ``μ ← momentum·batch + (1 - momentum)·μ`` at each training step before
    use. A batch of one image has no deviation and leaves σ alone. No gradient flows through the lengths.

    Args:
        scale: s > 0.
        margin: m in [0, 1], radians in the angular and a difference of cosines in the additive part.
        h: concentration; at 0.333 about two thirds of the qualities lie within ±0.333.
        momentum: weight of the newest batch, in (0, 1].
    """

    keeps_other_cosines = False
    norm_mean: Tensor
    norm_std: Tensor

    def __init__(
        self, *, scale: float = 30.0, margin: float = 0.4, h: float = 0.333, momentum: float = 0.01
    ) -> None:
        require(0 <= margin <= 1, "margin", margin, "a number in [0, 1]")
        require(h > 0, "h", h, "a positive number")
        require(0 < momentum <= 1, "momentum", momentum, "a number in (0, 1]")
        super().__init__(scale=scale, margin=margin)
        self.h = h
        self.momentum = momentum
        self.register_buffer("norm_mean", torch.tensor(20.0, dtype=torch.float64))
        self.register_buffer("norm_std", torch.tensor(100.0, dtype=torch.float64))

    def prepare(self, batch: BatchRows) -> RowContext:
        """Move mean and deviation of the lengths, then read each row's quality from them."""
        if self.training:
            lengths = gather_rows(batch.norms).clamp(1e-3, 100)
            _move(self.norm_mean, lengths.mean(), self.momentum)
            if len(lengths) > 1:
                _move(self.norm_std, lengths.std(), self.momentum)
        norms = batch.norms.to(batch.target_cosines.dtype)
        qualities = adaface_qualities(norms, h=self.h, norm_mean=self.norm_mean, norm_std=self.norm_std)
        return replace(super().prepare(batch), qualities=qualities)

    def target_similarity(self, cosines: Float[Tensor, " b"], context: RowContext) -> Float[Tensor, " b"]:
        """``cos(θ - m·q) - (m + m·q)``."""
        assert context.qualities is not None
        return adaface_target(cosines, context.margins, context.qualities)

    def other_similarity(self, cosines: Float[Tensor, "b c"], context: RowContext) -> Float[Tensor, "b c"]:
        """The cosine, clipped to ±(1 - 10⁻³)."""
        return cosines.clamp(ADAFACE_EPSILON - 1, 1 - ADAFACE_EPSILON)

    def other_similarity_derivative(
        self, cosines: Float[Tensor, "b c"], context: RowContext
    ) -> Float[Tensor, "b c"]:
        """1 within the clip, 0 beyond."""
        return cosines.abs().le_(1 - ADAFACE_EPSILON)


def _move(running: Tensor, newest: Tensor, momentum: float) -> None:
    """Exponential moving average, in place."""
    running.copy_(momentum * newest + (1 - momentum) * running)


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse, as an InputError, an option for which something does not hold."""
    if not holds:
        raise InputError(f"{name} = {value!r}", expected=expected, next_step=f"change {name} of this loss")


def _check_angle(name: str, value: float) -> None:
    require(0 <= value <= math.pi / 2, name, value, "radians in [0, π/2]")
