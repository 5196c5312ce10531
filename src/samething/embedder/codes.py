"""Embeddings in fewer bytes: one byte a number, one bit per number, or product quantisation.

A coder is fitted to training embeddings when a model is exported. It maps unit-length vectors (n, d) to rows
of bytes and back to approximate unit-length vectors; scores are cosines with what comes back.

=======  ==============  =====================================================================
kind     bytes, d = 64   what is kept
=======  ==============  =====================================================================
int8     64              each number in 255 steps between ± the largest magnitude seen of its dimension
binary   8               the sign of each number, after the mean was subtracted
pq       16              for every 4 numbers the nearest of 256 centres (Jégou et al. 2011)
=======  ==============  =====================================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Shaped, UInt8

from samething.arrays import Embeddings, unit
from samething.errors import ArtefactError, InputError

CodeKind: TypeAlias = Literal["int8", "binary", "pq"]
Codes: TypeAlias = UInt8[np.ndarray, "n bytes"]

PART_WIDTH: Final = 4
"""Numbers that share a centre in product quantisation."""
NUM_CENTRES: Final = 256
_ROUNDS: Final = 25


@dataclasses.dataclass(frozen=True, eq=False)
class Coder:
    """Unit-length vectors to bytes and back."""

    kind: CodeKind
    dim: int
    """Numbers in a vector."""
    arrays: Mapping[str, Shaped[np.ndarray, ...]]
    """What was fitted: ``scale`` (d,) of int8; ``mean`` and ``magnitude`` (d,) of binary; ``centres``
    (parts, 256, 4) of pq, whose last part is filled up with zeros."""

    @classmethod
    def fit(cls, kind: CodeKind, vectors: Embeddings, *, seed: int = 0) -> Coder:
        """Fit a coder to training embeddings.

        Raises:
            InputError: product quantisation with fewer vectors than centres.
        """
        dim = vectors.shape[1]
        if kind == "int8":
            largest = np.abs(vectors).max(axis=0)
            return cls(kind, dim, {"scale": np.maximum(largest / 127, 1e-12).astype(np.float32)})
        if kind == "binary":
            mean = vectors.mean(axis=0)
            magnitude = np.abs(vectors - mean).mean(axis=0)
            return cls(
                kind, dim, {"mean": mean.astype(np.float32), "magnitude": magnitude.astype(np.float32)}
            )
        if len(vectors) < NUM_CENTRES:
            raise InputError(
                f"product quantisation fitted to {len(vectors)} vectors",
                expected=f"at least {NUM_CENTRES}, one for each centre",
                next_step="choose int8 or binary, or train on more images",
            )
        rng = np.random.default_rng(seed)
        parts = _parts(vectors.astype(np.float32))
        return cls(kind, dim, {"centres": np.stack([k_means(part, NUM_CENTRES, rng) for part in parts])})

    @property
    def num_bytes(self) -> int:
        """Bytes a vector."""
        return {"int8": self.dim, "binary": -(-self.dim // 8), "pq": -(-self.dim // PART_WIDTH)}[self.kind]

    def encode(self, vectors: Embeddings) -> Codes:
        """Bytes of unit-length vectors, one row each."""
        if self.kind == "int8":
            steps = np.rint(vectors / self.arrays["scale"]).clip(-127, 127)
            whole: Codes = steps.astype(np.int8).view(np.uint8)
            return whole
        if self.kind == "binary":
            packed: Codes = np.packbits(vectors > self.arrays["mean"], axis=1)
            return packed
        pairs = zip(_parts(vectors.astype(np.float32)), self.arrays["centres"], strict=True)
        return np.stack([_nearest(part, centres) for part, centres in pairs], axis=1).astype(np.uint8)

    def decode(self, codes: Codes) -> Embeddings:
        """Approximate unit-length float32 vectors."""
        if self.kind == "int8":
            vectors = codes.view(np.int8) * self.arrays["scale"]
        elif self.kind == "binary":
            signs = np.unpackbits(codes, axis=1, count=self.dim).astype(np.float32) * 2 - 1
            vectors = self.arrays["mean"] + signs * self.arrays["magnitude"]
        else:
            centres = self.arrays["centres"]
            parts = [centres[place][codes[:, place]] for place in range(len(centres))]
            vectors = np.concatenate(parts, axis=1)[:, : self.dim]
        return unit(vectors)

    def write(self, target: Path) -> None:
        """Write to an open temporary path, as ``.npz``."""
        with target.open("wb") as stream:
            named: dict[str, Any] = {
                "kind": np.asarray(self.kind),
                "dim": np.asarray(self.dim),
                **self.arrays,
            }
            np.savez(stream, **named)

    @classmethod
    def read(cls, source: Path) -> Coder:
        """Read what :meth:`write` wrote.

        Raises:
            ArtefactError: missing or damaged.
        """
        try:
            with np.load(source, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            kind: CodeKind = str(arrays.pop("kind"))  # type: ignore[assignment]
            return cls(kind, int(arrays.pop("dim")), arrays)
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise ArtefactError(
                f"{source} cannot be read ({error})",
                expected="the coder of an exported model",
                next_step="export the model again, or copy the whole folder",
            ) from error


def _parts(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "parts n width"]:
    """Every four numbers apart; the last part is filled up with zeros."""
    missing = -vectors.shape[1] % PART_WIDTH
    filled = np.pad(vectors, ((0, 0), (0, missing)))
    num_parts = filled.shape[1] // PART_WIDTH  # said, because -1 fails without rows
    return filled.reshape(len(vectors), num_parts, PART_WIDTH).transpose(1, 0, 2)


def _nearest(
    rows: Float[np.ndarray, "n width"], centres: Float[np.ndarray, "k width"]
) -> Shaped[np.ndarray, " n"]:
    """Number of the centre nearest to each row, a few thousand rows at a time."""
    half_squares = (centres**2).sum(axis=1) / 2
    found = [
        (half_squares - rows[start : start + 8192] @ centres.T).argmin(axis=1)
        for start in range(0, len(rows), 8192)
    ]
    return np.concatenate(found) if found else np.empty(0, np.int64)


def k_means(
    rows: Float[np.ndarray, "n width"], num_centres: int, rng: np.random.Generator
) -> Float[np.ndarray, "k width"]:
    """Centres by Lloyd's rounds from random rows; an empty centre moves to the row that is worst served.

    Args:
        rows: at least ``num_centres`` of them.
        num_centres: k.
        rng: chooses the first centres.
    """
    centres = rows[rng.choice(len(rows), num_centres, replace=False)].astype(np.float32)
    for _ in range(_ROUNDS):
        nearest = _nearest(rows, centres)
        counts = np.bincount(nearest, minlength=num_centres)
        sums = np.zeros((num_centres, rows.shape[1]))
        np.add.at(sums, nearest, rows)
        moved = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts == 0)
        if len(empty):
            distances = ((rows - centres[nearest]) ** 2).sum(axis=1)
            moved[empty] = rows[np.argsort(-distances, kind="stable")[: len(empty)]]
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres
