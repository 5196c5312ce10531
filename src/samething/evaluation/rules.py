"""Evaluation protocols by name: metrics, index, distance, and how they are averaged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Int

from samething import metrics as formulas
from samething.arrays import NumRelevant, PerQuery
from samething.errors import InputError
from samething.retrieval import Distance

Metric: TypeAlias = str
"""``mmp@K``, ``r@K``, ``p@K``, ``map@K``, ``map``, ``map@r`` or ``r-precision``."""
Protocol: TypeAlias = Literal["merged", "per_domain"]
"""One index over all domains, or one per domain."""
ProtocolName: TypeAlias = Literal["default", "guiec", "uned", "ilias", "metric-learning", "custom"]

METRICS: Final[tuple[Metric, ...]] = ("mmp@5", "r@1", "map")
"""Metrics where none are asked for."""
PROTOCOLS: Final[tuple[Protocol, ...]] = ("merged", "per_domain")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """An evaluation protocol."""

    name: str
    metrics: tuple[Metric, ...] = METRICS
    scopes: tuple[Protocol, ...] = PROTOCOLS
    """Which indices are searched."""
    distance: Distance = "cosine"
    largest_dim: int | None = None
    """Most dimensions that are allowed."""
    decimals: int | None = None
    """Decimals to which a domain's value is rounded before domains are averaged; None for exact numbers."""
    mean: Literal["domains", "queries"] = "domains"
    """Whether every domain or every query weighs the same in the mean."""
    domain_shares: Mapping[str, float] | None = None
    """Weights of domains in a composite score."""

    def __post_init__(self) -> None:
        for metric in self.metrics:
            require_metric(metric)

    def measure(self, ranks: Int[np.ndarray, " p"], counts: NumRelevant) -> dict[Metric, PerQuery]:
        """Every metric from the ranks of the relevant entries, as ``positive_ranks`` gives them."""
        return {metric: value_of(metric, ranks, counts) for metric in self.metrics}


_SHAPE: Final = re.compile(r"(mmp|r|p|map)@([1-9][0-9]{0,5})")


def require_metric(metric: str) -> None:
    """Refuse a name that is no metric.

    Raises:
        InputError: it is none.
    """
    if metric not in ("map", "map@r", "r-precision") and not _SHAPE.fullmatch(metric):
        raise InputError(
            f"metric {metric!r}",
            expected="mmp@K, r@K, p@K or map@K with a number of ranks K, map, map@r or r-precision",
            next_step="for instance --metrics mmp@5 r@1 map@100",
        )


def value_of(metric: Metric, ranks: Int[np.ndarray, " p"], counts: NumRelevant) -> PerQuery:
    """One metric, one value per query; NaN where nothing is relevant.

    >>> value_of("r@2", np.array([2, 5]), np.array([2]))
    array([1.])
    """
    whole = {
        "map": formulas.average_precision,
        "map@r": formulas.average_precision_at_r,
        "r-precision": formulas.r_precision,
    }
    if metric in whole:
        return whole[metric](ranks, counts)
    require_metric(metric)
    name, _, depth = metric.partition("@")
    k = int(depth)
    if name == "map":
        return formulas.truncated_average_precision(ranks, counts, k=k)
    nearest = formulas.relevance_from_ranks(ranks, counts, k=k)
    by_name = {
        "mmp": formulas.modified_mean_precision_at_k,
        "r": formulas.recall_at_k,
        "p": formulas.precision_at_k,
    }
    return by_name[name](nearest, counts, k=k)


def title_of(metric: Metric) -> str:
    """How a metric is written.

    >>> [title_of(metric) for metric in ("mmp@5", "r@1", "map@1000", "map@r", "r-precision")]
    ['mMP@5', 'R@1', 'mAP@1000', 'MAP@R', 'R-precision']
    """
    if metric in ("map@r", "r-precision"):
        return {"map@r": "MAP@R", "r-precision": "R-precision"}[metric]
    name, sign, depth = metric.partition("@")
    return {"mmp": "mMP", "r": "R", "p": "MP", "map": "mAP"}[name] + sign + depth


# ---- the Google Universal Image Embedding Challenge's domains

GUIEC_SHARES: Final[Mapping[str, float]] = {
    "apparel": 20.0,
    "packaged goods": 19.9,
    "landmarks": 19.6,
    "furniture": 10.6,
    "storefronts": 10.2,
    "dishes": 6.7,
    "artwork": 5.4,
    "memes, illustrations and cars": 5.2,
    "toys": 2.3,
}
"""Shares of the challenge's queries in percent, as its organisers published them (2022)."""

_CHALLENGE_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "apparel": ("apparel", "clothing", "clothes", "fashion", "inshop", "deep_fashion", "deep_fashion2", "hm"),
    "packaged goods": ("packaged goods", "products", "product", "packaged", "rp2k", "sop", "products_10k",
                       "shopee"),
    "landmarks": ("landmarks", "landmark", "gldv2"),
    "furniture": ("furniture", "home decor", "furniture180"),
    "storefronts": ("storefronts", "storefront", "shops", "storefronts146"),
    "dishes": ("dishes", "dish", "food", "food2k", "food101", "food_rec22"),
    "artwork": ("artwork", "artworks", "art", "paintings", "met", "met_art"),
    "memes, illustrations and cars": ("memes", "illustrations", "illustration", "cars", "car",
                                      "stanford_cars", "cars196"),
    "toys": ("toys", "toy"),
}  # fmt: skip


def challenge_domain(domain: str) -> str | None:
    """The challenge's domain that a catalog's domain belongs to, or None.

    >>> challenge_domain("Packaged-Goods"), challenge_domain("cars"), challenge_domain("birds")
    ('packaged goods', 'memes, illustrations and cars', None)
    """
    plain = " ".join(re.split(r"[\s_-]+", domain.strip().lower()))
    for name, spellings in _CHALLENGE_NAMES.items():
        if plain == name or plain in [" ".join(spelling.split("_")) for spelling in spellings]:
            return name
    return None


def composite_weights(domains: tuple[str, ...], shares: Mapping[str, float]) -> dict[str, float]:
    """What each of a catalog's domains weighs in the composite score; the weights sum to 1 or there are none.

    Domains that are one domain of the challenge share its weight equally. Domains that the challenge does not
    know weigh nothing, and the weight of the challenge's domains that are missing goes to the others in
    proportion.

    >>> composite_weights(("cars", "birds", "toys"), {"memes, illustrations and cars": 3.0, "toys": 1.0})
    {'cars': 0.75, 'toys': 0.25}
    """
    places = {domain: challenge_domain(domain) for domain in domains}
    known = {domain: place for domain, place in places.items() if place in shares}
    raw = {
        domain: shares[place] / list(known.values()).count(place)
        for domain, place in known.items()
        if place is not None
    }
    total = sum(raw.values())
    return {domain: weight / total for domain, weight in raw.items()}


RULES: Final[Mapping[str, Rules]] = {
    "default": Rules(name="default"),
    "guiec": Rules(
        name="guiec",
        metrics=("mmp@5",),
        scopes=("merged",),
        distance="euclidean",
        largest_dim=64,
        domain_shares=GUIEC_SHARES,
    ),
    "uned": Rules(name="uned", metrics=("r@1", "mmp@5", "map@5"), decimals=3),
    "ilias": Rules(name="ilias", metrics=("map@1000",), scopes=("merged",), mean="queries"),
    "metric-learning": Rules(
        name="metric-learning",
        metrics=("r@1", "r@2", "r@4", "r@8", "map@r", "r-precision"),
        scopes=("per_domain",),
    ),
}
"""The protocols by name; ``custom`` is ``default`` with metrics of one's own."""


def rules_of(protocol: str | Rules, *, metrics: tuple[Metric, ...] = ()) -> Rules:
    """The rules of a protocol's name.

    Raises:
        InputError: no such protocol, or metrics beside a protocol that has its own.
    """
    if isinstance(protocol, Rules):
        return protocol
    if protocol == "custom" or (protocol == "default" and metrics):
        return Rules(name="custom", metrics=metrics or METRICS)
    if protocol not in RULES or metrics:
        raise InputError(
            f"protocol {protocol!r}" + (f" with the metrics {', '.join(metrics)}" if metrics else ""),
            expected=f"one of {', '.join((*RULES, 'custom'))}; metrics only with custom",
            next_step="for instance --protocol custom --metrics r@1 map@100" if metrics else "choose one",
        )
    return RULES[protocol]
