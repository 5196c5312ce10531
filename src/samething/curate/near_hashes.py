"""All pairs of 64-bit hashes that differ in few bits, found exactly and in bounded memory.

Multi-index hashing (Norouzi, Punjani, Fleet: *Fast Search in Hamming Space with Multi-Index Hashing*, CVPR
2012): of two hashes that differ in at most r bits, at least one of their four 16-bit bands differs in at most
r // 4 bits. Each band is an index of 65,536 buckets; only buckets near a hash's own are looked into.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Final

import numpy as np

from samething.arrays import Int, UInt8, UInt16, UInt64, counted
from samething.errors import InputError

_NUM_BANDS: Final = 4
_BAND_BITS: Final = 16
_NUM_BUCKETS: Final = 1 << _BAND_BITS

_BYTES_A_CANDIDATE: Final = 64
"""At the peak: two row numbers, two hashes, their difference, its bits, and masks."""

LARGEST_DISTANCE: Final = 15
"""Beyond it, band indices find nearly everything, and comparing all pairs is as quick."""


@dataclasses.dataclass(frozen=True, eq=False)
class HashPairs:
    """Pairs of near hashes, sorted by first and second row."""

    first: Int[np.ndarray, " p"]
    second: Int[np.ndarray, " p"]
    distance: UInt8[np.ndarray, " p"]
    """Bits in which they differ, 0 to 64."""

    def __len__(self) -> int:
        return len(self.first)


def near_pairs(
    hashes: UInt64[np.ndarray, " n"],
    others: UInt64[np.ndarray, " m"] | None = None,
    *,
    distance: int,
    memory_mib: int = 256,
) -> HashPairs:
    """Every pair of hashes that differ in at most ``distance`` bits.

    Args:
        hashes: first of each pair.
        others: second of each pair; None pairs the hashes among themselves, each pair once, first < second.
        distance: bits that may differ, 0 to 15.
        memory_mib: ceiling in MiB of the working memory beyond arguments, an index (8 bytes per hash) and
            the result.

    Raises:
        InputError: the distance or the memory is out of its range.

    >>> found = near_pairs(np.array([0b0111, 0b0110, 0xFF00], np.uint64), distance=2)
    >>> found.first, found.second, found.distance
    (array([0]), array([1]), array([1], dtype=uint8))
    """
    if not 0 <= distance <= LARGEST_DISTANCE or memory_mib < 1:
        raise InputError(
            f"distance={distance}, memory_mib={memory_mib}",
            expected=f"0 to {LARGEST_DISTANCE} bits of 64, and at least 1 MiB",
            next_step="give another distance; 8 is usual",
        )
    among = others is None
    gallery = hashes if others is None else others
    parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))]
    for band, radius in enumerate(_band_radii(distance)):
        if radius >= 0:
            parts += _pairs_of_band(hashes, gallery, band, distance, among=among, memory_mib=memory_mib)
    first, second, bits = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((second, first))
    return HashPairs(first[order], second[order], bits[order])


def differing_bits(
    first: UInt64[np.ndarray, " p"], second: UInt64[np.ndarray, " p"]
) -> UInt8[np.ndarray, " p"]:
    """In how many bits two hashes differ, pair by pair.

    >>> differing_bits(np.array([0b101], np.uint64), np.array([0b010], np.uint64))
    array([3], dtype=uint8)
    """
    return np.asarray(np.bitwise_count(first ^ second))


def _band_radii(distance: int) -> list[int]:
    """How far to look in each band so that no pair is missed.

    With distance = 4 r + s, a pair that no band of the first s + 1 brings within r, and no other within
    r - 1, differs in at least (s + 1)(r + 1) + (3 - s) r = 4 r + s + 1 bits.
    """
    whole, rest = divmod(distance, _NUM_BANDS)
    return [whole if band <= rest else whole - 1 for band in range(_NUM_BANDS)]


def _pairs_of_band(
    hashes: UInt64[np.ndarray, " n"],
    gallery: UInt64[np.ndarray, " m"],
    band: int,
    distance: int,
    *,
    among: bool,
    memory_mib: int,
) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"], UInt8[np.ndarray, " p"]]]:
    """Pairs that this band finds and no earlier one does."""
    radii = _band_radii(distance)
    keys = _band(gallery, band)
    order = np.argsort(keys, kind="stable").astype(np.int64)
    starts = np.zeros(_NUM_BUCKETS + 1, np.int64)
    np.cumsum(np.bincount(keys, minlength=_NUM_BUCKETS), out=starts[1:])
    sizes = np.diff(starts)
    own_keys = _band(hashes, band)
    most = max(1, memory_mib * 2**20 // _BYTES_A_CANDIDATE)
    for mask in _masks(radii[band]):
        buckets = own_keys ^ mask
        ends = np.cumsum(sizes[buckets])
        row = 0
        while row < len(hashes):
            before = int(ends[row - 1]) if row else 0
            # at least one row, whose candidates are at most the whole gallery
            stop = max(row + 1, int(np.searchsorted(ends, before + most, side="right")))
            which, places = in_buckets(buckets[row:stop], starts, sizes)
            queries, candidates = row + which, order[places]
            row = stop
            if among:
                later = candidates > queries
                queries, candidates = queries[later], candidates[later]
            difference = hashes[queries] ^ gallery[candidates]
            bits = np.bitwise_count(difference)
            near = np.flatnonzero(bits <= distance)
            difference = difference[near]
            new = np.ones(len(near), bool)
            for earlier in range(band):
                new &= np.bitwise_count(_band(difference, earlier)) > max(-1, radii[earlier])
            near = near[new]
            yield queries[near], candidates[near], bits[near]


def in_buckets(
    wanted: Int[np.ndarray, " q"] | UInt16[np.ndarray, " q"],
    starts: Int[np.ndarray, " s"],
    sizes: Int[np.ndarray, " b"],
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Every place of some buckets, which lie one behind the other: which wanted one it is in, and the place.

    >>> in_buckets(np.array([2, 0]), np.array([0, 2, 2]), np.array([2, 0, 3]))
    (array([0, 0, 0, 1, 1]), array([2, 3, 4, 0, 1]))
    """
    counts = sizes[wanted]
    which = np.repeat(np.arange(len(wanted)), counts)
    return which, np.repeat(starts[wanted], counts) + counted(counts)


def _band(hashes: UInt64[np.ndarray, " n"], band: int) -> UInt16[np.ndarray, " n"]:
    return (hashes >> np.uint64(_BAND_BITS * band)).astype(np.uint16)


def _masks(radius: int) -> tuple[np.uint16, ...]:
    """The 16-bit numbers with at most so many bits set."""
    return tuple(
        np.uint16(sum(1 << bit for bit in bits))
        for number in range(radius + 1)
        for bits in itertools.combinations(range(_BAND_BITS), number)
    )
