"""Every margin-softmax loss as a pure function, cosines in and logits out: what the modules are held against.

The functions take ``cosines [b, c]``, of each embedding with each class, and ``labels [b]``, the right class
of each row. Angles are radians. What a loss remembers from earlier batches (a scale, a mean) is an argument.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from samething.losses.similarities import (
    ADAFACE_EPSILON,
    adaface_target,
    arcface_target,
    curricularface_threshold,
    is_hard,
    li_arcface_similarity,
    put_targets,
)


def normface_logits(
    cosines: Float[Tensor, "b c"], labels: Int[Tensor, " b"], *, scale: float | Tensor
) -> Float[Tensor, "b c"]:
    """Cosine softmax without a margin: ``z_j = s·cos θ_j`` (NormFace, Wang et al., arXiv 1704.06369).

    Args:
        cosines: cosine of each embedding with each class, in [-1, 1].
        labels: the right class of each row; unused, so that all losses share one call.
        scale: s > 0, without unit.

    >>> normface_logits(torch.tensor([[0.5, -0.5]]), torch.tensor([0]), scale=10.0).tolist()
    [[5.0, -5.0]]
    """
    del labels
    return scale * cosines


def cosface_logits(
    cosines: Float[Tensor, "b c"], labels: Int[Tensor, " b"], *, scale: float | Tensor, margin: float
) -> Float[Tensor, "b c"]:
    """``z_y = s·(cos θ_y - m)``, ``z_j = s·cos θ_j`` (CosFace, Wang et al., arXiv 1801.09414, eq. 4).

    Args:
        cosines: cosine of each embedding with each class, in [-1, 1].
        labels: the right class of each row.
        scale: s > 0, without unit.
        margin: m ≥ 0, a difference of cosines, without unit.

    >>> cosface_logits(torch.tensor([[0.5, -0.5]]), torch.tensor([0]), scale=10.0, margin=0.25).tolist()
    [[2.5, -5.0]]
    """
    targets = cosines.gather(1, labels[:, None])[:, 0] - margin
    return scale * put_targets(cosines, labels, targets)


def arcface_logits(
    cosines: Float[Tensor, "b c"],
    labels: Int[Tensor, " b"],
    *,
    scale: float | Tensor,
    margin_radians: float | Float[Tensor, " b"],
) -> Float[Tensor, "b c"]:
    """``z_y = s·cos(θ_y + m)``, ``z_j = s·cos θ_j`` (ArcFace, Deng et al., arXiv 1801.07698, eq. 3).

    Beyond θ_y = π - m the target is ``cos θ_y - m·sin m``, see :func:`arcface_target`. With a margin per row
    this is also the loss with class-size dynamic margin: pass ``class_margins[labels]``.

    Args:
        cosines: cosine of each embedding with each class, or with its nearest sub-centre, in [-1, 1].
        labels: the right class of each row.
        scale: s > 0, without unit.
        margin_radians: m in [0, π/2], one number or one per row.

    >>> theta = torch.tensor([[1.0, 2.0]])
    >>> z = arcface_logits(theta.cos(), torch.tensor([0]), scale=1.0, margin_radians=0.5)
    >>> bool(torch.allclose(z, torch.tensor([[1.5, 2.0]]).cos()))
    True
    """
    targets = cosines.gather(1, labels[:, None])[:, 0]
    margins = torch.as_tensor(margin_radians, dtype=cosines.dtype, device=cosines.device)
    return scale * put_targets(cosines, labels, arcface_target(targets, margins.expand_as(targets)))


def li_arcface_logits(
    cosines: Float[Tensor, "b c"],
    labels: Int[Tensor, " b"],
    *,
    scale: float | Tensor,
    margin_radians: float,
) -> Float[Tensor, "b c"]:
    """``z_y = s·(π - 2(θ_y + m))/π``, ``z_j = s·(π - 2θ_j)/π`` (Li-ArcFace, Li et al., arXiv 1907.12256).

    The angle itself, mapped linearly to [-1, 1], takes the place of the cosine: the target falls for every
    θ, also beyond π - m, so that no second part is needed.

    Args:
        cosines: cosine of each embedding with each class, in [-1, 1].
        labels: the right class of each row.
        scale: s > 0, without unit.
        margin_radians: m in [0, π/2].

    >>> c, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    >>> li_arcface_logits(c, y, scale=1.0, margin_radians=0.0).tolist()
    [[1.0, 0.0]]
    """
    targets = cosines.gather(1, labels[:, None])[:, 0]
    return scale * put_targets(
        li_arcface_similarity(cosines), labels, li_arcface_similarity(targets, margin_radians)
    )


def adacos_logits(
    cosines: Float[Tensor, "b c"], labels: Int[Tensor, " b"], *, scale: float | Tensor
) -> Float[Tensor, "b c"]:
    """Cosine softmax, ``z_j = s·cos θ_j``, under AdaCos' own scale (Zhang et al., arXiv 1905.00292).

    Args:
        cosines: cosine of each embedding with each class, in [-1, 1].
        labels: the right class of each row; it matters to the scale only.
        scale: from :func:`adacos_fixed_scale` or :func:`adacos_dynamic_scale`.

    >>> c, y = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([0])
    >>> adacos_logits(c, y, scale=2.0).tolist()
    [[2.0, 1.0, 0.0]]
    """
    return normface_logits(cosines, labels, scale=scale)


def curricularface_logits(
    cosines: Float[Tensor, "b c"],
    labels: Int[Tensor, " b"],
    *,
    scale: float | Tensor,
    margin_radians: float,
    t: float | Tensor,
) -> Float[Tensor, "b c"]:
    """ArcFace whose hard negatives weigh more as training goes on (Huang et al., arXiv 2004.00288).

    ``z_y`` as in ArcFace. A wrong class is *hard* when ``cos θ_j > cos(θ_y + m)``; it gets
    ``z_j = s·cos θ_j·(t + cos θ_j)``, an easy one ``s·cos θ_j``. The threshold is ``cos(θ_y + m)``
    itself even beyond θ_y = π - m, where the target is on ArcFace's straight part.

    Args:
        cosines: cosine of each embedding with each class, in [-1, 1].
        labels: the right class of each row.
        scale: s > 0, without unit.
        margin_radians: m in [0, π/2].
        t: running mean of the targets' cosines, in [-1, 1]; no gradient flows through it.

    >>> c = torch.tensor([[0.5, 0.4, -0.9]])
    >>> z = curricularface_logits(c, torch.tensor([0]), scale=1.0, margin_radians=0.5, t=0.1)
    >>> [round(v, 4) for v in z[0].tolist()]
    [0.0236, 0.2, -0.9]
    """
    targets = cosines.gather(1, labels[:, None])[:, 0]
    margins = torch.full_like(targets, margin_radians)
    hard = is_hard(cosines, curricularface_threshold(targets, margins))
    others = cosines * (1 + hard * (cosines + (t - 1)))
    return scale * put_targets(others, labels, arcface_target(targets, margins))


def adaface_logits(
    cosines: Float[Tensor, "b c"],
    labels: Int[Tensor, " b"],
    *,
    scale: float | Tensor,
    margin: float,
    qualities: Float[Tensor, " b"],
) -> Float[Tensor, "b c"]:
    """``z_y = s·(cos(θ_y + g_angle) - g_add)``, ``z_j = s·cos θ_j`` (AdaFace, Kim et al., arXiv 2204.00964).

    ``g_angle = -m·q`` and ``g_add = m·q + m``: like ArcFace for a poor image (q = -1), like CosFace for a
    middling one (q = 0). As in the authors' code all cosines are first clipped to ±(1 - 10⁻³), with no
    gradient beyond, and the target's angle to [10⁻³, π - 10⁻³].

    Args:
        cosines: cosine of each embedding with each class, in [-1, 1].
        labels: the right class of each row.
        scale: s > 0, without unit.
        margin: m ≥ 0: radians in the angular, a difference of cosines in the additive part.
        qualities: q of each row, in [-1, 1], from :func:`adaface_qualities`.

    >>> c, q = torch.tensor([[0.5, 0.4]]), torch.tensor([0.0])
    >>> z = adaface_logits(c, torch.tensor([0]), scale=1.0, margin=0.4, qualities=q)
    >>> [round(v, 4) for v in z[0].tolist()]
    [0.1, 0.4]
    """
    targets = cosines.gather(1, labels[:, None])[:, 0]
    margins = torch.full_like(targets, margin)
    limit = 1 - ADAFACE_EPSILON
    return scale * put_targets(
        cosines.clamp(-limit, limit), labels, adaface_target(targets, margins, qualities)
    )
