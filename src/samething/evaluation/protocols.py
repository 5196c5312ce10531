"""Evaluation protocols by name: metrics, scopes, distance, and how domains are averaged."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from samething.errors import InputError
from samething.metrics import Metric, require_metric
from samething.retrieval import Distance

Scope: TypeAlias = Literal["merged", "per_domain"]
"""What a query is searched in: one gallery over all domains, or one per domain."""
ProtocolName: TypeAlias = Literal[
    "default", "guiec", "uned", "ilias", "metric-learning", "board", "revisited", "custom"
]

MEAN: Final = "mean"
"""Name of the row that is the mean over all; no domain may be called so."""
METRICS: Final[tuple[Metric, ...]] = ("mmp@5", "r@1", "map")
"""Metrics where none are asked for."""
SCOPES: Final[Mapping[Scope, str]] = {
    "merged": "one index over all domains",
    "per_domain": "one index per domain",
}
"""The scopes, and the gallery searched in words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured, in which gallery, and how it is averaged."""

    name: str
    metrics: tuple[Metric, ...] = METRICS
    scopes: tuple[Scope, ...] = tuple(SCOPES)
    """Which galleries are searched."""
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


_CHALLENGE_NAMES: Final[Mapping[str, Sequence[str]]] = tomllib.loads(
    Path(__file__).with_name("challenge_names.toml").read_text(encoding="utf-8")
)


def challenge_domain(domain: str) -> str | None:
    """The challenge's domain that a catalog's domain belongs to, or None.

    >>> challenge_domain("Packaged-Goods"), challenge_domain("cars"), challenge_domain("birds")
    ('packaged goods', 'memes, illustrations and cars', None)
    """
    plain = " ".join(re.split(r"[\s_-]+", domain.strip().lower()))
    return next((name for name, others in _CHALLENGE_NAMES.items() if plain in (name, *others)), None)


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


_TABLE: Final = tomllib.loads(Path(__file__).with_name("protocols.toml").read_text(encoding="utf-8"))


def _from_table(name: str, row: Mapping[str, Any]) -> Protocol:
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}
    return Protocol(name=name, **fields)


PROTOCOLS: Final[Mapping[str, Protocol]] = {name: _from_table(name, row) for name, row in _TABLE.items()}
"""The protocols by name; ``custom`` is ``default`` with metrics of one's own."""


def protocol_of(protocol: str, *, metrics: tuple[Metric, ...] = ()) -> Protocol:
    """The protocol of a name.

    Raises:
        InputError: no such protocol, or metrics beside a protocol that has its own.
    """
    if protocol == "custom" or (protocol == "default" and metrics):
        return Protocol(name="custom", metrics=metrics or METRICS)
    if protocol not in PROTOCOLS or metrics:
        raise InputError(
            f"protocol {protocol!r}" + (f" with the metrics {', '.join(metrics)}" if metrics else ""),
            expected=f"one of {', '.join((*PROTOCOLS, 'custom'))}; metrics only with custom",
            next_step="for instance --protocol custom --metrics r@1 map@100" if metrics else "choose one",
        )
    return PROTOCOLS[protocol]
