"""Which instances are learned from and which are searched for: a split by instance, fixed for good."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from samething.catalog import Role
from samething_demo.instances import Instance, digest

TRAIN_SHARE: Final = 0.4
VAL_SHARE: Final = 0.1
"""The rest, half of each domain's instances, is the test."""

TWO_QUERIES_FROM: Final = 6
"""A test instance with at least this many images gives two queries, another one."""

_SEED: Final = 0


def assign_roles(instances: Iterable[Instance]) -> dict[str, Role]:
    """The role of every image, by its path relative to the root.

    Per domain the instances are ordered by a digest of their names; the first are for training, the next for
    validation, the rest for the test. Of a test instance, the images with the lowest digests are queries,
    the others are the index, of which at least one is left.

    Raises:
        ValueError: a test instance has one image only.
    """
    by_domain: dict[str, list[Instance]] = {}
    for instance in instances:
        by_domain.setdefault(instance.domain, []).append(instance)
    roles: dict[str, Role] = {}
    for members in by_domain.values():
        members.sort(key=lambda instance: digest("role", _SEED, instance.label))
        num_train = round(TRAIN_SHARE * len(members))
        num_val = round(VAL_SHARE * len(members))
        for number, instance in enumerate(members):
            if number < num_train:
                roles.update(dict.fromkeys(map(instance.image, instance.sources), "train"))
            elif number < num_train + num_val:
                roles.update(dict.fromkeys(map(instance.image, instance.sources), "val"))
            else:
                roles.update(_test_roles(instance))
    return roles


def _test_roles(instance: Instance) -> dict[str, Role]:
    images = sorted(map(instance.image, instance.sources), key=lambda image: digest("query", _SEED, image))
    if len(images) < 2:
        raise ValueError(f"{instance.label} has one image: a query would have nothing to find")
    num_queries = 2 if len(images) >= TWO_QUERIES_FROM else 1
    return {image: "query" if number < num_queries else "index" for number, image in enumerate(images)}
