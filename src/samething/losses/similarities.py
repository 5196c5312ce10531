"""What margins are made of: angles, and the similarity of a row with its own class, as pure functions.

Every loss is a cross-entropy over ``scale × similarity``. The similarity of the right class (the *target*)
is made harder by a margin, so that the others are pushed further away than a plain softmax would push them.
Angles are radians. Whatever a loss remembers from earlier batches (a scale, a mean) is an argument: the
modules in :mod:`samething.losses.margins` keep it.

Two details hold everywhere. The derivative of acos is infinite at cosine ±1; there it is taken as zero, so an
image that equals its class centre has a finite gradient. And nothing is clipped away from ±1 before the
margin, except by AdaFace, whose definition says so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from samething.arrays import Float, Int

ADAFACE_EPSILON = 1e-3  # AdaFace's published code: cosines stay within ±(1 - ε), angles within [ε, π - ε]


class _Angle(torch.autograd.Function):
    """acos and its derivative; a ``where`` over whole matrices takes longer than both."""

    @staticmethod
    def forward(ctx: Any, cosines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines)
        return torch.acos(cosines.clamp(-1, 1))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (cosines,) = ctx.saved_tensors
        return -gradient * reciprocal_sines(cosines)


def angles(cosines: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """acos in radians, with derivative 0 at ±1 and beyond (rounding may leave a cosine at 1 + 1e-7).

    >>> angles(torch.tensor([1.0, 0.0, -1.0])).tolist()
    [0.0, 1.5707963705062866, 3.1415927410125732]
    """
    result: Tensor = _Angle.apply(cosines)
    return result


def reciprocal_sines(cosines: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 / sin(acos(cosine)), and 0 at ±1 and beyond; not differentiable.

    >>> reciprocal_sines(torch.tensor([0.0, 0.6, 1.0, -1.5])).tolist()
    [1.0, 1.25, 0.0, 0.0]
    """
    squared = ((1 - cosines) * (1 + cosines)).clamp_(min=0)  # exact near 1, where 1 - cosine² would cancel
    inside = squared.sign()
    return squared.clamp_(min=torch.finfo(squared.dtype).tiny).rsqrt_().mul_(inside)


def sines(cosines: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """sin(acos(cosine)), with derivative 0 at ±1 and beyond."""
    squared = (1 - cosines) * (1 + cosines)  # exact near 1, where 1 - cosine² would cancel
    at_the_end = squared.detach() <= 0
    return torch.where(at_the_end, 0.0, torch.sqrt(torch.where(at_the_end, 1.0, squared)))


def put_targets(
    others: Float[Tensor, "b c"], labels: Int[Tensor, " b"], targets: Float[Tensor, " b"]
) -> Float[Tensor, "b c"]:
    """A copy of ``others`` with each row's own class replaced by its target.

    >>> put_targets(torch.zeros(2, 3), torch.tensor([2, 0]), torch.tensor([5.0, 7.0])).tolist()
    [[0.0, 0.0, 5.0], [7.0, 0.0, 0.0]]
    """
    return others.scatter(1, labels[:, None], targets[:, None])


def arcface_target(cosines: Float[Tensor, " b"], margin_radians: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """``cos(θ + m)`` up to θ = π - m, and ``cos θ - m·sin m`` beyond, where cos(θ + m) would rise again.

    The straight part is the one of the authors' code. Its value is below the curved part's end, so a target
    never gains from crossing over; the comparison is strict, so θ = π - m itself is on the straight part.
    """
    curved = cosines * torch.cos(margin_radians) - sines(cosines) * torch.sin(margin_radians)
    straight = cosines - margin_radians * torch.sin(math.pi - margin_radians)
    return torch.where(cosines > torch.cos(math.pi - margin_radians), curved, straight)


def adaface_target(
    cosines: Float[Tensor, " b"], margins: Float[Tensor, " b"], qualities: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """``cos(θ - m·q) - (m + m·q)`` for a quality q in [-1, 1], with AdaFace's clips of cosine and angle."""
    limit = 1 - ADAFACE_EPSILON
    theta = torch.acos(cosines.clamp(-limit, limit)) - margins * qualities
    theta = theta.clamp(ADAFACE_EPSILON, math.pi - ADAFACE_EPSILON)
    return torch.cos(theta) - (margins + margins * qualities)


def li_arcface_similarity(
    cosines: Float[Tensor, "*shape"], margin_radians: float | Tensor = 0.0
) -> Float[Tensor, "*shape"]:
    """``1 - 2(θ + m)/π``: 1 at θ = 0 and -1 at θ = π, without a margin."""
    return 1 - (angles(cosines) + margin_radians) * (2 / math.pi)


def adacos_fixed_scale(num_classes: int) -> float:
    """``s = √2·ln(C - 1)`` (AdaCos, Zhang et al., arXiv 1905.00292); C > 2.

    >>> round(adacos_fixed_scale(37), 4)
    5.0679
    """
    return math.sqrt(2) * math.log(num_classes - 1)


def adacos_dynamic_scale(
    target_cosines: Float[Tensor, " b"], other_logsumexp: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """``s = ln B / cos(min(π/4, θ_med))`` (AdaCos, arXiv 1905.00292).

    Args:
        target_cosines: cosine of each row with its own class.
        other_logsumexp: ``ln Σ_{j≠y} exp(s_previous·cos θ_j)`` of each row. B is the mean of the sums.

    θ_med is the median of the targets' angles: of an even number the lower of the two in the middle
    (``torch.median``), as in the paper's code.

    >>> round(float(adacos_dynamic_scale(torch.tensor([1.0]), torch.tensor([3.0]))), 4)
    3.0
    """
    log_mean = torch.logsumexp(other_logsumexp, dim=0) - math.log(len(other_logsumexp))
    return log_mean / torch.cos(angles(target_cosines).median().clamp(max=math.pi / 4))


def curricularface_threshold(
    target_cosines: Float[Tensor, " b"], margin_radians: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """``cos(θ_y + m)``, above which a wrong class is a hard one."""
    cosines = target_cosines.detach()
    return cosines * torch.cos(margin_radians) - sines(cosines) * torch.sin(margin_radians)


def is_hard(cosines: Float[Tensor, "b c"], hard_above: Float[Tensor, " b"]) -> Float[Tensor, "b c"]:
    """1.0 where a cosine is above its row's threshold, else 0.0.

    >>> is_hard(torch.tensor([[0.1, 0.3]]), torch.tensor([0.2])).tolist()
    [[0.0, 1.0]]
    """
    return cosines.detach().clone().gt_(hard_above[:, None])  # in place on floats it is vectorised


def adaface_qualities(
    norms: Float[Tensor, " b"], *, h: float, norm_mean: float | Tensor, norm_std: float | Tensor
) -> Float[Tensor, " b"]:
    """``q = clip((‖z‖ - μ)/(σ + ε)·h, -1, 1)``: an image's quality, read from its embedding's length.

    >>> lengths = torch.tensor([20.0, 45.0, 120.0])
    >>> adaface_qualities(lengths, h=0.5, norm_mean=20.0, norm_std=50.0 - 1e-3).tolist()
    [0.0, 0.25, 0.800000011920929]
    """
    clipped = norms.detach().clamp(1e-3, 100)
    return ((clipped - norm_mean) / (norm_std + ADAFACE_EPSILON) * h).clamp(-1, 1)
