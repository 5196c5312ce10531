"""Embeddings in 8 or 4 bits per number: whole numbers of steps, with a step of its own for each dimension.

A coder is fitted to training embeddings. Scores are cosines of a query, which stays whole, with what comes
back of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from samething.arrays import Embeddings, Float, Int, UInt8, unit
from samething.errors import ArtefactError, InputError
from samething.files import Json

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
        return bytes_per_vector(len(self.step), self.kind)

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
        return unit(self._numbers(codes))

    def lengths(self, codes: Codes) -> Float[np.ndarray, " n"]:
        """Lengths of the vectors before they are brought to 1: near it, but for numbers that were cut off."""
        return np.asarray(np.linalg.norm(self._numbers(codes), axis=1))

    def products(self, codes: Codes, query: Float[np.ndarray, " d"]) -> Float[np.ndarray, " n"]:
        """Scores of rows before they are brought to length 1, in float32."""
        weights = (query * self.step).astype(np.float32)
        if self.kind == "int8":
            return np.asarray(codes.view(np.int8).astype(np.float32) @ weights)
        odd = np.pad(weights[1::2], (0, len(weights) % 2))
        low, high = (codes << 4).view(np.int8), (codes & 0xF0).view(np.int8)  # 16 times the numbers
        return np.asarray(low.astype(np.float32) @ (weights[::2] / 16) + high.astype(np.float32) @ (odd / 16))

    def _numbers(self, codes: Codes) -> Embeddings:
        if self.kind == "int4":  # an arithmetic shift brings the sign back
            both = np.stack([codes << 4, codes & 0xF0], axis=2).view(np.int8) >> 4
            codes = both.reshape(len(codes), 2 * codes.shape[1])[:, : len(self.step)]
        return np.asarray(codes.view(np.int8) * self.step)

    def to_json(self) -> dict[str, Json]:
        """Plain values, from which :meth:`from_json` makes the same coder."""
        return {"kind": self.kind, "step": self.step.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Json]) -> Coder:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: it is of another kind.
        """
        if value["kind"] not in ("int8", "int4"):
            raise ValueError(f"codes {value['kind']}")
        return cls(np.array(value["step"], dtype=np.float32), value["kind"])

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


@dataclasses.dataclass(frozen=True, eq=False)
class CodedRows:
    """Rows in codes that are read like an array of unit-length float32 vectors; each is decoded when read."""

    codes: Codes
    coder: Coder

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the vectors."""
        return len(self.codes), len(self.coder.step)

    def __getitem__(self, rows: slice | Int[np.ndarray, " r"]) -> Embeddings:
        return self.coder.decode(self.codes[rows])

    def take(self, rows: Int[np.ndarray, " r"], axis: Literal[0] = 0) -> CodedRows:
        """Some of the rows, still in codes."""
        return CodedRows(self.codes.take(rows, axis=axis), self.coder)


def bytes_per_vector(dim: int, codes: StoredCodes) -> int:
    """Bytes that a vector takes.

    >>> [bytes_per_vector(5, kind) for kind in ("float32", "int8", "int4")]
    [20, 5, 3]
    """
    return {"float32": 4 * dim, "int8": dim, "int4": -(-dim // 2)}[codes]


def within_budget(dim: int, num_bytes: int) -> tuple[int, StoredCodes]:
    """How many first numbers of an embedding to keep, and how, in so many bytes.

    All numbers in as many bits as there is room for; where 4 bits each are too many, the first ones in 4
    bits: 512 numbers of 4 bits beat 256 of 8 and 64 of 32 (docs/studies.md).

    Raises:
        InputError: less than a byte.

    >>> within_budget(64, 256), within_budget(512, 256), within_budget(512, 128)
    ((64, 'float32'), (512, 'int4'), (256, 'int4'))
    """
    if num_bytes < 1:
        raise InputError(
            f"{num_bytes} bytes for a vector", expected="at least 1", next_step="256 is what a default needs"
        )
    for kind in ("float32", "int8"):
        if bytes_per_vector(dim, kind) <= num_bytes:
            return dim, kind
    return min(dim, 2 * num_bytes), "int4"


def as_kept(vectors: Embeddings, training: Float[np.ndarray, "t d"], codes: StoredCodes) -> Embeddings:
    """Vectors as they come back from codes that were fitted to training vectors."""
    if codes == "float32":
        return vectors
    coder = Coder.fit(training, codes)
    return coder.decode(coder.encode(vectors))
