"""What every domain of the demo hands over: instances, each of which can make its own images."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import Final

import numpy as np
from PIL import Image

SIDE: Final = 192
"""Width and height of every demo image, in pixels."""

NUM_VIEWS: Final = 5
"""Images of an instance that is rendered or photographed."""

DOMAINS: Final = ("icon", "logo", "emoji", "object", "photo")


class Instance(abc.ABC):
    """One thing that is seen several times.

    Instances are made when the build is planned, sent to worker processes, and make their images there; so
    they hold names, paths and numbers only.
    """

    domain: str
    name: str
    """File-system safe, unique within the domain."""
    suffix: str = "jpg"
    """``png`` or ``jpg``."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the instance's images, sorted: the vendor of a drawing or the number of a view."""
        return tuple(f"view{number}" for number in range(NUM_VIEWS))

    @abc.abstractmethod
    def painter(self) -> Callable[[str, np.random.Generator], Image.Image]:
        """What makes the image of a source, ``SIDE`` × ``SIDE``, from its random numbers."""

    def images(self, wanted: Collection[str]) -> Iterator[tuple[str, Image.Image]]:
        """Make the wanted images: pairs of source and image.

        An image depends on the instance and its source only, not on what else is wanted.
        """
        paint = self.painter()
        for source in self.sources:
            if source in wanted:
                yield source, paint(source, generator_for(self.domain, self.name, source))

    @property
    def label(self) -> str:
        """The instance's label in the catalog, unique across domains."""
        return f"{self.domain}/{self.name}"

    def image(self, source: str) -> str:
        """Path of an image relative to the data set's root, with forward slashes."""
        return f"{self.label}/{source}.{self.suffix}"


def digest(*key: object) -> int:
    """A number in [0, 2⁶⁴) that depends on the key's text alone, alike in every process.

    >>> digest("icon", "bell") == digest("icon", "bell") != digest("icon", "bells")
    True
    """
    text = "\x1f".join(map(str, key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator_for(*key: object) -> np.random.Generator:
    """The random numbers of one image: a function of domain, instance and source."""
    return np.random.default_rng(digest(*key))


def limited(domain: str, names: Collection[str], limit: int | None) -> list[str]:
    """The names sorted; with a limit, that many of them, chosen by their digests."""
    if limit is None:
        return sorted(names)
    return sorted(sorted(names, key=lambda name: digest("limit", domain, name))[:limit])
