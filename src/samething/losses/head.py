"""Class weights under a margin: the trainable part of a loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samething.arrays import Float, Int
from samething.errors import InputError
from samething.losses.margins import Margin, require
from samething.losses.processes import gather_rows


class MarginHead(nn.Module):
    """Embeddings and labels in, mean cross-entropy out; every loss is this module with another margin.

    ``weight [num_classes·num_centers, embedding_dim]`` holds the sub-centres of a class in consecutive rows.
    A row's cosine with a class is the largest of its cosines with the class's sub-centres (Deng et al.,
    *Sub-center ArcFace*, ECCV 2020); only that sub-centre gets a gradient, one of them among equals.
    Embeddings need not be normalised.

    Each call of :meth:`forward` or :meth:`logits` in training mode is a step: it moves what the margin
    remembers. In evaluation mode nothing moves and nothing is sampled.

    Args:
        embedding_dim: d.
        num_classes: C, at least 2.
        margin: what makes the target harder; :func:`samething.losses.build_margin` builds one by name.
        num_centers: k ≥ 1 sub-centres per class.
        prefixes: Matryoshka training (Kusupati et al., arXiv 2205.13147): the loss is the mean over these
            leading parts of the embedding, such as (16, 32, 64), each with cosines and a margin of its own.
            Empty means the whole embedding.
        class_fraction: part of the classes, in (0, 1], that a training step sees (Partial FC).
        seed: of the random classes, ≥ 0.

    Raises:
        InputError: from the constructor, an argument outside its range; from a call, labels outside
            0 … C - 1, another embedding size, or an embedding or class weight of length zero.
    """

    sampling_state: Tensor
    checks: bool = True
    """Whether every call looks at labels and lengths; a caller who is sure spares a card the waiting."""

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: Margin,
        *,
        num_centers: int = 1,
        prefixes: Sequence[int] = (),
        class_fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(embedding_dim >= 1, "embedding_dim", embedding_dim, "at least 1")
        require(num_classes >= 2, "num_classes", num_classes, "at least 2 classes")
        require(num_centers >= 1, "num_centers", num_centers, "at least 1 sub-centre per class")
        require(0 < class_fraction <= 1, "class_fraction", class_fraction, "a part in (0, 1]")
        require(seed >= 0, "seed", seed, "a number ≥ 0")
        prefixes = tuple(prefixes) or (embedding_dim,)
        in_range = all(1 <= p <= embedding_dim for p in prefixes)
        require(in_range, "prefixes", prefixes, f"lengths from 1 to {embedding_dim}")
        self.num_classes = num_classes
        self.num_centers = num_centers
        self.prefixes = prefixes
        self.class_fraction = class_fraction
        # what a margin remembers (a scale, mean lengths) differs between prefixes
        self.margins = nn.ModuleList([margin, *(copy.deepcopy(margin) for _ in prefixes[1:])])
        self.weight = nn.Parameter(torch.empty(num_classes * num_centers, embedding_dim))
        nn.init.xavier_uniform_(self.weight)
        self.register_buffer("sampling_state", torch.tensor([seed, 0]))

    def forward(self, embeddings: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of the batch, over the classes sampled for this step."""
        self.check_batch(embeddings, labels)
        classes = self.next_classes(labels)
        weight: Tensor = self.weight
        columns = labels
        if classes is not None:
            centers = weight.view(self.num_classes, self.num_centers, -1)
            weight, columns = centers[classes].flatten(0, 1), torch.searchsorted(classes, labels)
        losses = []
        for margin, prefix in zip(self.margins, self.prefixes, strict=True):
            logits = self._logits(margin, embeddings[:, :prefix], weight[:, :prefix], columns, labels)
            losses.append(F.cross_entropy(logits, columns))
        return torch.stack(losses).mean()

    def logits(self, embeddings: Float[Tensor, "b d"], labels: Int[Tensor, " b"]) -> Float[Tensor, "b c"]:
        """Logits with the margin, over all classes and the last (longest) prefix; nothing is sampled."""
        self.check_batch(embeddings, labels)
        prefix = self.prefixes[-1]
        return self._logits(self.margins[-1], embeddings[:, :prefix], self.weight[:, :prefix], labels, labels)

    def next_classes(self, labels: Int[Tensor, " b"]) -> Int[Tensor, " sampled"] | None:
        """Begin a training step: the classes drawn for it, ascending; None where all take part."""
        if not self.training or self.class_fraction == 1:
            return None
        seed, step = self.sampling_state.tolist()
        self.sampling_state[1] += 1
        return sample_classes(
            gather_rows(labels),
            num_classes=self.num_classes,
            fraction=self.class_fraction,
            generator=generator_for_step(seed, step),
        ).to(labels.device)

    def check_batch(self, embeddings: Float[Tensor, "b _"], labels: Int[Tensor, " b"]) -> None:
        """Refuse, as an InputError, another embedding size and labels outside 0 … C - 1."""
        if not self.checks:
            return
        width = self.weight.shape[1]
        if embeddings.shape[1] != width:
            raise InputError(
                f"embeddings of {embeddings.shape[1]} dimensions",
                expected=f"{width}, the embedding_dim of this loss",
                next_step="build the loss with the embedding size of the head",
            )
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= self.num_classes:
            raise InputError(
                f"{len(labels)} labels"
                + (f" from {int(labels.min())} to {int(labels.max())}" if len(labels) else ""),
                expected=f"class numbers from 0 to {self.num_classes - 1}",
                next_step="number the classes of the training catalog without gaps, from 0",
            )

    def _logits(
        self, margin: nn.Module, embeddings: Tensor, weight: Tensor, columns: Tensor, labels: Tensor
    ) -> Tensor:
        assert isinstance(margin, Margin)
        embeddings = embeddings.to(weight.dtype)
        norms = embeddings.norm(dim=1)
        weight_norms = weight.norm(dim=1)
        if self.checks:
            check_lengths("embedding", norms)
            check_lengths("class weight", weight_norms)
        cosines = F.linear(embeddings / norms[:, None], weight / weight_norms[:, None])
        if self.num_centers > 1:
            cosines = cosines.view(len(cosines), -1, self.num_centers).max(dim=2).values
        return margin.logits(cosines, columns, norms=norms, labels=labels)


def generator_for_step(*numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on numbers ≥ 0 alone: all processes and a resumed run draw the same."""
    mixed = np.random.SeedSequence(numbers).generate_state(1, dtype=np.uint32)[0]
    return torch.Generator(device).manual_seed(int(mixed))


def sample_classes(
    present: Int[Tensor, " some"], *, num_classes: int, fraction: float, generator: torch.Generator
) -> Int[Tensor, " sampled"]:
    """Partial FC (An et al., arXiv 2203.15565): the classes present, and random others up to ``fraction``.

    Args:
        present: class numbers of the (global) batch; repeats are welcome.
        num_classes: C.
        fraction: r in (0, 1]; ⌈r·C⌉ classes are returned, or more when more are present.
        generator: a CPU generator.

    Returns:
        Class numbers, ascending, without repeats.

    >>> g = generator_for_step(0, 0)
    >>> sampled = sample_classes(torch.tensor([7, 7, 2]), num_classes=10, fraction=0.5, generator=g)
    >>> len(sampled), 2 in sampled, 7 in sampled
    (5, True, True)
    """
    present = torch.unique(present).cpu()
    keys = torch.rand(num_classes, generator=generator)
    keys[present] = 2.0  # above every draw from [0, 1)
    num_sampled = max(math.ceil(fraction * num_classes), len(present))
    return keys.topk(num_sampled).indices.sort().values


def check_lengths(what: str, norms: Float[Tensor, " rows"]) -> None:
    """Refuse, as an InputError, a row without a direction, or with a number that is not finite."""
    usable = (norms > 0) & norms.isfinite()
    if not bool(usable.all()):
        first, num_unusable = int((~usable).nonzero()[0]), int((~usable).sum())
        raise InputError(
            f"{what} {first} has length {float(norms[first].detach()):g}, one of {num_unusable} such rows",
            expected="finite rows with a direction",
            next_step="look for a feature row of zeros, or a learning rate that killed the head",
        )
