"""Pairs of images that are one: by checksum, by perceptual hash, by embedding.

Everything here counts in rows of one list: the catalog's images, and behind them those of the evaluation
sets it is held against. Copies of one file are paired with one of them only, so that a file that is there a
thousand times gives a thousand pairs and not a million.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa

from samething.arrays import Bool, Embeddings, Float32, Int
from samething.curate.curate_config import CurateConfig
from samething.curate.hashes import Hashes
from samething.curate.near_hashes import HashPairs, differing_bits, in_buckets, near_pairs
from samething.curate.same_image import DecodeRow, made_of_each_other, pair_similarities
from samething.retrieval import pairs_above

Method: TypeAlias = Literal["exact", "perceptual", "embedding", "geometry"]
METHODS: Final[Sequence[Method]] = get_args(Method)

FARTHEST_BITS: Final = 22
"""Bits in which the hashes of two images near in embedding may differ to be looked at; of the demo's crops
that keep 84 % of a side, the median differs in 20, unrelated images in 32 ± 4."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of rows that show one image."""

    first: Int[np.ndarray, " p"]
    second: Int[np.ndarray, " p"]
    method: Int[np.ndarray, " p"]
    """What found it, as an index into :data:`METHODS`."""
    score: Float32[np.ndarray, " p"]
    """Bits that differ for ``perceptual``, cosine for ``embedding``, 0 for ``exact``, places that agree for
    ``geometry``."""
    closeness: Float32[np.ndarray, " p"]
    """Correlation of the pixels; 1 for ``exact``, NaN where the pixels were not compared; for ``geometry`` as
    :func:`~samething.rerank.laid_over.laid_over` takes it."""
    is_mirrored: Bool[np.ndarray, " p"]
    """Whether the first was mirrored before the two were compared."""

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def empty(cls) -> Pairs:
        """No pairs."""
        rows, numbers = np.empty(0, np.int64), np.empty(0, np.float32)
        return cls(rows, rows, rows, numbers, numbers, np.empty(0, bool))

    @classmethod
    def candidates(
        cls,
        method: Method,
        first: Int[np.ndarray, " p"],
        second: Int[np.ndarray, " p"],
        score: np.ndarray,
        is_mirrored: Bool[np.ndarray, " p"],
    ) -> Pairs:
        """Pairs that one method found, whose pixels are not compared yet."""
        methods, unknown = np.full(len(first), METHODS.index(method)), np.full(len(first), np.nan, np.float32)
        return cls(first, second, methods, score.astype(np.float32), unknown, is_mirrored)

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """All of several, in their order."""
        parts = [cls.empty(), *parts]
        fields = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))

    def once(self) -> Pairs:
        """Each pair of two rows once, the lower one first, by its first method and lowest score; sorted."""
        low, high = np.minimum(self.first, self.second), np.maximum(self.first, self.second)
        order = np.lexsort((self.is_mirrored, self.score, self.method, high, low))
        order = order[low[order] != high[order]]
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)
        return dataclasses.replace(self, first=low, second=high).take(order[new])

    def found_by(self, number: int) -> str:
        """How a pair was found, in a few words."""
        method, score, closeness = METHODS[self.method[number]], self.score[number], self.closeness[number]
        if method == "exact":
            return "the same file"
        texts = {
            "perceptual": f"{score:.0f} of 64 bits differ",
            "embedding": f"cosine {score:.3f}",
            "geometry": f"{score:.0f} places agree",
        }
        text = texts[method]
        return text if np.isnan(closeness) else f"{text}, pixels {closeness:.3f}"

    def take(self, chosen: Bool[np.ndarray, " p"] | Int[np.ndarray, " k"]) -> Pairs:
        """Some of the pairs."""
        return Pairs(*(getattr(self, field.name)[chosen] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Contents:
    """Which rows are copies of one file."""

    of_row: Int[np.ndarray, " n"]
    """Content of each row, 0…; -1 for a file that cannot be read."""
    row_of: Int[np.ndarray, " c"]
    """The row that stands for each content: the first by rank."""

    @classmethod
    def of(cls, sha256: pa.ChunkedArray | pa.Array, rank: Int[np.ndarray, " n"]) -> Contents:
        """Group rows by checksum; an empty or null checksum belongs to no group.

        Args:
            sha256: n strings.
            rank: place of each row; the lowest of a group stands for it.
        """
        joined = sha256.combine_chunks() if isinstance(sha256, pa.ChunkedArray) else sha256
        encoded = joined.dictionary_encode()
        codes = np.array(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
        empty = encoded.dictionary.index("").as_py()
        codes[codes == empty] = -1 if empty >= 0 else codes[codes == empty]
        used, numbers = np.unique(codes[codes >= 0], return_inverse=True)
        codes[codes >= 0] = numbers
        row_of = np.empty(len(used), np.int64)
        order = np.argsort(-rank, kind="stable")
        order = order[codes[order] >= 0]
        row_of[codes[order]] = order  # the last one written is the lowest rank
        return cls(codes, row_of)


def exact_pairs(contents: Contents, tiers: Int[np.ndarray, " n"], rank: Int[np.ndarray, " n"]) -> Pairs:
    """Each copy of a file with the one that stands for all, and with the one that does so in its own tier."""
    copies = np.flatnonzero(contents.of_row >= 0)
    several = np.bincount(contents.of_row[copies], minlength=len(contents.row_of)) > 1
    copies = copies[several[contents.of_row[copies]]]
    stands = contents.row_of[contents.of_row[copies]]
    key = contents.of_row[copies] * (int(tiers.max(initial=0)) + 1) + tiers[copies]
    order = np.lexsort((rank[copies], key))
    _, firsts, run = np.unique(key[order], return_index=True, return_inverse=True)
    in_tier = np.empty(len(copies), np.int64)
    in_tier[order] = copies[order][firsts[run]]
    first = np.concatenate([stands, in_tier])
    second = np.concatenate([copies, copies])
    new = (first != second) & np.concatenate([np.ones(len(copies), bool), in_tier != stands])
    first, second = first[new], second[new]
    zeros = np.zeros(len(first), np.float32)
    return Pairs(first, second, np.zeros(len(first), np.int64), zeros, zeros + 1, np.zeros(len(first), bool))


def perceptual_pairs(
    contents: Contents, hashes: Hashes, decode_row: DecodeRow, config: CurateConfig
) -> Pairs:
    """Pairs of contents whose perceptual hashes are near, confirmed on their pixels.

    Args:
        contents: what is one file.
        hashes: of all rows.
        decode_row: the image of a row.
        config: says which candidates there are, and what confirms them.
    """
    rows = contents.row_of[hashes.is_hashed[contents.row_of]]
    own, numbers = np.unique(hashes.perceptual[rows], return_inverse=True)
    near = near_pairs(own, distance=config.bits, memory_mib=config.memory_mib)
    several = np.flatnonzero(np.bincount(numbers) > 1)
    equal = HashPairs(several, several, np.zeros(len(several), np.uint8))
    parts = [_spread(rows, numbers, numbers, found) for found in (equal, near)]
    for name in ("inner", *(["mirrored"] if config.mirrored else [])):
        others, other_numbers = np.unique(getattr(hashes, name)[rows], return_inverse=True)
        near = near_pairs(others, own, distance=config.bits, memory_mib=config.memory_mib)
        parts.append(_spread(rows, other_numbers, numbers, near, is_mirrored=name == "mirrored"))
    return _confirmed(Pairs.joined(parts), decode_row, config)


def embedding_pairs(
    rows: Int[np.ndarray, " r"],
    embeddings: Embeddings,
    hashes: Hashes,
    decode_row: DecodeRow,
    config: CurateConfig,
) -> tuple[Pairs, int]:
    """Pairs of rows whose embeddings are near, confirmed on their pixels.

    Args:
        rows: rows that have an embedding, ascending, one of each content.
        embeddings: of those rows.
        hashes: of all rows; unless places that agree confirm, those with nothing in common are passed over.
        decode_row: the image of a row.
        config: says which candidates there are, and what confirms them.

    Returns:
        The pairs, and the number of rows that may have more of them than were looked at.
    """
    near = pairs_above(embeddings, config.similarity, memory_mib=config.memory_mib)
    first, second = rows[near.first], rows[near.second]
    own = hashes.perceptual
    # each taken whole or as its inner part
    bits = np.minimum.reduce(
        [
            differing_bits(own[first], own[second]),
            differing_bits(hashes.inner[first], own[second]),
            differing_bits(own[first], hashes.inner[second]),
        ]
    )
    turned = differing_bits(hashes.mirrored[first], own[second])
    is_mirrored = (turned < bits) & config.mirrored
    bits = np.where(is_mirrored, turned, bits)
    by_places = config.verify == "geometry"
    alike = (bits <= FARTHEST_BITS) | by_places | ~hashes.is_hashed[first] | ~hashes.is_hashed[second]
    found = Pairs.candidates("embedding", first, second, near.cosine, is_mirrored).take(alike)
    return _confirmed(found, decode_row, config), near.num_crowded


def _spread(
    rows: Int[np.ndarray, " r"],
    first_numbers: Int[np.ndarray, " r"],
    second_numbers: Int[np.ndarray, " r"],
    near: HashPairs,
    *,
    is_mirrored: bool = False,
) -> Pairs:
    """Pairs of hashes as pairs of rows: all of the one with the first of the other, and vice versa.

    Args:
        rows: those that have hashes.
        first_numbers: number of each row's hash among those that stand first in a pair.
        second_numbers: the same among those that stand second.
        near: pairs of such numbers.
        is_mirrored: noted with each pair.
    """

    def members(numbers: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = np.bincount(numbers)
        which, places = in_buckets(wanted, np.cumsum(counts) - counts, counts)
        return which, rows[np.argsort(numbers, kind="stable")[places]]

    _, first_of_second = np.unique(second_numbers, return_index=True)
    _, first_of_first = np.unique(first_numbers, return_index=True)
    pair_a, row_a = members(first_numbers, near.first)
    pair_b, row_b = members(second_numbers, near.second)
    one = np.concatenate([row_a, rows[first_of_first[near.first[pair_b]]]])
    two = np.concatenate([rows[first_of_second[near.second[pair_a]]], row_b])
    distance = near.distance[np.concatenate([pair_a, pair_b])]
    return Pairs.candidates("perceptual", one, two, distance, np.full(len(one), is_mirrored))


def _confirmed(candidates: Pairs, decode_row: DecodeRow, config: CurateConfig) -> Pairs:
    """The candidates whose pixels agree, or where that is asked for of which one was made of the other."""
    pairs = candidates.once()
    if config.closeness <= 0:
        return pairs
    numbers = zip(pairs.first.tolist(), pairs.second.tolist(), pairs.is_mirrored.tolist(), strict=True)
    seen = pair_similarities(decode_row, numbers, least=config.closeness)
    same = dataclasses.replace(pairs, closeness=seen).take(seen >= config.closeness)
    if config.verify != "geometry":
        return same
    others = pairs.take((seen < config.closeness) & ~pairs.is_mirrored)
    copies = made_of_each_other(decode_row, zip(others.first.tolist(), others.second.tolist(), strict=True))
    is_copy = np.array([copy is not None for copy in copies], bool)
    found = [copy for copy in copies if copy is not None]
    confirmed = dataclasses.replace(
        others.take(is_copy),
        method=np.full(len(found), METHODS.index("geometry")),
        score=np.array([copy.evidence.num_agreeing for copy in found], np.float32),
        closeness=np.array([copy.closeness for copy in found], np.float32),
    )
    return Pairs.joined([same, confirmed])


def row_ranks(
    tiers: Int[np.ndarray, " n"], datasets: Int[np.ndarray, " n"], num_pixels: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Place of each row when one of several copies stays: evaluation first, then the earlier data set, then
    the larger image, then the earlier row.

    >>> row_ranks(np.array([0, 0, 2]), np.array([0, 0, 1]), np.array([10, 90, 10]))
    array([2, 1, 0])
    """
    order = np.lexsort((np.arange(len(tiers)), -num_pixels, datasets, -tiers))
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks
