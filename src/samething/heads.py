"""Heads: from a backbone's feature to an embedding.

A head maps float32 features (b, w) to embeddings (b, d) that are not yet normalised; whoever compares
embeddings divides them by their length first.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from samething.arrays import Embeddings, FeatureRows, Float, Int, signed_power, unit
from samething.errors import InputError

HeadKind: TypeAlias = Literal["linear", "batchnorm-linear", "mlp", "average", "pca", "none"]

_ROWS_AT_A_TIME: Final = 16_384
SURE_AFTER: Final = 100
"""Rows of which a :class:`Scatter` is half sure."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """Which head, and its shape."""

    kind: HeadKind = "linear"
    """``linear``; ``batchnorm-linear``: batch normalisation without scale and shift, then linear; ``mlp``:
    one hidden layer; ``average``: the mean of neighbouring features (the paper's zero-shot baseline);
    ``pca``; ``none``: the feature as it is."""
    embedding_dim: int = 64
    """Numbers in an embedding."""
    bias: bool = True
    """Whether the linear map has a bias."""
    standardise: bool = True
    """Bring features to unit length, subtract their mean over the training images, divide by one scale."""
    power: float = 1.0
    """With standardise: every number first becomes its magnitude to this power, with its sign, in (0, 1]. At
    0.5 a few large numbers no longer decide a cosine (Perronnin et al., ECCV 2010)."""
    hidden_dim: int = 512
    """Width of the hidden layer of ``mlp``."""


class Standardise(nn.Module):
    """Signed power, unit length, minus the training mean, over one scale for all numbers."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    def set_to(self, mean: Float[np.ndarray, " w"], covariance: Float[np.ndarray, "w w"]) -> None:
        """Take mean and covariance of training features; the scale is the root mean variance."""
        self.mean.copy_(torch.from_numpy(mean))
        self.scale.fill_(float(np.sqrt(max(np.trace(covariance) / len(mean), 1e-12))))

    def forward(self, features: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        """Standardised features."""
        if self.power != 1:
            features = features.sign() * features.abs() ** self.power
        return (nn.functional.normalize(features, dim=1) - self.mean) / self.scale


class BatchStandardise(nn.Module):
    """Batch normalisation without scale and shift, over the whole batch of all processes.

    Its input is a cached feature, which needs no gradient, so the statistics are not differentiated; in
    evaluation the running mean and variance of training are used (momentum 0.1, as torch's BatchNorm1d).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, features: Float[Tensor, "b w"]) -> Float[Tensor, "b w"]:
        """Normalised features."""
        mean, variance = self.running_mean, self.running_var
        if self.training:
            with torch.no_grad():
                ones = torch.ones_like(features[:, :1])
                sums = torch.cat([features, features.square(), ones], dim=1).double().sum(0)
                if torch.distributed.is_initialized():
                    torch.distributed.all_reduce(sums)
                width, count = features.shape[1], sums[-1]
                exact_mean = sums[:width] / count
                exact_variance = (sums[width:-1] / count - exact_mean.square()).clamp_min(0)
                mean, variance = exact_mean.float(), exact_variance.float()
                unbiased = (exact_variance * count / (count - 1).clamp_min(1)).float()
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(unbiased, 0.1)
        return (features - mean) / (variance + 1e-5).sqrt()


class Head(nn.Module):
    """Features (b, w) to embeddings (b, d), not normalised."""

    def __init__(self, config: HeadConfig, width: int) -> None:
        super().__init__()
        if config.kind != "none" and not 1 <= config.embedding_dim <= width:
            raise InputError(
                f"embedding_dim={config.embedding_dim}",
                expected=f"between 1 and the backbone's width, {width}",
                next_step="give another --embedding-dim",
            )
        self.config = config
        self.width = width
        self.embedding_dim = width if config.kind == "none" else config.embedding_dim
        self.standardise = Standardise(width, config.power) if config.standardise else nn.Identity()
        self.projection: nn.Module = nn.Identity()
        dim = config.embedding_dim
        if config.kind == "average":
            # torch's AdaptiveAvgPool1d(width → dim) as a fixed linear map, which every runtime knows
            pool = nn.Linear(width, dim, bias=False).requires_grad_(False)
            pool.weight.copy_(nn.functional.adaptive_avg_pool1d(torch.eye(width), dim).T)
            self.projection = pool
        elif config.kind == "mlp":
            hidden = nn.Linear(width, config.hidden_dim)
            last = nn.Linear(config.hidden_dim, dim, bias=config.bias)
            self.projection = nn.Sequential(hidden, nn.GELU(), last)
        elif config.kind != "none":
            linear = nn.Linear(width, dim, bias=config.bias)
            is_normalised = config.kind == "batchnorm-linear"
            self.projection = nn.Sequential(BatchStandardise(width), linear) if is_normalised else linear

    def forward(
        self, features: Float[Tensor, "b w"], dropout: Float[Tensor, "b w"] | None = None
    ) -> Float[Tensor, "b d"]:
        """Embeddings, not normalised.

        Args:
            features: of the backbone.
            dropout: factors of what enters the first linear map, behind all standardisation: its mean and
                spread are those of features that nothing was dropped from.
        """
        numbers: Tensor = self.standardise(features)
        for layer in self.projection if isinstance(self.projection, nn.Sequential) else [self.projection]:
            if dropout is not None and isinstance(layer, nn.Linear):
                numbers, dropout = numbers * dropout, None
            numbers = layer(numbers)
        return numbers

    @torch.no_grad()
    def fit(self, features: FeatureRows, rows: Int[np.ndarray, " m"] | None = None) -> None:
        """Take what descent does not learn (standardisation, principal components) from training features.

        Args:
            features: float16 or float32 (n, w); may be a memory map that is larger than memory.
            rows: the rows that are training features; by default all.
        """
        config = self.config
        if not config.standardise and config.kind != "pca":
            return
        mean, covariance = mean_and_covariance(
            features, rows, unit_length=config.standardise, power=config.power
        )
        if isinstance(self.standardise, Standardise):
            self.standardise.set_to(mean, covariance)
            mean = np.zeros_like(mean)  # of standardised features
        if config.kind == "pca":
            assert isinstance(self.projection, nn.Linear)
            components = principal_components(covariance, self.embedding_dim)
            self.projection.weight.copy_(torch.from_numpy(components))
            if self.projection.bias is not None:
                self.projection.bias.copy_(torch.from_numpy(-components @ mean))

    @torch.no_grad()
    def embed(self, features: FeatureRows) -> Embeddings:
        """Unit-length float32 embeddings of cached features, a few thousand rows at a time.

        Raises:
            InputError: an embedding has length zero.
        """
        was_training = self.training
        self.eval()
        device = next(iter(self.state_dict().values()), torch.empty(0)).device
        result = np.empty((len(features), self.embedding_dim), np.float32)
        for start, rows in _in_parts(features):
            embeddings = self(torch.from_numpy(rows).to(device))
            result[start : start + len(rows)] = nn.functional.normalize(embeddings, dim=1).cpu().numpy()
        self.train(was_training)
        zero = np.flatnonzero(~np.any(result, axis=1))
        if len(zero):
            raise InputError(
                f"the embedding of row {zero[0]} is zero",
                expected="embeddings with a direction",
                next_step="check the features of that row, and that the head was trained",
            )
        return result


def build_head(config: HeadConfig, width: int, *, seed: int = 0) -> Head:
    """A head with seeded random weights; call :meth:`Head.fit` before its first use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Head(config, width)


def fitted_head(config: HeadConfig, features: FeatureRows, rows: Int[np.ndarray, " m"] | None = None) -> Head:
    """A head that needs no descent (``average``, ``pca`` or ``none``), fitted as :meth:`Head.fit` does."""
    head = build_head(config, features.shape[1])
    head.fit(features, rows)
    return head.eval()


@torch.no_grad()
def whitened_head(
    head: Head, features: FeatureRows, power: float, *, rows: Int[np.ndarray, " m"] | None = None
) -> Head:
    """The head with a symmetric map behind it that evens out the spread of its embeddings.

    The map is ``C^(-power/2)`` up to a factor, C the covariance of unit-length embeddings. It turns no
    direction into another, so prefixes of the embedding and averages of heads keep their sense.

    Args:
        head: of a kind that ends in a linear map.
        features: training features, a few thousand of which are in memory at a time.
        power: in [0, 1]; 1 is whitening proper, 0.5 half of it.
        rows: the rows that are training features; by default all.
    """
    head = copy.deepcopy(head).cpu().eval()
    linear = head.projection if isinstance(head.projection, nn.Linear) else [*head.projection.children()][-1]
    assert isinstance(linear, nn.Linear)
    _, covariance = mean_and_covariance(features, rows, unit_length=True, through=head)
    variances, vectors = np.linalg.eigh(covariance)
    # what hardly varies is noise, and is not blown up without end
    factors = (variances[-1] / np.maximum(variances, 1e-6 * variances[-1])) ** (power / 2)
    even = torch.from_numpy((vectors * factors) @ vectors.T).float()
    linear.weight.copy_(even @ linear.weight)
    if linear.bias is not None:
        linear.bias.copy_(even @ linear.bias)
    return head


def head_from_state(config: Mapping[str, Any], width: int, state: Mapping[str, Tensor]) -> Head:
    """A stored head: its configuration as JSON, the backbone's width and its tensors."""
    known = {field.name for field in dataclasses.fields(HeadConfig)}  # earlier versions wrote more
    head = Head(HeadConfig(**{name: value for name, value in config.items() if name in known}), width)
    head.load_state_dict(dict(state))
    return head.eval()


# ---- principal components


def mean_and_covariance(
    features: FeatureRows,
    rows: Int[np.ndarray, " m"] | None = None,
    *,
    unit_length: bool,
    power: float = 1.0,
    through: Head | None = None,
) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and covariance of features in float64, a few thousand rows at a time.

    Args:
        features: float16 or float32 (n, w).
        rows: the rows to take; by default all.
        unit_length: divide each row by its length first.
        power: signed power of every number before that.
        through: a head, whose embeddings are taken instead.
    """
    width = features.shape[1] if through is None else through.embedding_dim
    total, products = np.zeros(width), np.zeros((width, width))
    for _, part in _in_parts(features, rows):
        if through is not None:
            part = through(torch.from_numpy(part)).numpy()
        exact = powered(part, power) if unit_length else part.astype(np.float64)
        total += exact.sum(0)
        products += exact.T @ exact
    num_rows = len(features) if rows is None else len(rows)
    mean = total / num_rows
    return mean, products / num_rows - np.outer(mean, mean)


def powered(rows: Float[np.ndarray, "n w"], power: float) -> Float[np.ndarray, "n w"]:
    """Rows of unit length in float64, of their numbers' signed powers."""
    return unit(signed_power(rows.astype(np.float64), power))


def principal_components(
    covariance: Float[np.ndarray, "w w"], num_components: int
) -> Float[np.ndarray, "d w"]:
    """Directions of largest variance, largest first; signed so that the largest entry is positive."""
    _, vectors = np.linalg.eigh(covariance)
    components = vectors[:, ::-1][:, :num_components].T
    largest = np.abs(components).argmax(axis=1)
    return np.ascontiguousarray(
        components * np.sign(components[np.arange(len(components)), largest])[:, None]
    )


# ---- discriminants


@dataclasses.dataclass(frozen=True, eq=False)
class Scatter:
    """How features vary, in all and within classes, in float64.

    Features are taken as a head standardises them: signed powers, at unit length.
    """

    num_rows: int
    num_certain: int
    """Rows beyond one per class, which are what ``within`` rests on."""
    mean: Float[np.ndarray, " w"]
    total: Float[np.ndarray, "w w"]
    """Covariance of the features."""
    within: Float[np.ndarray, "w w"]
    """Covariance of their differences from the mean of their class, without bias."""

    @classmethod
    def of(
        cls,
        features: FeatureRows,
        rows: Int[np.ndarray, " m"],
        classes: Int[np.ndarray, " m"],
        *,
        power: float,
    ) -> Scatter:
        """Of training features, a few thousand rows at a time.

        Args:
            features: float16 or float32 (n, w).
            rows: the rows to take.
            classes: the class of each of these rows, as any whole numbers.
            power: signed power of every number.
        """
        names, own = np.unique(classes, return_inverse=True)
        sums, products = np.zeros((len(names), features.shape[1])), np.zeros((features.shape[1],) * 2)
        for start, part in _in_parts(features, rows):
            exact = powered(part, power)
            np.add.at(sums, own[start : start + len(part)], exact)
            products += exact.T @ exact
        mean = sums.sum(0) / len(rows)
        means = sums / np.sqrt(np.bincount(own))[:, None]
        num_certain = max(len(rows) - len(names), 1)
        within = (products - means.T @ means) / num_certain
        return cls(len(rows), num_certain, mean, products / len(rows) - np.outer(mean, mean), within)

    @classmethod
    def pooled(cls, scatters: Sequence[Scatter]) -> Scatter:
        """The mean over domains, which weigh the same whatever their sizes, but for those of few rows.

        How domains differ from each other is left out of the total: no search within a domain needs it.
        """
        weights = np.array([each.num_rows / (each.num_rows + SURE_AFTER) for each in scatters])
        weights /= weights.sum()

        def mean(name: str) -> np.ndarray:
            weighed = [weight * getattr(each, name) for weight, each in zip(weights, scatters, strict=True)]
            return np.asarray(sum(weighed))

        return cls(
            sum(each.num_rows for each in scatters),
            sum(each.num_certain for each in scatters),
            mean("mean"),
            mean("total"),
            mean("within"),
        )

    @functools.cached_property
    def _spread_within(self) -> tuple[Float[np.ndarray, " w"], Float[np.ndarray, "w w"]]:
        """Eigenvalues, as multiples of their mean, and eigenvectors of the covariance within classes."""
        values, vectors = np.linalg.eigh(self.within)
        return np.maximum(values, 0) / max(values.mean(), 1e-12), vectors

    def whitening(self, shrinkage: float) -> Float[np.ndarray, "w w"]:
        """A map after which features spread evenly within classes, but for the shrinkage.

        Args:
            shrinkage: added to the within-class covariance's eigenvalues, in units of their mean. It is the
                weight of an even spread against the rows, so it grows where there are few.
        """
        values, vectors = self._spread_within
        return (vectors / np.sqrt(values + shrinkage * (1 + SURE_AFTER / self.num_certain))).T

    def discriminants(self, shrinkage: float, num: int) -> Float[np.ndarray, "d w"]:
        """The directions along which features spread most, against their spread within classes.

        They solve ``T v = e (W + shrinkage) v``, largest e first, with T the covariance of all features and W
        that within classes (Fisher 1936; shrunk as Friedman 1989, eq. 18). Their scale is
        ``v' (W + shrinkage) v = 1`` with W's mean eigenvalue as the unit. T rather than the covariance of the
        class means: it has the same discriminants where nothing is shrunk, and its rank is not bounded by the
        number of classes. With much shrinkage they are the principal components.
        """
        whitening = self.whitening(shrinkage)
        found: np.ndarray = principal_components(whitening @ self.total @ whitening.T, num) @ whitening
        return found


def lda_head(config: HeadConfig, scatter: Scatter, shrinkage: float) -> Head:
    """A linear head to what training features vary by; see :meth:`Scatter.discriminants`.

    Its weights are as large as random ones would be, so that descent may go on from it.
    """
    head = build_head(config, len(scatter.mean))
    assert isinstance(head.standardise, Standardise) and isinstance(head.projection, nn.Linear)
    head.standardise.set_to(scatter.mean, scatter.total)
    with torch.no_grad():
        directions = torch.from_numpy(scatter.discriminants(shrinkage, head.embedding_dim)).float()
        weight = head.projection.weight
        weight.copy_(directions * (weight.square().mean() / directions.square().mean()).sqrt())
        if head.projection.bias is not None:
            head.projection.bias.zero_()
    return head.eval()


def _in_parts(
    features: FeatureRows, rows: Int[np.ndarray, " m"] | None = None
) -> Iterator[tuple[int, Float[np.ndarray, "part w"]]]:
    for start in range(0, len(features) if rows is None else len(rows), _ROWS_AT_A_TIME):
        part = slice(start, start + _ROWS_AT_A_TIME)
        yield start, np.asarray(features[part if rows is None else rows[part]], np.float32)
