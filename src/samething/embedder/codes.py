"""Embeddings in one byte per number: whole numbers of steps, with a step of its own for each dimension.

A coder is fitted to training embeddings when a model is exported. Scores are cosines with what comes back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from samething.arrays import Embeddings, unit
from samething.errors import ArtefactError

StoredCodes: TypeAlias = Literal["float32", "int8"]
"""How vectors are kept; ``float32``: as they are, without a coder."""
Codes: TypeAlias = UInt8[np.ndarray, "n bytes"]


@dataclasses.dataclass(frozen=True, eq=False)
class Coder:
    """Unit-length vectors (n, d) to rows of d bytes, and back to approximate unit-length vectors."""

    step: Float[np.ndarray, " d"]
    """Of each number: the largest magnitude that it was fitted to is 127 of them."""

    @classmethod
    def fit(cls, vectors: Embeddings) -> Coder:
        """Fit a coder to training embeddings; later numbers beyond theirs are cut off."""
        return cls(np.maximum(np.abs(vectors).max(axis=0) / 127, 1e-12).astype(np.float32))

    @property
    def num_bytes(self) -> int:
        """Bytes per vector."""
        return len(self.step)

    def encode(self, vectors: Embeddings) -> Codes:
        """Bytes of unit-length vectors, one row each."""
        codes: Codes = np.rint(vectors / self.step).clip(-127, 127).astype(np.int8).view(np.uint8)
        return codes

    def decode(self, codes: Codes) -> Embeddings:
        """Approximate unit-length float32 vectors."""
        return unit(codes.view(np.int8) * self.step)

    def write(self, target: Path) -> None:
        """Write to an open temporary path, as ``.npz``."""
        with target.open("wb") as stream:
            np.savez(stream, kind=np.asarray("int8"), dim=np.asarray(self.num_bytes), scale=self.step)

    @classmethod
    def read(cls, source: Path) -> Coder:
        """Read what :meth:`write` wrote.

        Raises:
            ArtefactError: missing, damaged, or of a kind that version 0.1 had besides (binary, pq).
        """
        try:
            with np.load(source, allow_pickle=False) as stored:
                kind = str(stored["kind"])
                if kind == "int8":
                    return cls(stored["scale"])
        except (OSError, ValueError, KeyError, EOFError) as error:
            kind = f"that cannot be read ({error})"
        raise ArtefactError(
            f"{source} holds codes {kind}",
            expected="the int8 coder of an exported model",
            next_step="export the run again with --codes int8, or copy the whole folder again",
        )
