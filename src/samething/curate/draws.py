"""A random number for each name: the same whatever the order of the rows and whatever else there is.

What is drawn for one image or class so never changes what is drawn for another: a data set that is added,
or an image that is taken away, leaves the rest of a selection as it was.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from samething.arrays import UInt64
from samething.errors import InputError

# FNV-1a, 64 bits (Fowler, Noll, Vo; draft-eastlake-fnv)
_OFFSET: Final = np.uint64(0xCBF29CE484222325)
_PRIME: Final = np.uint64(0x100000001B3)

_ROWS_AT_A_TIME: Final = 1 << 16
"""So that a block's text stays in the processor's cache."""


def draws_of(names: pa.ChunkedArray, *, seed: int) -> UInt64[np.ndarray, " n"]:
    """Numbers evenly spread over 64 bits, each a pure function of one name and the seed.

    Args:
        names: strings; a null counts as the empty string.
        seed: another number gives other draws, at least 0.

    Raises:
        InputError: the seed is negative or has more than 63 bits.

    >>> both, one = pa.chunked_array([["b", "a"]]), pa.chunked_array([["a"]])
    >>> bool(draws_of(both, seed=0)[1] == draws_of(one, seed=0)[0])
    True
    """
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed}", expected="from 0 to 2^63 - 1", next_step="give another seed")
    parts = [np.empty(0, np.uint64)]
    for chunk in names.cast(pa.string()).fill_null("").chunks:
        starts = range(0, len(chunk), _ROWS_AT_A_TIME)
        parts += [_fnv1a(chunk.slice(start, _ROWS_AT_A_TIME)) for start in starts]
    return _mixed(np.concatenate(parts) ^ _mixed(np.asarray([seed], np.uint64))[0])


def _fnv1a(texts: pa.StringArray) -> UInt64[np.ndarray, " n"]:
    """The hash of each string's UTF-8 bytes, a byte of all strings at a time."""
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    octets = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")  # long ones first, so that those still running are a prefix
    starts, descending = bounds[:-1][order], -lengths[order]
    running = np.full(len(texts), _OFFSET, np.uint64)
    for place in range(int(lengths.max(initial=0))):
        longer = int(np.searchsorted(descending, -place, side="left"))
        running[:longer] ^= octets[starts[:longer] + place]
        running[:longer] *= _PRIME
    hashes = np.empty_like(running)
    hashes[order] = running
    return hashes


def _mixed(values: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014): each input bit changes all of the output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
