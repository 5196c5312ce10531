"""constraints.txt pins all that an installation with every extra brings in, and the pins fit each other."""

import importlib.metadata as metadata
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def needed(
    name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]
) -> Iterator[tuple[str, Requirement]]:
    """Yield ``(who asks, requirement)`` for `name` and all below it, as far as it is installed."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    try:
        declared = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, declared):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or {""}):
            yield name, requirement
            yield from needed(requirement.name, frozenset(requirement.extras), seen)


def test_every_package_of_the_installation_is_pinned_at_a_version_that_all_accept():
    pinned = pins()
    asked = list(needed("samething", frozenset({"dev"}), set()))
    assert len(asked) > 200
    unpinned, refused = set(), set()
    for who, requirement in asked:
        name = canonicalize_name(requirement.name)
        if name in ("samething", "samething-demo", "setuptools"):  # setuptools comes with the environment
            continue
        if name not in pinned:
            unpinned.add(f"{name} (asked by {who})")
        elif not requirement.specifier.contains(pinned[name], prereleases=True):
            refused.add(f"{who} asks {requirement}, pinned is {pinned[name]}")
    assert not unpinned
    assert not refused
