"""Embeddings in 8 or 4 bits per number: whole numbers of steps, with a step of its own for each dimension.

A coder is fitted to training embeddings. Scores are cosines with what comes back.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from samething.arrays import Embeddings, unit
from samething.errors import ArtefactError

StoredCodes: TypeAlias = Literal["float32", "int8", "int4"]
"""How vectors are kept; ``float32``: as they are, without a coder."""
Codes: TypeAlias = UInt8[np.ndarray, "n bytes"]


@dataclasses.dataclass(frozen=True, eq=False)
class Coder:
    """Unit-length vectors (n, d) to rows of bytes, and back to approximate unit-length vectors."""

    step: Float[np.ndarray, " d"]
    kind: StoredCodes = "int8"
    """``int8``: whole numbers of ±127, a byte each; ``int4``: of ±7, two in a byte, the second one high."""

    @classmethod
    def fit(cls, vectors: Embeddings, kind: StoredCodes = "int8") -> Coder:
        """Fit a coder to training embeddings; later numbers beyond its range are cut off.

        A number's largest magnitude is 127 steps of 8 bits. Seven steps of 4 bits are 2.5 root mean squares,
        towards which an even spread counts as much as 64 vectors: a few vectors say little of later ones.
        """
        if kind == "int8":
            return cls(np.maximum(np.abs(vectors).max(axis=0) / 127, 1e-12).astype(np.float32))
        squares = np.square(vectors, dtype=np.float64).sum(axis=0)
        even = 64 / vectors.shape[1]
        step = 2.5 / 7 * np.sqrt((squares + even) / (len(vectors) + 64))
        return cls(step.astype(np.float32), kind)

    @property
    def num_bytes(self) -> int:
        """Bytes per vector."""
        return len(self.step) if self.kind == "int8" else -(-len(self.step) // 2)

    def encode(self, vectors: Embeddings) -> Codes:
        """Bytes of unit-length vectors, one row each."""
        largest = 127 if self.kind == "int8" else 7
        codes: Codes = np.rint(vectors / self.step).clip(-largest, largest).astype(np.int8).view(np.uint8)
        if self.kind == "int4":
            odd = np.pad(codes[:, 1::2], ((0, 0), (0, codes.shape[1] % 2)))
            codes = codes[:, ::2] & 15 | odd << 4
        return codes

    def decode(self, codes: Codes) -> Embeddings:
        """Approximate unit-length float32 vectors."""
        if self.kind == "int4":  # an arithmetic shift brings the sign back
            both = np.stack([codes << 4, codes & 0xF0], axis=2).view(np.int8) >> 4
            codes = both.reshape(len(codes), -1)[:, : len(self.step)]
        return unit(codes.view(np.int8) * self.step)

    def write(self, target: Path) -> None:
        """Write to an open temporary path, as ``.npz``."""
        with target.open("wb") as stream:
            np.savez(stream, kind=np.asarray(self.kind), dim=np.asarray(len(self.step)), scale=self.step)

    @classmethod
    def read(cls, source: Path) -> Coder:
        """Read what :meth:`write` wrote.

        Raises:
            ArtefactError: missing, damaged, or of a kind that version 0.1 had besides (binary, pq).
        """
        try:
            with np.load(source, allow_pickle=False) as stored:
                kind = str(stored["kind"])
                if kind in ("int8", "int4"):
                    return cls(stored["scale"], kind)  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, EOFError) as error:
            kind = f"that cannot be read ({error})"
        raise ArtefactError(
            f"{source} holds codes {kind}",
            expected="the int8 or int4 coder of an exported model",
            next_step="export the run again with --codes int4 or int8, or copy the whole folder again",
        )


def as_kept(vectors: Embeddings, training: Float[np.ndarray, "t d"], codes: StoredCodes) -> Embeddings:
    """Vectors as they come back from codes that were fitted to training vectors."""
    if codes == "float32":
        return vectors
    coder = Coder.fit(training, codes)
    return coder.decode(coder.encode(vectors))
