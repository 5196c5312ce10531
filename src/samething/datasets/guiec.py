"""One's own benchmark in the form of the Google Universal Image Embedding Challenge: queries and an index.

The challenge's own images (5,000 queries, 200,000 in the index) were never published.
"""

from __future__ import annotations

import pyarrow as pa

from samething.datasets.description import Dataset
from samething.datasets.official import OfficialFiles


def read_guiec(source: OfficialFiles) -> pa.Table:
    """``query/[DOMAIN/]THING/image`` and ``index/[DOMAIN/]THING/image``.

    An image directly in ``index/`` or ``index/DOMAIN/`` (beside folders of things) is a distractor: a thing
    of its own.
    """
    images: list[str] = []
    labels: list[str] = []
    domains: list[str] = []
    roles: list[str] = []
    for role in ("query", "index"):
        for domain, thing, path in _images_of(source, f"guiec/{role}"):
            if thing is None and role == "query":
                raise source.malformed(
                    f"guiec/{role}",
                    f"holds {path}, which lies in no folder of a thing",
                    expected="query/THING/IMAGE or query/DOMAIN/THING/IMAGE",
                )
            images.append(path)
            labels.append(f"distractor/{path}" if thing is None else f"{domain}/{thing}" if domain else thing)
            domains.append(domain or source.dataset.key)
            roles.append(role)
    if "query" not in roles:
        raise source.malformed("guiec/query", "holds no images", expected="query/THING/IMAGE")
    return source.rows(
        "guiec",
        image=pa.array(images, pa.string()),
        label=pa.array(labels, pa.string()),
        domain=pa.array(domains, pa.string()),
        role=pa.array(roles, pa.string()),
    )


def _images_of(source: OfficialFiles, folder: str) -> list[tuple[str | None, str | None, str]]:
    """Domain, thing and path of every image of a folder."""
    found: list[tuple[str | None, str | None, str]] = [
        (None, None, f"{folder}/{name}") for name in source.images(folder)
    ]
    for name in source.sub_folders(folder):
        below = f"{folder}/{name}"
        things = source.sub_folders(below)
        found += [
            (name, None, f"{below}/{image}") if things else (None, name, f"{below}/{image}")
            for image in source.images(below)
        ]
        for thing in things:
            found += [
                (name, thing, f"{below}/{thing}/{image}") for image in source.images(f"{below}/{thing}")
            ]
    return found


GUIEC = Dataset(
    key="guiec",
    title="one's own benchmark in the challenge's form",
    domain="several",
    classes=None,
    images=None,
    licence="one's own; the challenge's images were never published",
    source="https://www.kaggle.com/competitions/google-universal-image-embedding",
    get="sort one's own images into guiec/query/DOMAIN/THING/ and guiec/index/DOMAIN/THING/ (the domain "
    "may be left out)",
    files=("guiec/query/", "guiec/index/"),
    layout="docs/datasets.md",
    reader=read_guiec,
    has_roles=True,
)
