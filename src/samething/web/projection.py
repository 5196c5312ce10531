"""The map: all vectors of an index in two dimensions, near where they are similar."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

import numpy as np
from jaxtyping import Float

from samething.arrays import Embeddings
from samething.files import atomic_path
from samething.index import AbstractIndex

MAX_POINTS: Final = 20_000
"""Pictures on a map; of a larger index an even sample."""
MAP_NAME: Final = "map.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class PictureMap:
    """Where the pictures of an index are on its map."""

    ids: list[str]
    places: Float[np.ndarray, "n 2"]
    """In [0, 1]."""
    labels: list[str]
    domains: list[str]


def picture_map(index: AbstractIndex) -> PictureMap:
    """The map of an index; kept in its folder until the index changes."""
    rows = sorted(
        (row["id"], row["label"] or "", row["domain"] or "")
        for batch in index.items(columns=["label", "domain"])
        for row in batch.to_pylist()
    )
    if len(rows) > MAX_POINTS:
        rows = [rows[place] for place in np.linspace(0, len(rows) - 1, MAX_POINTS).astype(int)]
    ids = [row[0] for row in rows]
    folder = Path(index.location)
    kept = folder / MAP_NAME if folder.is_dir() else None
    places = None
    if kept is not None and kept.exists():
        with np.load(kept) as found:
            if found["ids"].tolist() == ids:
                places = found["places"]
    if places is None:
        places = project(index.vectors(ids))
        if kept is not None:
            with atomic_path(kept) as partial, partial.open("wb") as stream:
                np.savez(stream, ids=np.array(ids, dtype=np.str_), places=places)
    return PictureMap(ids, places, [row[1] for row in rows], [row[2] for row in rows])


def project(vectors: Embeddings, *, seed: int = 0) -> Float[np.ndarray, "n 2"]:
    """Two numbers a vector, in [0, 1]: by UMAP where it is installed and there are enough, else by PCA."""
    if len(vectors) == 0:
        return np.empty((0, 2))
    places = _umap(vectors, seed) if len(vectors) >= 50 else None
    if places is None:
        centred = vectors - vectors.mean(axis=0)
        _, _, axes = np.linalg.svd(centred, full_matrices=False)
        places = centred @ axes[:2].T
        if places.shape[1] < 2:
            places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    low, high = places.min(axis=0), places.max(axis=0)
    scaled: Float[np.ndarray, "n 2"] = ((places - low) / np.where(high > low, high - low, 1)).astype(float)
    return scaled


def _umap(vectors: Embeddings, seed: int) -> Float[np.ndarray, "n 2"] | None:
    try:
        import umap
    except ImportError:
        return None
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one thread being used for the sake of the seed
        found = umap.UMAP(metric="cosine", n_neighbors=15, min_dist=0.15, random_state=seed).fit_transform(vectors)
    return np.asarray(found, dtype=float)
